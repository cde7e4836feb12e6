// Exact draws from the softmax of each row's scores: argmax of score + Gumbel noise, several samples in one pass over
// the scores, each tile of them while it is in the cache.
#pragma once

#include "../params.h"

namespace emc2 {

constexpr int64_t kMaxSamples = (int64_t{1} << 16) - 1;  // the counter has 16 bits for their numbers

// There may be no rows, or no keys. Throws std::invalid_argument for values that are not legal, before anything is
// written.
void sample_gumbel(const GumbelParams& params);

}  // namespace emc2
