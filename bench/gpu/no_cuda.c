// What a launch asks of libcuda.so.1, answered without a GPU: Triton's own launcher runs to its end, and what it would
// have given the driver is kept to be looked at (bench/gpu/host.py).
#include <stdint.h>
#include <string.h>

enum { MOST_PARAMETERS = 128 };

// Read and set by name, through ctypes.
uint64_t launches = 0;
uint64_t pointer_queries = 0;
int sizes[MOST_PARAMETERS];  // bytes of each of a launch's parameters that is to be kept, up to the first 0
uint64_t parameters[MOST_PARAMETERS];

int cuLaunchKernelEx(const void *config, void *function, void **given, void **extra) {
  (void)config, (void)function, (void)extra;
  for (int i = 0; i < MOST_PARAMETERS && sizes[i] != 0; ++i) {
    parameters[i] = 0;
    memcpy(&parameters[i], given[i], (size_t)sizes[i]);
  }
  ++launches;
  return 0;
}

int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  (void)attribute;
  memcpy(data, &pointer, sizeof pointer);
  ++pointer_queries;
  return 0;
}

int cuCtxGetCurrent(void **context) {
  static int any;
  *context = &any;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  (void)error;
  *text = "no CUDA";
  return 0;
}
