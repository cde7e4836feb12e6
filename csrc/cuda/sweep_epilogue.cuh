// The end of a sweep whose segments were walked at the same time, each from the identity: a warp composes those of one
// row in order, and the records at sample points with the segments before theirs.
//
// Roofline: memory. 16 bytes read for each segment and for each record, and the results written.
#pragma once

#include "tile_walk.cuh"

namespace emc2 {

// In memory, where the number is that of the key.
struct alignas(16) StoredTransition {
  float threshold, score;
  int32_t number, unused;
};

__device__ __forceinline__ LaneTransition load_transition(const StoredTransition* from) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
  return {__uint_as_float(words.x), __uint_as_float(words.y), static_cast<int32_t>(words.z)};
}

struct SegmentedWalk : TimedWalk {
  int64_t num_segments;            // of a row
  int64_t segment_length;          // proposals
  StoredTransition* segments;      // (num_rows, num_segments)
  StoredTransition* records;       // (num_rows, num_samples), from the beginning of their segment on
};

constexpr int kEpilogueWarps = 4;

__global__ void __launch_bounds__(kEpilogueWarps* kWarp)
    sweep_epilogue_kernel(const __grid_constant__ SegmentedWalk walk) {
  const int lane = lane_id();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kEpilogueWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (row >= walk.num_rows) return;
  const ChainOutput output(walk, row, walk.first_proposal);
  const StoredTransition* const segments = walk.segments + row * walk.num_segments;
  const StoredTransition* const records = walk.records + row * walk.num_samples;
  for (int64_t r = lane; r < walk.clock.before_shard; r += kWarp) output.write_sample(walk, r, identity());

  LaneTransition before = identity();  // of the segments so far
  for (int64_t first = 0; first < walk.num_segments; first += kWarp) {
    const bool there = first + lane < walk.num_segments;
    const LaneTransition through = prefixes(there ? load_transition(segments + first + lane) : identity());
    const LaneTransition previous = shuffle_transition(through, lane > 0 ? lane - 1 : 0);
    const LaneTransition entry = lane > 0 ? compose(before, previous) : before;
    const int64_t begin = walk.first_proposal + first * walk.segment_length;
    const int64_t end = begin + kWarp * walk.segment_length;
    const int64_t last = walk.count_samples(end < walk.end_proposal() ? end : walk.end_proposal());
    for (int64_t sample = walk.count_samples(begin); sample < last; sample += kWarp) {
      const int64_t r = sample + lane < last ? sample + lane : last - 1;
      const int64_t segment = (walk.sample_point(r) - begin) / walk.segment_length;
      const LaneTransition of_segment = shuffle_transition(entry, static_cast<int>(segment));
      if (sample + lane < last) output.write_sample(walk, r, compose(of_segment, load_transition(records + r)));
    }
    before = compose(before, shuffle_transition(through, kWarp - 1));
  }

  for (int64_t r = walk.clock.by_end + lane; r < walk.num_samples; r += kWarp) output.write_sample(walk, r, before);
  if (lane == 0) output.write_state(walk, before);
  refuse_bad_row(walk, row);
}

}  // namespace emc2
