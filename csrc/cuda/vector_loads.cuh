// Operand rows in packs of 16 bytes, the most that one load instruction takes, and their products in float32.
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace emc2 {

template <class Element>
constexpr int kPackElements = 16 / static_cast<int>(sizeof(Element));

// Whether every row starts on a pack's border and ends on one.
template <class Element>
inline bool rows_are_packs(const void* rows, int64_t stride, int64_t dim) {
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride % kPackElements<Element> == 0 &&
         dim % kPackElements<Element> == 0;
}

template <class Element>
inline bool rows_are_packs(const Operands& operands) {
  return rows_are_packs<Element>(operands.queries, operands.query_stride, operands.dim) &&
         rows_are_packs<Element>(operands.keys, operands.key_stride, operands.dim);
}

__device__ __forceinline__ uint32_t load_bits(const float* from) { return __float_as_uint(__ldg(from)); }
__device__ __forceinline__ uint32_t load_bits(const Bfloat16* from) { return __ldg(&from->bits); }
__device__ __forceinline__ uint32_t load_bits(const Float16* from) { return __ldg(&from->bits); }

// Elements at .. at + kPackElements - 1 of a row; zeros from `dim` on, where nothing is read.
template <bool kAligned, class Element>
__device__ __forceinline__ uint4 load_pack(const Element* row, int at, int dim) {
  if (kAligned) return at < dim ? __ldg(reinterpret_cast<const uint4*>(row + at)) : make_uint4(0, 0, 0, 0);
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(Element));
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kPackElements<Element>; ++i) {
    if (at + i < dim) words[i / kPerWord] |= load_bits(row + at + i) << (i % kPerWord * 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ float widened(uint32_t half, Float16) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(half)));
  return wide;
#else  // float16's exponent and mantissa in float32's places are a value 2^-112 of the right one
  const uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  const bool finite = (half & 0x7c00u) != 0x7c00u;
  const uint32_t wide = finite ? __float_as_uint(__uint_as_float(magnitude) * 0x1p112f) : magnitude | 0x7f800000u;
  return __uint_as_float(wide | sign);
#endif
}

__device__ __forceinline__ float low_half(uint32_t word, Float16 tag) { return widened(word & 0xffffu, tag); }
__device__ __forceinline__ float high_half(uint32_t word, Float16 tag) { return widened(word >> 16, tag); }
__device__ __forceinline__ float low_half(uint32_t word, Bfloat16) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word, Bfloat16) { return __uint_as_float(word & 0xffff0000u); }

template <class Half>
__device__ __forceinline__ float add_word_product(float sum, uint32_t a, uint32_t b, Half tag) {
  sum = fmaf(low_half(a, tag), low_half(b, tag), sum);
  return fmaf(high_half(a, tag), high_half(b, tag), sum);
}

__device__ __forceinline__ float add_word_product(float sum, uint32_t a, uint32_t b, float) {
  return fmaf(__uint_as_float(a), __uint_as_float(b), sum);
}

template <class Element>
__device__ __forceinline__ float add_product(float sum, const uint4& a, const uint4& b) {
  sum = add_word_product(sum, a.x, b.x, Element{});
  sum = add_word_product(sum, a.y, b.y, Element{});
  sum = add_word_product(sum, a.z, b.z, Element{});
  return add_word_product(sum, a.w, b.w, Element{});
}

// A pack as float32, four at a time.
template <class Half>
__device__ __forceinline__ void store_wide(const uint4& pack, float4* to, Half tag) {
  to[0] = make_float4(low_half(pack.x, tag), high_half(pack.x, tag), low_half(pack.y, tag), high_half(pack.y, tag));
  to[1] = make_float4(low_half(pack.z, tag), high_half(pack.z, tag), low_half(pack.w, tag), high_half(pack.w, tag));
}

__device__ __forceinline__ void store_wide(const uint4& pack, float4* to, float) {
  *to = make_float4(__uint_as_float(pack.x), __uint_as_float(pack.y), __uint_as_float(pack.z), __uint_as_float(pack.w));
}

}  // namespace emc2
