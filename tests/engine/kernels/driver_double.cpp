// A libcuda.so.1 for tests of the plugin library: device memory is the heap, and a launch runs the kernel's own
// source on the CPU (cuda_on_host.h). What it is asked to do goes to $DOUBLE_FOLDER: images as they were loaded,
// and a line for each call. $DOUBLE_CAPABILITY is the GPU's (86), $DOUBLE_FAILS a function that fails.

#include <cstring>
#include <fstream>
#include <map>
#include <string>

#include "host_kernels.cpp"

namespace {

enum { OK = 0, NO_BINARY = 209, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

int done(const char* function, const std::string& told = "") {
  std::ofstream(setting("DOUBLE_FOLDER") + "/calls", std::ios::app) << function << " " << told << "\n";
  return setting("DOUBLE_FAILS") == function ? LAUNCH_FAILED : OK;
}

struct Library {
  std::string content;
};

using Run = std::function<void(const uint32_t*, uint32_t, void**)>;

// Calls host_<kernel> with the values that the launch's arguments point to.
template <typename... Arguments, size_t... Places>
Run runner(void (*kernel)(const uint32_t*, uint32_t, int, Arguments...), std::index_sequence<Places...>) {
  return [kernel](const uint32_t* grid, uint32_t threads, void** values) {
    kernel(grid, threads, 0, *static_cast<Arguments*>(values[Places])...);
  };
}

template <typename... Arguments>
Run runner(void (*kernel)(const uint32_t*, uint32_t, int, Arguments...)) {
  return runner(kernel, std::index_sequence_for<Arguments...>());
}

std::map<std::string, Run> kernels = {
    {"nms_overlaps", runner(host_nms_overlaps)}, {"nms_select", runner(host_nms_select)},
    {"nms_small", runner(host_nms_small)},       {"roi_pool_f32", runner(host_roi_pool_f32)},
    {"roi_pool_f16", runner(host_roi_pool_f16)},
};

}  // namespace

extern "C" {

int cuGetErrorName(int code, const char** name) {
  *name = code == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OF_THE_DOUBLE";
  return OK;
}
int cuInit(unsigned) { return OK; }
int cuDeviceGet(int* device, int) { return *device = 0, OK; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &kernels, OK; }
int cuCtxSetCurrent(void*) { return OK; }
int cuCtxGetDevice(int* device) { return *device = 0, done("cuCtxGetDevice"); }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = std::stoi(setting("DOUBLE_CAPABILITY"));
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : -1;
  return OK;
}
int cuMemAlloc_v2(void** address, size_t size) { return *address = std::malloc(size), OK; }
int cuMemFree_v2(void* address) { return std::free(address), OK; }
int cuMemcpyHtoD_v2(void* to, const void* from, size_t size) { return std::memcpy(to, from, size), OK; }
int cuMemcpyDtoH_v2(void* to, const void* from, size_t size) { return std::memcpy(to, from, size), OK; }
int cuStreamCreate(void** stream, unsigned) { return *stream = &kernels, OK; }
int cuStreamSynchronize(void*) { return OK; }

int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned options, int*, void**, unsigned more) {
  const char* text = static_cast<const char*>(code);
  size_t size = std::strlen(text);
  if (!std::memcmp(text, "\177ELF", 4)) {  // a cubin ends with the table of its sections, or of its segments
    uint64_t sections, segments;
    uint16_t counts[6];  // of the header's end: sizes and numbers of entries
    std::memcpy(&segments, text + 32, 8);
    std::memcpy(&sections, text + 40, 8);
    std::memcpy(counts, text + 52, 12);
    size = std::max(sections + counts[3] * counts[4], segments + counts[1] * counts[2]);
  }
  auto* loaded = new Library{std::string(text, size)};
  *library = loaded;
  static int number = 0;
  const std::string file = setting("DOUBLE_FOLDER") + "/image." + std::to_string(number++);
  std::ofstream(file, std::ios::binary) << loaded->content;
  return options || more ? NO_BINARY : done("cuLibraryLoadData");
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  const auto found = kernels.find(name);
  const std::string& content = static_cast<Library*>(library)->content;
  if (found == kernels.end() || content.find(name) == std::string::npos) return NOT_FOUND;
  *kernel = &*found;
  return done("cuLibraryGetKernel", name);
}
int cuKernelGetFunction(void** function, void* kernel) {
  *function = kernel;
  return done("cuKernelGetFunction", static_cast<decltype(kernels)::value_type*>(kernel)->first);
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** arguments, void** extra) {
  const auto& [name, run] = *static_cast<decltype(kernels)::value_type*>(function);
  if (block_y != 1 || block_z != 1 || shared || extra || stream != &kernels) return LAUNCH_FAILED;
  const uint32_t grid[] = {x, y, z};
  std::string told = name;
  for (const uint32_t side : {x, y, z, threads}) told += " " + std::to_string(side);
  const int code = done("cuLaunchKernel", told);
  if (code == OK) run(grid, threads, arguments);
  return code;
}

}  // extern "C"
