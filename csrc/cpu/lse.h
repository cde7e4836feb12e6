// Log-sum-exp of each row's scores, and its gradient: the scores are made again, nothing of size (rows, keys) is kept.
#pragma once

#include "../params.h"

namespace emc2 {

// There may be no rows, or no keys. Throws std::invalid_argument for temperatures that are not legal.
void contrastive_lse(const LseParams& params);

// A key that is not finite has no share in any gradient, and gradients of its own of 0.
void contrastive_lse_backward(const LseGradientParams& params);

}  // namespace emc2
