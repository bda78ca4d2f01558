// A driver library for tests: just enough of libcuda for the real cuda-bindings to load it and to hand their
// arguments through. Device memory is the heap, work is done at once, and launch() tells the last kernel's
// arguments. It proves that the calls of the runtime are calls that cuda-bindings accept.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };
typedef uintptr_t Handle;
typedef struct { int64_t grid[3], block[3], stream, ints[12]; double doubles[12]; } Launch;

static Handle current = 0, next_handle = 100;
static int alive = 0, capturing = 0;
static Launch last;

int stub_alive(void) { return alive; }  // handles and blocks that were not given back
Launch *stub_last_launch(void) { return &last; }

static int make(Handle *handle) { return *handle = ++next_handle, ++alive, OK; }
static int drop(Handle handle) { return handle ? (--alive, OK) : INVALID_VALUE; }

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { return *version = 13000, OK; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? 101 : OK; }
int cuDeviceGetName(char *name, int length, int device) { return strncpy(name, "Stub", length), OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = attribute == 75 ? 8 : 6, OK; }
int cuDevicePrimaryCtxRetain(Handle *context, int device) { return *context = 7, ++alive, OK; }
int cuDevicePrimaryCtxRelease(int device) { return --alive, OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return --alive, OK; }
int cuCtxGetDevice(int *device) { return *device = 0, OK; }
int cuCtxGetCurrent(Handle *context) { return *context = current, OK; }
int cuCtxSetCurrent(Handle context) { return current = context, OK; }
int cuCtxPushCurrent(Handle context) { return current = context, OK; }
int cuCtxPopCurrent(Handle *context) { return *context = current, current = 0, OK; }
int cuGetErrorString(int code, const char **text) { return *text = "a text of the stub", OK; }
int cuGetErrorName(int code, const char **text) { return *text = "A_NAME", OK; }

int cuMemAlloc(Handle *address, size_t size) {
  if (size > 1u << 30) return OUT_OF_MEMORY;
  return *address = (Handle)malloc(size), ++alive, OK;
}
int cuMemFree(Handle address) { return free((void *)address), --alive, OK; }
int cuMemGetInfo(size_t *available, size_t *total) { return *available = 3 << 20, *total = 1u << 30, OK; }
int cuMemHostAlloc(void **block, size_t size, unsigned flags) { return *block = malloc(size), ++alive, OK; }
int cuMemFreeHost(void *block) { return free(block), --alive, OK; }
int cuMemcpyHtoDAsync(Handle to, const void *from, size_t size, Handle stream) {
  return memcpy((void *)to, from, size), OK;
}
int cuMemcpyDtoHAsync(void *to, Handle from, size_t size, Handle stream) {
  return memcpy(to, (void *)from, size), OK;
}
int cuPointerGetAttributes(unsigned count, int *attributes, void **data, Handle address) {
  if (count != 2 || attributes[0] != 2 || attributes[1] != 9) return INVALID_VALUE;  // memory type, device ordinal
  *(unsigned *)data[0] = address == 12345 ? 0 : address == 54322 ? 1 : 2;
  *(int *)data[1] = address == 54321 || address == 54322 ? 3 : 0;
  return OK;
}

int cuStreamCreate(Handle *stream, unsigned flags) { return flags == 1 ? make(stream) : INVALID_VALUE; }
int cuStreamDestroy(Handle stream) { return drop(stream); }
int cuStreamSynchronize(Handle stream) { return capturing ? 900 : OK; }
int cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) { return stream && event ? OK : INVALID_VALUE; }
int cuEventCreate(Handle *event, unsigned flags) { return make(event); }
int cuEventDestroy(Handle event) { return drop(event); }
int cuEventRecord(Handle event, Handle stream) { return event && stream ? OK : INVALID_VALUE; }
int cuEventElapsedTime(float *milliseconds, Handle start, Handle end) { return *milliseconds = 2.5f, OK; }

int cuStreamBeginCapture(Handle stream, int mode) { return capturing = mode == 1, capturing ? OK : INVALID_VALUE; }
int cuStreamEndCapture(Handle stream, Handle *graph) {
  if (!capturing) return INVALID_VALUE;
  return capturing = 0, make(graph);
}
int cuGraphInstantiateWithFlags(Handle *executable, Handle graph, unsigned long long flags) { return make(executable); }
int cuGraphDestroy(Handle graph) { return drop(graph); }
int cuGraphExecDestroy(Handle executable) { return drop(executable); }
int cuGraphLaunch(Handle executable, Handle stream) { return executable && stream ? OK : INVALID_VALUE; }

int cuLibraryLoadData(Handle *library, const void *code, int *options, void **values, unsigned count, int *more,
                      void **more_values, unsigned more_count) {
  return memcmp(code, "\177ELF", 4) || count || more_count ? 200 : make(library);
}
int cuLibraryUnload(Handle library) { return drop(library); }
int cuLibraryGetKernel(Handle *kernel, Handle library, const char *name) {
  return *kernel = 55, strcmp(name, "bgr_to_uint8") ? 500 : OK;
}
int cuKernelGetFunction(Handle *function, Handle kernel) { return *function = kernel + 1, OK; }
int cuLaunchKernel(Handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, Handle stream, void **arguments, void **extra) {
  if (function != 56 || shared || extra) return INVALID_VALUE;
  const int sizes[12] = {8, 8, 8, 4, 4, 8, 4, 8, 4, 4, 0, 0};  // of bgr_to_uint8; 0 is a double
  memset(&last, 0, sizeof last);
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  for (int i = 0; i < 3; ++i) last.grid[i] = grid[i], last.block[i] = block[i];
  last.stream = (int64_t)stream;
  for (int i = 0; i < 12; ++i) {
    if (sizes[i] == 8) last.ints[i] = *(int64_t *)arguments[i];
    if (sizes[i] == 4) last.ints[i] = *(int32_t *)arguments[i];
    if (sizes[i] == 0) last.doubles[i] = *(double *)arguments[i];
  }
  return OK;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  static void *self = NULL;
  Dl_info here;
  if (!self && dladdr((void *)&cuGetProcAddress_v2, &here)) self = dlopen(here.dli_fname, RTLD_LAZY);
  *function = dlsym(self, name);
  if (!strcmp(name, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : 500;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
