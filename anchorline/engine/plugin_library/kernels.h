// The CUDA driver, found when it is first needed, and our kernels in it. TensorRT calls from many threads, in
// whichever CUDA context is current; a kernel is looked up once for each kind of GPU and stays for the
// life of the process.

#pragma once
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "interface.h"

namespace anchorline {

// TensorRT's own logger is not the same interface in every version, so errors go to stderr.
__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  std::fprintf(stderr, "anchorline plugins: %s\n", text);
}

// The images that the build has laid into the library: a cubin for each architecture, PTX as number 0.
#define IMAGE(source, architecture, file)                                                              \
  asm(".pushsection .rodata\n.balign 64\nanchorline_" #source "_" #architecture ":\n.incbin \"" file   \
      "\"\n.byte 0\n.popsection\n");                                                                   \
  extern "C" const unsigned char anchorline_##source##_##architecture[] __attribute__((visibility("hidden")));
#include "images.inc"
#undef IMAGE

struct Image {
  std::string_view source;
  int architecture;
  const unsigned char* content;
};

inline const Image* find_image(std::string_view source, int architecture) {
  static const Image images[] = {
#define IMAGE(source, architecture, file) {#source, architecture, anchorline_##source##_##architecture},
#include "images.inc"
#undef IMAGE
  };
  const Image* ptx = nullptr;
  for (const Image& image : images) {
    if (image.source != source) continue;
    if (image.architecture == architecture) return &image;
    if (image.architecture == 0) ptx = &image;
  }
  return ptx;
}

struct Grid {
  unsigned x, y, z;
};

class Kernels {
 public:
  // The kernels of the process. Never destroyed, for engines may run until its very end.
  static Kernels& of_process() {
    static Kernels& kernels = *new Kernels;
    return kernels;
  }

  // Load a kernel into the current context, so that its first launch allocates nothing and may be captured.
  bool preload(const char* source, const char* name) {
    void *kernel = find(source, name), *function = nullptr;
    return kernel && succeeded(cuKernelGetFunction(&function, kernel), "loading", name);
  }

  template <typename... Arguments>
  bool launch(const char* source, const char* name, Grid grid, unsigned threads, cudaStream_t stream,
              Arguments... arguments) {
    void* kernel = find(source, name);
    if (!kernel) return false;
    void* addresses[] = {&arguments...};
    // The driver takes a kernel of a library for a function.
    const int code =
        cuLaunchKernel(kernel, grid.x, grid.y, grid.z, threads, 1, 1, 0, stream, addresses, nullptr);
    return succeeded(code, "launching", name);
  }

 private:
  enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 };  // CUdevice_attribute

  Kernels() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) report("the CUDA driver cannot be loaded (%s); install NVIDIA's driver", dlerror());
    usable_ = library && bind(library, "cuGetErrorName", cuGetErrorName) &&
              bind(library, "cuCtxGetDevice", cuCtxGetDevice) &&
              bind(library, "cuDeviceGetAttribute", cuDeviceGetAttribute) &&
              bind(library, "cuLibraryLoadData", cuLibraryLoadData) &&
              bind(library, "cuLibraryGetKernel", cuLibraryGetKernel) &&
              bind(library, "cuKernelGetFunction", cuKernelGetFunction) &&
              bind(library, "cuLaunchKernel", cuLaunchKernel);
  }

  template <typename Function>
  static bool bind(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) report("the CUDA driver has no %s; install one for CUDA 12 or later", name);
    return function != nullptr;
  }

  bool succeeded(int code, const char* doing, const char* what) const {
    const char* name = nullptr;
    if (code != 0) cuGetErrorName(code, &name);
    if (code != 0) report("%s %s failed: %s (%d)", doing, what, name ? name : "unknown error", code);
    return code == 0;
  }

  // The kernel for the current context's GPU; null once the reason is reported.
  void* find(const char* source, const char* name) {
    int device = 0, major = 0, minor = 0;
    if (!usable_ || !succeeded(cuCtxGetDevice(&device), "finding", "the current GPU") ||
        !succeeded(cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device), "asking", "the GPU") ||
        !succeeded(cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device), "asking", "the GPU"))
      return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    const int architecture = 10 * major + minor;
    void*& kernel = kernels_[{architecture, name}];
    if (!kernel) {
      void* library = load(source, architecture);
      if (library && !succeeded(cuLibraryGetKernel(&kernel, library, name), "finding", name)) kernel = nullptr;
    }
    return kernel;
  }

  // The driver compiles PTX for GPUs that came later; it refuses what it cannot use.
  void* load(const char* source, int architecture) {
    void*& library = libraries_[{architecture, source}];
    if (!library) {
      const unsigned char* content = find_image(source, architecture)->content;
      const int code = cuLibraryLoadData(&library, content, nullptr, nullptr, 0, nullptr, nullptr, 0);
      if (!succeeded(code, "loading the kernels of", source)) library = nullptr;
    }
    return library;
  }

  using Name = std::pair<int, std::string_view>;
  std::mutex mutex_;
  std::map<Name, void*> libraries_, kernels_;  // by architecture
  bool usable_ = false;

  int (*cuGetErrorName)(int code, const char** name);
  int (*cuCtxGetDevice)(int* device);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuLibraryLoadData)(void** library, const void* code, int* compiler_options, void** compiler_values,
                           unsigned compiler_count, int* options, void** values, unsigned count);
  int (*cuLibraryGetKernel)(void** kernel, void* library, const char* name);
  int (*cuKernelGetFunction)(void** function, void* kernel);
  int (*cuLaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream,
                        void** arguments, void** extra);
};

}  // namespace anchorline
