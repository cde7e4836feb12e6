// Runs the kernels of csrc/cuda on the CPU, compiled by g++: each CUDA thread is a fiber, clusters of blocks run one after
// another. What only Hopper's kernel uses is in hopper_emulator.h.
//
// tests/backends/test_cuda.py puts this header in the place of <cuda_runtime.h>. What it is strict about: all 32 lanes
// of a warp must meet at the same kind of shuffle, all threads of a block at a barrier, 16-byte loads must be aligned,
// and from launch to launch the threads run in another order, so that what a missing barrier would leave to chance
// comes out differently. What it cannot show: registers, timing, the approximate logarithm, and the memory model.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr size_t kStackBytes = 1 << 18;

struct Block;

struct Fiber {
  dim3 thread;
  Block* block = nullptr;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t entry;
  jmp_buf point;
  bool started = false, done = false;
};

// Where threads wait for each other. The values of one exchange stay readable during the next.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  const char* kind = nullptr;
  uint64_t values[2][kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, warpgroups;
  Meeting barrier;
  dim3 index;
  std::unique_ptr<char[]> memory;  // dynamic shared memory, with room to begin at a multiple of 1,024
  char* shared = nullptr;
};

inline std::vector<std::unique_ptr<Block>> cluster;  // the blocks that run now
inline Meeting cluster_barrier;
inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline std::string error;
inline uint64_t progress = 0;
inline void (*run)(void*) = nullptr;
inline void* argument = nullptr;
inline dim3 grid;
inline std::string last_error;
inline int launches = 0, device = -1;  // as torch says of a tensor on the CPU
inline bool has_context = false;  // bound to the thread; to be on the safe side, each launch is from another thread
inline bool late = false;   // whether what need not happen at once happens as late as it may

inline Block& block() { return *current->block; }

[[noreturn]] inline void leave() { _longjmp(scheduler, 1); }

inline void yield() {
  if (_setjmp(current->point) == 0) leave();
}

[[noreturn]] inline void fail(const std::string& what) {
  if (error.empty()) error = what;
  current->done = true;
  leave();
}

// The generation that the caller took part in; returns when all have come.
inline uint64_t meet(Meeting& meeting, const char* kind) {
  if (meeting.arrived > 0 && meeting.kind != kind) {
    fail(std::string("threads meet at ") + kind + " and at " + meeting.kind);
  }
  meeting.kind = kind;
  const uint64_t generation = meeting.generation;
  ++progress;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    while (meeting.generation == generation) yield();
  }
  return generation;
}

inline int lane() { return static_cast<int>(current->thread.x) % kWarp; }
inline Meeting& warp() { return block().warps[current->thread.x / kWarp]; }

// Each lane's value, where it can be read until the lane takes part in the exchange after the next.
template <class Value>
const uint64_t* exchange(unsigned mask, Value value, const char* kind) {
  static_assert(sizeof(Value) <= 8, "a shuffle moves at most 8 bytes");
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  Meeting& all = warp();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  all.values[all.generation % 2][lane()] = bits;
  return all.values[meet(all, kind) % 2];
}

template <class Value>
Value shuffled(unsigned mask, Value value, int source, bool inside, const char* kind) {
  const uint64_t bits = exchange(mask, value, kind)[inside ? source : lane()];
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void enter() {
  run(argument);
  current->done = true;
  ++progress;
  leave();
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, enter, 0);
  setcontext(&fiber.entry);
}

inline void prepare(Block& block, int threads, size_t shared_bytes) {
  while (static_cast<int>(block.fibers.size()) < threads) block.fibers.emplace_back();
  block.warps.assign(threads / kWarp, Meeting{});
  for (Meeting& meeting : block.warps) meeting.expected = kWarp;
  block.warpgroups.assign(threads / kWarpgroup, Meeting{});
  for (Meeting& meeting : block.warpgroups) meeting.expected = kWarpgroup;
  block.barrier = Meeting{};
  block.barrier.expected = threads;
  constexpr size_t kAlignment = 1024;
  block.memory.reset(new char[shared_bytes + kAlignment]);
  std::memset(block.memory.get(), 0xff, shared_bytes + kAlignment);  // of halves, NaN: what nobody has written shows
  block.shared = block.memory.get() + kAlignment - reinterpret_cast<uintptr_t>(block.memory.get()) % kAlignment;
  for (int i = 0; i < threads; ++i) {
    block.fibers[i].thread.x = static_cast<unsigned>(i);
    block.fibers[i].block = &block;
    block.fibers[i].started = block.fibers[i].done = false;
  }
}

