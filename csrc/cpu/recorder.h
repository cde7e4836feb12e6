// What leaves a walk: the samples and the end of given incoming states (mh_step), or the walk's own prefixes
// (mh_transition).
#pragma once

#include <cmath>
#include <limits>

#include "../mh_params.h"
#include "../transition.h"

namespace emc2 {

using RowTransition = Transition<float, int64_t>;  // of one row

struct Recorder {
  Walk walk;
  States states;                // null pointers where prefixes are wanted
  StepOutput step;              // null pointers where prefixes are wanted
  TransitionOutput transition;  // null pointers where states are given

  // A score that is not a number counts as not started, as -inf does.
  float incoming(int64_t row) const {
    const float score = states.score ? states.score[row] : -std::numeric_limits<float>::infinity();
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
  }

  void sample(int64_t row, int64_t sample, const RowTransition& prefix, float state) const {
    const int64_t at = row * walk.schedule.samples + sample;
    if (step.samples) {
      step.samples[at] = state < prefix.threshold ? static_cast<int32_t>(prefix.position) : -1;
    } else {
      transition.threshold[at] = prefix.threshold;
      transition.score[at] = prefix.score;
      transition.position[at] = prefix.position;
    }
  }

  void end(int64_t row, const RowTransition& whole, float state) const {
    if (!step.samples) return;
    const bool moves = state < whole.threshold;
    const bool started = state > -std::numeric_limits<float>::infinity();
    step.score[row] = moves ? whole.score : state;
    if (moves) {
      step.key[row] = step.labels ? step.labels[whole.position] : whole.position;
    } else {
      step.key[row] = started ? states.key[row] : -1;
    }
    step.threshold[row] = whole.threshold;
  }
};

}  // namespace emc2
