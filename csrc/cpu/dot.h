// Dot products of a float32 row with a float32, bfloat16 or float16 row, accumulated in float32.
#pragma once

#include <algorithm>

#include "../params.h"
#include "simd.h"

namespace emc2 {

typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

EMC2_HD Words widened(const void* from) {
  HalfWords halves;
  std::memcpy(&halves, from, sizeof halves);
#if defined(__aarch64__)
  return (Words)vmovl_u16((uint16x4_t)halves);  // one instruction, which GCC 12 does not find
#else
  return __builtin_convertvector(halves, Words);
#endif
}

EMC2_HD Floats load_floats(const float* from) { return load<Floats>(from); }

EMC2_HD Floats load_floats(const Bfloat16* from) { return (Floats)(widened(from) << 16); }

// Shifting float16's exponent and mantissa into float32's places leaves a value 2^-112 of the right one, subnormals
// included.
EMC2_HD Floats load_floats(const Float16* from) {
  const Words half = widened(from);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  const Words not_finite = magnitude | 0x7f800000u;
  return (Floats)(((half & 0x7c00u) == 0x7c00u ? not_finite : finite) | (half & 0x8000u) << 16);
}

EMC2_HD float lane_sum(Floats lanes) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// The first kLanes of `left` elements; zeros past the end.
template <class Element>
EMC2_HD Floats load_floats(const Element* from, int64_t left) {
  if (left >= kLanes) return load_floats(from);
  Element padded[kLanes] = {};
  std::copy(from, from + left, padded);
  return load_floats(padded);
}

EMC2_HD int64_t padded_to_lanes(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// A row as float32, followed by zeros up to a multiple of the lanes.
template <class Element>
EMC2_HD void load_row(const Element* from, int64_t dim, float* to) {
  for (int64_t i = 0; i < dim; i += kLanes) store(to + i, load_floats(from + i, dim - i));
}

// `query` as load_row leaves it. Four sums, because one would wait for its own last addition.
template <class Element>
EMC2_HD float dot(const float* query, const Element* key, int64_t dim) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    EMC2_UNROLL
    for (int s = 0; s < 4; ++s) sums[s] += load<Floats>(query + i + s * kLanes) * load_floats(key + i + s * kLanes);
  }
  for (; i + kLanes <= dim; i += kLanes) sums[0] += load<Floats>(query + i) * load_floats(key + i);
  if (i < dim) sums[1] += load<Floats>(query + i) * load_floats(key + i, dim - i);
  return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace emc2