// A turn of each of a block's threads; where things happen late, turns until none gets on. How many have not ended.
inline int run_threads(Block& block, int threads, bool backwards) {
  int left;
  uint64_t before;
  do {
    before = progress;
    left = 0;
    for (int i = 0; i < threads && error.empty(); ++i) {
      Fiber& fiber = block.fibers[backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      left += !fiber.done;
    }
  } while (late && left > 0 && progress != before && error.empty());
  return left;
}

inline void run_cluster(int first, int blocks, int threads, size_t shared_bytes, bool backwards) {
  while (static_cast<int>(cluster.size()) < blocks) cluster.emplace_back(new Block);
  cluster_barrier = Meeting{};
  cluster_barrier.expected = blocks * threads;
  for (int i = 0; i < blocks; ++i) {
    prepare(*cluster[i], threads, shared_bytes);
    cluster[i]->index.x = static_cast<unsigned>(first + i);
  }
  for (int left = blocks * threads; left > 0 && error.empty();) {
    const uint64_t before = progress;
    left = 0;
    for (int i = 0; i < blocks && error.empty(); ++i) {
      left += run_threads(*cluster[backwards ? blocks - 1 - i : i], threads, backwards);
    }
    if (left > 0 && progress == before) error = "threads wait for others that have ended or wait elsewhere";
  }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block().index)
inline dim3& gridDim = emulator::grid;

inline void __syncwarp() { emulator::meet(emulator::warp(), "__syncwarp"); }
inline void __syncthreads() { emulator::meet(emulator::block().barrier, "__syncthreads"); }
#define __assert_fail(assertion, ...) emulator::fail(assertion)

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  const int first = emulator::lane() / width * width;
  return emulator::shuffled(mask, value, first + (source & (width - 1)), true, "__shfl_sync");
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
  const int source = emulator::lane() - distance;
  return emulator::shuffled(mask, value, source, source >= 0, "__shfl_up_sync");
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int bits) {
  return emulator::shuffled(mask, value, emulator::lane() ^ bits, true, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* votes = emulator::exchange(mask, vote, "__ballot_sync");
  unsigned ballot = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) ballot |= static_cast<unsigned>(votes[lane] != 0) << lane;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

template <class Value>
Value __ldg(const Value* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Value) != 0) emulator::fail("a load is not aligned");
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __logf(float x) { return std::log(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  emulator::device = device;
  emulator::has_context = true;
  return cudaSuccess;
}
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
// As the environment says, at each call.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto number = [](const char* name, int usual) {
    const char* const asked = std::getenv(name);
    return asked ? std::atoi(asked) : usual;
  };
  const int capability = number("EMC2_EMULATED_CAPABILITY", 90);
  *value = attribute == cudaDevAttrMultiProcessorCount      ? number("EMC2_EMULATED_PROCESSORS", 2)
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
                                                            : capability % 10;
  return cudaSuccess;
}
// Dynamic shared memory beyond what Ampere has is for Hopper.
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  int major;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  if (bytes > (99 << 10) && major < 9) emulator::last_error = "so much shared memory there is not";
  return bytes > (99 << 10) && major < 9 ? cudaErrorLaunchFailure : cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error.c_str(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::run = [](void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  emulator::argument = &call;
  emulator::error.clear();
  emulator::grid = config->gridDim;
  const int mode = emulator::launches++ % 4;
  emulator::late = mode / 2 == 1;
  const unsigned blocks = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  for (unsigned x = 0; x < config->gridDim.x && emulator::error.empty(); x += blocks) {
    emulator::run_cluster(static_cast<int>(x), static_cast<int>(blocks), static_cast<int>(config->blockDim.x),
                          config->dynamicSmemBytes, mode % 2 == 1);
  }
  emulator::has_context = false;
  emulator::last_error = emulator::error;
  return emulator::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
