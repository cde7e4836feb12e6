// Putting a kernel on a stream of a device that need not be the current one.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "kernels.h"

namespace emc2 {

// Makes a device current and, at the end, the one that was.
class DeviceScope {
 public:
  // `binds`: also where it is current already. From CUDA 12 on that gives a thread which has not used the device its
  // context, which functions of the driver look for, and do not make as those of the runtime do.
  explicit DeviceScope(int device, bool binds = false) : device_(device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && (binds || before_ != device_)) error_ = cudaSetDevice(device_);
  }
  ~DeviceScope() {
    if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int device_, before_ = 0;
  cudaError_t error_;
};

// The kernels count the elements of a row in 32 bits.
inline const char* why_unsupported(const Operands& operands) {
  return operands.dim < (1 << 30) ? nullptr : "queries and keys must have fewer than 2^30 elements in a row";
}

// `first`: number of the proposal in the first batch's lane 0, which may lie before the shard.
inline SampleClock sample_clock(const Schedule& schedule, int64_t first, int64_t batch) {
  const int64_t kept = schedule.total_proposals - schedule.burn_in, samples = schedule.num_samples;
  if (kept <= 0) return {};
  const int64_t progress = (first - schedule.burn_in) * samples;
  const int64_t done = progress >= 0 ? progress / kept : -((-progress + kept - 1) / kept);  // rounded down
  const int64_t end = schedule.end_proposal();
  return {kept,
          schedule.num_proposals > 0 ? end : 0,  // or a batch of nothing would be walked, with no key to score
          schedule.count_samples(schedule.first_proposal),
          schedule.count_samples(end),
          done,
          progress - done * kept,
          batch * samples / kept,
          batch * samples % kept};
}

template <class... Parameters>
const void* kernel_pointer(void (*kernel)(Parameters...)) {
  return reinterpret_cast<const void*>(kernel);
}

// CUDA loads a kernel when it is first asked for, which a stream that is being captured may not allow.
// `shared_bytes`: of dynamic shared memory.
inline const char* load(std::initializer_list<const void*> kernels, int device, size_t shared_bytes = 0) {
  const DeviceScope scope(device);
  cudaError_t error = scope.error();
  cudaFuncAttributes attributes;
  for (const void* kernel : kernels) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess && shared_bytes > 0) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct Extent {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;  // dynamic
  int cluster = 1;          // blocks
};

template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), Extent extent, LaunchTarget target,
                   const Parameters&... arguments) {
  if (extent.blocks == 0) return nullptr;
  if (extent.blocks > INT32_MAX) return "queries have more rows than one launch can take";
  const DeviceScope scope(target.device);
  cudaError_t error = scope.error();
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(extent.blocks));
    config.blockDim = dim3(static_cast<unsigned>(extent.threads));
    config.dynamicSmemBytes = extent.shared_bytes;
    config.stream = static_cast<cudaStream_t>(target.stream);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(extent.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = extent.cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, so the next launch does not report it again
  return cudaGetErrorString(error);
}

}  // namespace emc2
