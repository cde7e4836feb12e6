// Runs the kernels of csrc/cuda on the CPU, compiled by g++: each CUDA thread is a fiber, blocks run one after another.
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

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 1 << 18;

struct Fiber {
  dim3 thread;
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
  std::vector<Meeting> warps;
  Meeting barrier;
  dim3 index;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  ucontext_t scheduler_entry;
  std::string error;
  uint64_t progress = 0;
  void (*run)(void*) = nullptr;
  void* argument = nullptr;
};

inline Block block;
inline std::string last_error;
inline int launches = 0, device = 0;

[[noreturn]] inline void leave() { _longjmp(block.scheduler, 1); }

inline void yield() {
  if (_setjmp(block.current->point) == 0) leave();
}

[[noreturn]] inline void fail(const std::string& what) {
  if (block.error.empty()) block.error = what;
  block.current->done = true;
  leave();
}

// The generation that the caller took part in; returns when all have come.
inline uint64_t meet(Meeting& meeting, const char* kind) {
  if (meeting.arrived > 0 && meeting.kind != kind) {
    fail(std::string("threads meet at ") + kind + " and at " + meeting.kind);
  }
  meeting.kind = kind;
  const uint64_t generation = meeting.generation;
  ++block.progress;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    while (meeting.generation == generation) yield();
  }
  return generation;
}

inline int lane() { return static_cast<int>(block.current->thread.x) % kWarp; }
inline Meeting& warp() { return block.warps[block.current->thread.x / kWarp]; }

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
  block.run(block.argument);
  block.current->done = true;
  ++block.progress;
  leave();
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.point, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, enter, 0);
  setcontext(&fiber.entry);
}

inline void run_block(int threads, bool backwards) {
  while (static_cast<int>(block.fibers.size()) < threads) block.fibers.emplace_back();
  block.warps.assign(threads / kWarp, Meeting{});
  for (Meeting& meeting : block.warps) meeting.expected = kWarp;
  block.barrier = Meeting{};
  block.barrier.expected = threads;
  for (int i = 0; i < threads; ++i) {
    block.fibers[i].thread.x = static_cast<unsigned>(i);
    block.fibers[i].started = block.fibers[i].done = false;
  }
  for (int left = threads; left > 0 && block.error.empty();) {
    const uint64_t before = block.progress;
    left = 0;
    for (int i = 0; i < threads && block.error.empty(); ++i) {
      Fiber& fiber = block.fibers[backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      resume(fiber);
      left += !fiber.done;
    }
    if (left > 0 && block.progress == before) block.error = "threads wait for others that have ended or wait elsewhere";
  }
}

}  // namespace emulator

#define threadIdx (emulator::block.current->thread)
#define blockIdx (emulator::block.index)

inline void __syncthreads() { emulator::meet(emulator::block.barrier, "__syncthreads"); }
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
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return emulator::device = device, cudaSuccess; }
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error.c_str(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  auto call = [&] { kernel(arguments...); };
  emulator::Block& block = emulator::block;
  block.run = [](void* argument) { (*static_cast<decltype(call)*>(argument))(); };
  block.argument = &call;
  block.error.clear();
  const bool backwards = emulator::launches++ % 2 == 1;
  for (unsigned x = 0; x < config->gridDim.x && block.error.empty(); ++x) {
    block.index.x = x;
    emulator::run_block(static_cast<int>(config->blockDim.x), backwards);
  }
  emulator::last_error = block.error;
  return block.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
