// A Metropolis-Hastings step is a clamp of the current score x, and clamps compose:
//
//   f(x) = score if x < threshold else x,    threshold = score + E >= score,    E ~ Exp(1)
//
// so a walk over any block of proposals is again one (threshold, score, position), whatever state it starts from.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace emc2 {

// Score and Position are float and an integer, or vectors with one chain in each lane (GCC's ?: selects lane by lane).
template <class Score, class Position>
struct Transition {
  Score threshold;
  Score score;
  Position position;  // of the proposal that `score` belongs to; -1 in the identity
};

// Associative, not commutative. As `then`, threshold -inf is an identity step whatever its score: nothing lies below
// it, so not even a NaN is taken. As `first` the identity must be (-inf, -inf, -1): there its score and position would
// leak.
template <class Score, class Position>
EMC2_HD Transition<Score, Position> compose(const Transition<Score, Position>& first,
                                            const Transition<Score, Position>& then) {
  const auto moves = first.score < then.threshold;
  return {then.threshold > first.threshold ? then.threshold : first.threshold, moves ? then.score : first.score,
          moves ? then.position : first.position};
}

}  // namespace emc2
