// The draws of one chain in a warp: a lane calls the generator for one block, and shuffles hand its words out.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cmath>

#include "../philox.h"
#include "kernels.h"

namespace emc2 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

// The same value, but what follows from it is computed where it is needed: a loop that waits for memory has time for
// that, and not the registers to keep it.
template <class Value>
__device__ __forceinline__ Value recomputed(Value value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

__device__ __forceinline__ float recomputed(float value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(value));
#endif
  return value;
}

struct ChainDraws {
  PhiloxKey key;
  uint32_t step;
  uint64_t chain;

  __device__ __forceinline__ ChainDraws(const StreamParams& streams, int64_t row)
      : key(philox_key(streams.seed_value())), step(streams.step_value()), chain(streams.chain(row)) {}

  // Otherwise the compiler takes the keys of all rounds, 14 registers, out of the caller's loop.
  __device__ __forceinline__ void forget_round_keys() { key = {recomputed(key.k0), recomputed(key.k1)}; }

  __device__ __forceinline__ PhiloxBlock<uint32_t> block(Stream stream, int64_t number) const {
    return philox_rounds(philox_counter(chain, stream, step, static_cast<uint32_t>(number)), key);
  }
};

// Word 0 .. 3 of the block that lane `source` holds.
__device__ __forceinline__ uint32_t shuffle_word(const PhiloxBlock<uint32_t>& mine, int source, int word) {
  const uint32_t c0 = __shfl_sync(kAllLanes, mine.c0, source), c1 = __shfl_sync(kAllLanes, mine.c1, source),
                 c2 = __shfl_sync(kAllLanes, mine.c2, source), c3 = __shfl_sync(kAllLanes, mine.c3, source);
  const uint32_t even = word & 2 ? c2 : c0, odd = word & 2 ? c3 : c1;
  return word & 1 ? odd : even;
}

// E = -log u. Between 1 and 2 a float's mantissa counts in steps of 2^-23, so u needs no conversion, and the
// subtraction is exact. The logarithm is lg2.approx, whose absolute error is at most 2^-22, so E is off by at
// most 1.7e-7 + its own rounding: less than the rounding of a score at temperature 0.07. Near u = 1 it may come out
// below 0, which would break threshold >= score.
__device__ __forceinline__ float exponential(uint32_t word) {
  const float u = __uint_as_float(word >> 9 | 0x3f800000u) - (1.0f - 0x1p-24f);
#if defined(__CUDA_ARCH__)
  float log2_u;  // by hand, because __logf spends three instructions on denormal numbers
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_u) : "f"(u));
#else
  const float log2_u = std::log2(u);
#endif
  return fmaxf(-0.6931471805599453f * log2_u, 0.0f);
}

// Values of a row that nobody has looked at on the host. At the end of a walk, because before that a call would have
// its registers spilled.
__device__ __forceinline__ void refuse_bad_row(const WalkParams& walk, int64_t row) {
#if !defined(EMC2_NO_DEVICE_ASSERTIONS)
  if (walk.chain_ids && static_cast<uint64_t>(walk.chain_ids[row]) >> 40 != 0) {
    __assert_fail("emc2_kernels: chain_ids (or query_ids) must be in [0, 2^40), got one outside", "warp_draws.cuh",
                  __LINE__, "refuse_bad_row");
  }
  const float temperature = walk.temperatures ? walk.row_temperature(row) : 1.0f;  // one number Python has seen
  if (!(temperature >= 0x1p-120f && temperature <= 0x1p100f)) {
    __assert_fail("emc2_kernels: temperature must be in [2^-120, 2^100], got another", "warp_draws.cuh", __LINE__,
                  "refuse_bad_row");
  }
#endif
}

}  // namespace emc2
