// A step of iterated sampling importance resampling: each row's next state, drawn from the softmax over all keys and
// what its chain brings along, and the log-sum-exp of these. Nothing of size (rows, keys) is kept.
#pragma once

#include "../params.h"

namespace emc2 {

constexpr int kMaxCarried = 4;  // candidates of a chain's own: the words of one block of draws

// There may be no rows, or no keys. Throws std::invalid_argument for values that are not legal, before anything is
// written.
void isir_step(const IsirParams& params);

}  // namespace emc2
