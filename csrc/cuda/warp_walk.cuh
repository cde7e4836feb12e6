// The walk of one chain by one warp, 32 proposals at a time, one a lane.
#pragma once

#include "../transition.h"
#include "warp_draws.cuh"

namespace emc2 {

using LaneTransition = Transition<float, int32_t>;

constexpr float kMinusInfinity = -__builtin_inff();

__device__ __forceinline__ LaneTransition identity() { return {kMinusInfinity, kMinusInfinity, -1}; }

// One proposal. A score that is not finite, and a key that may not be proposed, are the identity; it must be the whole
// of it, because lanes are composed as `first` too.
__device__ __forceinline__ LaneTransition proposed(float score, float e, int32_t position, bool proposable) {
  if (!(proposable && fabsf(score) < __builtin_inff())) return identity();
  return {__fadd_rn(score, e), score, position};
}

__device__ __forceinline__ LaneTransition shuffle_transition(const LaneTransition& mine, int lane) {
  return {__shfl_sync(kAllLanes, mine.threshold, lane), __shfl_sync(kAllLanes, mine.score, lane),
          __shfl_sync(kAllLanes, mine.position, lane)};
}

// Lane i gets the composition of lanes 0 .. i, in that order. A lane without a neighbour that far away is handed its
// own value, and composing a clamp with itself changes nothing, so no lane needs to be left out.
__device__ __forceinline__ LaneTransition prefixes(LaneTransition mine) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const LaneTransition earlier = {__shfl_up_sync(kAllLanes, mine.threshold, distance),
                                    __shfl_up_sync(kAllLanes, mine.score, distance),
                                    __shfl_up_sync(kAllLanes, mine.position, distance)};
    mine = compose(earlier, mine);
  }
  return mine;
}

// What a walk of one chain gives: its samples and its new state, or the transitions themselves.
class ChainOutput {
 public:
  // `position_offset`: what transitions add to a key's place in `keys`.
  __device__ __forceinline__ ChainOutput(const Walk& walk, int64_t row, int64_t position_offset)
      : incoming_(walk.input.score ? walk.input.score[row] : kMinusInfinity),
        row_(row),
        position_offset_(position_offset) {}

  __device__ __forceinline__ int64_t row() const { return row_; }

  // The incoming score; NaN, of which fmaxf takes the other operand, counts as not started.
  __device__ __forceinline__ float state() const { return fmaxf(incoming_, kMinusInfinity); }

  // `t`: of all proposals up to the sample's point.
  __device__ __forceinline__ void write_sample(const Walk& walk, int64_t sample, const LaneTransition& t) const {
    const int64_t at = row_ * walk.num_samples + sample;
    if (walk.step_output.samples) {
      walk.step_output.samples[at] = state() < t.threshold ? t.position : -1;
      return;
    }
    walk.transition_output.threshold[at] = t.threshold;
    walk.transition_output.score[at] = t.score;
    walk.transition_output.position[at] = t.position < 0 ? -1 : t.position + position_offset_;
  }

  // `whole`: of all proposals. By one thread.
  __device__ __forceinline__ void write_state(const Walk& walk, const LaneTransition& whole) const {
    const StepOutput& out = walk.step_output;
    if (!out.samples) return;
    const bool moves = state() < whole.threshold;
    out.score[row_] = moves ? whole.score : state();
    out.threshold[row_] = whole.threshold;
    if (moves) {
      out.key[row_] = walk.input.key_labels ? walk.input.key_labels[whole.position] : whole.position;
    } else {
      out.key[row_] = state() > kMinusInfinity ? walk.input.key[row_] : -1;
    }
  }

 private:
  float incoming_;  // score, as it was loaded: looking at it would wait for it
  int64_t row_;
  int64_t position_offset_;
};

// Batches of 32 proposals come in order; the fields but the sample clock are the same in all lanes.
class WarpWalk {
 public:
  __device__ __forceinline__ WarpWalk(const TimedWalk& walk, int64_t row, int64_t position_offset)
      : prefix_(identity()), output_(walk, row, position_offset) {}

  __device__ __forceinline__ int64_t row() const { return output_.row(); }

  // What was due before this shard, the shard leaves alone.
  __device__ __forceinline__ void begin(const TimedWalk& walk) {
    const SampleClock& clock = walk.clock;
    for (int64_t r = lane_id(); r < clock.before_shard; r += kWarp) output_.write_sample(walk, r, prefix_);
    if (walk.num_proposals == 0) return;
    const uint64_t ahead = clock.first_remainder + lane_id() * walk.num_samples, kept = clock.kept;
    const uint64_t samples_ahead = ahead / kept;
    sample_ = clock.first + static_cast<int64_t>(samples_ahead);
    remainder_ = static_cast<int64_t>(ahead - samples_ahead * kept);
  }

  // Walks the next 32 proposals, in the order of the lanes; those outside the shard hold the identity.
  __device__ __forceinline__ void batch(const TimedWalk& walk, const LaneTransition& mine) {
    const int lane = lane_id();
    const LaneTransition scan = prefixes({mine.threshold, mine.score, mine.position < 0 ? -1 : lane});
    const int32_t position = __shfl_sync(kAllLanes, mine.position, scan.position & (kWarp - 1));
    const LaneTransition after = compose(prefix_, {scan.threshold, scan.score, position});
    if (walk.step_output.accepted) {  // a proposal was accepted if the state after it is its own
      const bool own = scan.position == lane && prefix_.score < scan.threshold && output_.state() < after.threshold;
      accepted_ += __popc(__ballot_sync(kAllLanes, own));
    }
    tick(walk, after);
    prefix_ = shuffle_transition(after, kWarp - 1);
  }

  // What is due after this shard is left at the shard's own last state.
  __device__ __forceinline__ void end(const TimedWalk& walk) const {
    for (int64_t r = walk.clock.by_end + lane_id(); r < walk.num_samples; r += kWarp) {
      output_.write_sample(walk, r, prefix_);
    }
    if (lane_id() != 0) return;
    output_.write_state(walk, prefix_);
    if (walk.step_output.accepted) walk.step_output.accepted[row()] = accepted_;
  }

 private:
  // Each lane writes the sample that is due after its proposal, if one is; there is at most one, because samples <=
  // kept. A lane outside the shard may write what begin() and end() write too.
  __device__ __forceinline__ void tick(const TimedWalk& walk, const LaneTransition& after) {
    const SampleClock& clock = walk.clock;
    const int64_t samples = walk.num_samples;
    const bool is_sample =
        static_cast<uint64_t>(sample_) < static_cast<uint64_t>(samples);  // not before burn-in either
    if (is_sample && remainder_ + samples >= clock.kept) output_.write_sample(walk, sample_, after);
    sample_ += clock.advance;
    remainder_ += clock.advance_remainder;
    if (remainder_ >= clock.kept) {
      remainder_ -= clock.kept;
      ++sample_;
    }
  }

  LaneTransition prefix_;  // of the proposals walked so far
  ChainOutput output_;
  int64_t sample_ = 0, remainder_ = 0;  // SampleClock's, at the lane's proposal
  int32_t accepted_ = 0;
};

}  // namespace emc2
