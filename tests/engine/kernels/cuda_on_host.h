// Runs a CUDA kernel on the CPU, for tests: each thread of a block is a fibre that runs until it meets a
// barrier, __syncthreads or a warp operation. `order_seed` says in which order warps and their lanes take
// turns: 0 rising, 1 falling, else a shuffle with that seed. What a missing barrier leaves open then shows
// as a result that depends on the order. A warp operation that some lane does not reach aborts.

#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct Dim3 { unsigned int x, y, z; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

static Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

enum class State { running, at_block_barrier, at_warp_barrier, finished };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  State state = State::running;
  uint64_t value = 0;  // what a warp operation exchanges
};

static std::vector<Fibre> fibres;
static std::function<void()> body;
static ucontext_t scheduler;
static int current = 0;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "cuda_on_host: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, reason);
  std::abort();
}

inline void wait(State barrier) {
  const int self = current;
  fibres[self].state = barrier;
  swapcontext(&fibres[self].context, &scheduler);
}

inline void fibre_main() {
  body();
  fibres[current].state = State::finished;
}

// Runs one warp until all its lanes wait for the block or have finished.
inline void run_warp(const std::vector<int>& lanes) {
  for (bool any = true; any;) {
    any = false;
    for (const int index : lanes) {
      if (fibres[index].state != State::running) continue;
      any = true;
      current = index;
      threadIdx = {static_cast<unsigned int>(index), 0, 0};
      swapcontext(&scheduler, &fibres[index].context);
    }
    const auto waits = [](int index) { return fibres[index].state == State::at_warp_barrier; };
    const auto arrived = std::count_if(lanes.begin(), lanes.end(), waits);
    if (any || arrived == 0) continue;
    if (arrived != 32) fail("a warp operation that not all 32 lanes reach");
    for (const int index : lanes) fibres[index].state = State::running;
    any = true;
  }
}

inline bool release_block() {
  bool any = false;
  for (Fibre& fibre : fibres) {
    if (fibre.state == State::at_block_barrier) fibre.state = State::running, any = true;
  }
  return any;
}

// Each warp runs as far as it can before the next one starts: the schedule least like lockstep.
inline void run_block(const std::vector<int>& order) {
  std::vector<std::vector<int>> warps;
  for (const int index : order) {
    const auto same = [&](const std::vector<int>& lanes) { return lanes[0] / 32 == index / 32; };
    const auto warp = std::find_if(warps.begin(), warps.end(), same);
    if (warp == warps.end()) warps.push_back({index});
    else warp->push_back(index);
  }
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    fibre.state = State::running;
    makecontext(&fibre.context, fibre_main, 0);
  }
  do {
    for (const auto& lanes : warps) run_warp(lanes);
  } while (release_block());
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const uint32_t* grid, uint32_t threads, int order_seed, Arguments... arguments) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  fibres.resize(threads);
  body = [=] { kernel(arguments...); };
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
  for (uint32_t z = 0; z < grid[2]; ++z)
    for (uint32_t y = 0; y < grid[1]; ++y)
      for (uint32_t x = 0; x < grid[0]; ++x) {
        blockIdx = {x, y, z};
        run_block(order);
      }
}

// Every lane's value, once all lanes have come; the second barrier keeps it until all have read.
template <typename Read>
auto exchange(uint64_t value, Read read) {
  fibres[current].value = value;
  wait(State::at_warp_barrier);
  const auto result = read(current - current % 32, current % 32);
  wait(State::at_warp_barrier);
  return result;
}

}  // namespace host

inline void __syncthreads() { host::wait(host::State::at_block_barrier); }

inline unsigned int __ballot_sync(unsigned int, bool predicate) {
  return host::exchange(predicate, [](int warp, int) {
    unsigned int votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned int>(host::fibres[warp + lane].value) << lane;
    return votes;
  });
}

inline unsigned long long __shfl_xor_sync(unsigned int, unsigned long long value, int mask) {
  return host::exchange(value, [mask](int warp, int lane) {
    return static_cast<unsigned long long>(host::fibres[warp + (lane ^ mask)].value);
  });
}

inline void atomicOr(unsigned long long* target, unsigned long long value) { *target |= value; }
inline void atomicMax(int* target, int value) { *target = std::max(*target, value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
using std::max;
using std::min;
