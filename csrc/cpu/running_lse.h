// Log-sum-exp of scores that come tile by tile, one row a lane: the largest score of a tile first, so that each score
// needs one exponential.
#pragma once

#include <cmath>

#include "simd.h"

namespace emc2 {

struct RunningLse {
  Floats largest = all_floats(-kInfinity), sum{};  // sum of exp(score - largest)

  // `scores` of `count` keys, `stride` vectors apart; -inf: left out.
  EMC2_HD void add(const Floats* scores, int64_t count, int stride) {
    Floats maximum = largest;
    for (int64_t i = 0; i < count; ++i) maximum = scores[i * stride] > maximum ? scores[i * stride] : maximum;
    const Floats shift = maximum > -kInfinity ? maximum : all_floats(0.0f);
    Floats part{};  // added to the sum once, which would round each of its small terms
    for (int64_t i = 0; i < count; ++i) part += exp_nonpositive(scores[i * stride] - shift);
    sum = sum * exp_nonpositive(largest - shift) + part;
    largest = maximum;
  }

  float value(int lane) const { return largest[lane] + std::log(sum[lane]); }
};

}  // namespace emc2
