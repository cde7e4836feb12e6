// The instructions that only sm_90a has, one function each: barriers in shared memory, tensor copies (TMA), products of a
// warpgroup (wgmma), clusters. tests/cpp/hopper_emulator.h has the same functions for a CPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../params.h"

namespace emc2::hopper {

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kAvailable = false;  // the code being compiled is for another architecture
#else
constexpr bool kAvailable = true;
#endif

// Of a kernel's dynamic shared memory, the same in all blocks: what one of a cluster addresses in another.
template <class Layout>
__device__ __forceinline__ Layout& shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Layout*>(bytes);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Registers: moved between warpgroups, after which the compiler's allocation for each holds.

template <int kCount>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Clusters.

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; what they wrote before is seen after.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- Barriers: a phase is over when `count` arrivals and all announced bytes have come.

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier& barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

// Before other blocks of the cluster, and the unit that copies, may use what was initialised.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// At the barrier in this place of the shared memory of block `rank` of the cluster. Of a thread that has only read:
// what it wrote the other block need not see, which would cost a fence of the whole GPU.
__device__ __forceinline__ void arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity is over: 0, then 1, and so on. Before the first phase, parity 1 does not wait.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// ---- Tensor copies: a box of a matrix into shared memory, whose bytes are told to a barrier. Rows of 128 bytes, of
// which eight are an atom; inside it the place of each 16 bytes is exchanged (CU_TENSOR_MAP_SWIZZLE_128B), as the
// products expect it. Zeros where the box is outside of the matrix.

using TensorMap = CUtensorMap;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// Into the same place of the blocks in `ranks`, a bit each, and told to the barrier in the same place of each.
__device__ __forceinline__ void copy_box_to(uint16_t ranks, void* to, const TensorMap& map, int column, int segment,
                                            int step, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(segment), "r"(step), "r"(shared_address(&barrier)), "h"(ranks)
      : "memory");
}

// ---- Products of a warpgroup: sums += 64 rows x 16 columns of one matrix times 128 rows x 16 columns of another, both
// in shared memory as copy_box leaves them. Thread t has rows 16 (t / 32) + t % 32 / 4 (sums 4 i and 4 i + 1) and the
// eighth after (4 i + 2, 4 i + 3), columns 8 i + 2 (t % 4) and the next.

// Between other uses of the sums and the first of products; and, of the compiler, after the last.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

template <int kCount>
__device__ __forceinline__ void fence_sums(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most this many of the warp's groups of products are under way.
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

#define EMC2_SUMS_8(s, i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), \
                          "+f"(s[i + 6]), "+f"(s[i + 7])
#define EMC2_MULTIPLY(type)                                                                                   \
  asm volatile(                                                                                               \
      "{\n.reg .pred add;\n"                                                                                  \
      "setp.ne.b32 add, %66, 0;\n"                                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                        \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                     \
      "%64, %65, add, 1, 1, 0, 0;\n}"                                                                         \
      : EMC2_SUMS_8(sums, 0), EMC2_SUMS_8(sums, 8), EMC2_SUMS_8(sums, 16), EMC2_SUMS_8(sums, 24),             \
        EMC2_SUMS_8(sums, 32), EMC2_SUMS_8(sums, 40), EMC2_SUMS_8(sums, 48), EMC2_SUMS_8(sums, 56)            \
      : "l"(rows), "l"(columns), "r"(static_cast<int>(add)))

// `add`: whether the sums so far count.
__device__ __forceinline__ void multiply(float (&sums)[64], uint64_t rows, uint64_t columns, bool add, Bfloat16) {
  EMC2_MULTIPLY("bf16");
}
__device__ __forceinline__ void multiply(float (&sums)[64], uint64_t rows, uint64_t columns, bool add, Float16) {
  EMC2_MULTIPLY("f16");
}
#undef EMC2_MULTIPLY
#undef EMC2_SUMS_8

// ---- The host's side.

// A matrix of two-byte elements as copies see it; sizes and strides from the innermost dimension out, strides in bytes.
// Returns what went wrong, or null.
template <int kDims>
inline const char* encode(TensorMap& map, const void* matrix, Dtype dtype, const uint64_t (&sizes)[kDims],
                          const uint64_t (&strides)[kDims - 1], const uint32_t (&box)[kDims]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  if (!found) return "the driver has no tensor copies: CUDA 12 or later is needed";
  uint32_t steps[kDims];
  for (uint32_t& step : steps) step = 1;
  const CUresult made = reinterpret_cast<Encode>(found)(
      &map, dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kDims,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? nullptr : "the driver refused to describe an operand for tensor copies";
}

}  // namespace emc2::hopper
