// What leaves a walk: the samples and the end of given incoming states (mh_step), or the walk's own prefixes
// (mh_transition).
#pragma once

#include <cmath>
#include <limits>

#include "../params.h"
#include "../transition.h"

namespace emc2 {

using RowTransition = Transition<float, int64_t>;  // of one row

// A score that is not a number counts as not started, as -inf does.
inline float incoming_score(const Walk& walk, int64_t row) {
  const float score = walk.input.score ? walk.input.score[row] : -std::numeric_limits<float>::infinity();
  return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
}

inline void write_sample(const Walk& walk, int64_t row, int64_t sample, const RowTransition& prefix, float state) {
  const int64_t at = row * walk.num_samples + sample;
  if (walk.step_output.samples) {
    walk.step_output.samples[at] = state < prefix.threshold ? static_cast<int32_t>(prefix.position) : -1;
  } else {
    walk.transition_output.threshold[at] = prefix.threshold;
    walk.transition_output.score[at] = prefix.score;
    walk.transition_output.position[at] = prefix.position;
  }
}

inline void write_end(const Walk& walk, int64_t row, const RowTransition& whole, float state) {
  const StepOutput& out = walk.step_output;
  if (!out.samples) return;
  const bool moves = state < whole.threshold;
  const bool started = state > -std::numeric_limits<float>::infinity();
  out.score[row] = moves ? whole.score : state;
  if (moves) {
    out.key[row] = walk.input.key_labels ? walk.input.key_labels[whole.position] : whole.position;
  } else {
    out.key[row] = started ? walk.input.key[row] : -1;
  }
  out.threshold[row] = whole.threshold;
}

}  // namespace emc2
