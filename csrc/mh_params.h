// What the kernels are told about a walk. Strides count elements, pointers belong to the caller.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace emc2 {

// Where a walk of `total` proposals is sampled. A shard of it holds proposals first .. first + count - 1; only
// transitions are walked in shards, because a step's samples and labels are positions in the keys that it was given.
struct Schedule {
  int64_t total;
  int64_t first;
  int64_t count;
  int64_t burn_in;
  int64_t samples;

  // Sample r is the state after proposal burn_in + ceil((r + 1) * (total - burn_in) / samples) - 1.
  EMC2_HD int64_t proposal_of_sample(int64_t r) const {
    return burn_in + ((r + 1) * (total - burn_in) + samples - 1) / samples - 1;
  }

  // How many samples are taken before proposal p, that is, after one of 0 .. p - 1.
  EMC2_HD int64_t samples_before(int64_t p) const {
    return p <= burn_in ? 0 : (p - burn_in) * samples / (total - burn_in);
  }
};

// What every row and every proposal of a walk has, whatever the proposal distribution.
struct Walk {
  int64_t rows;
  int64_t keys;
  Schedule schedule;
  uint64_t seed;
  uint32_t step;
  float temperature;          // of all rows, unless:
  const float* temperatures;  // (rows,) or null
  const int64_t* chain_ids;   // (rows,) or null: the row number
  const int64_t* query_ids;   // (rows,) or null: nothing is excluded
  const int64_t* key_ids;     // (keys,) or null
  const float* log_proposal;  // (keys,) or null
  int threads;
};

// Incoming states; null score: no states, the walk is wanted as a transition.
struct States {
  const int64_t* key;  // (rows,)
  const float* score;  // (rows,)
};

struct StepOutput {
  int32_t* samples;       // (rows, samples), contiguous
  int64_t* key;           // (rows,)
  float* score;           // (rows,)
  float* threshold;       // (rows,)
  int32_t* accepted;      // (rows,) or null
  float* lse;             // (rows,) or null; sweeps only
  const int64_t* labels;  // (keys,) what `key` holds for a position, or null: the position
};

struct TransitionOutput {
  float* threshold;  // (rows, samples), contiguous, as are the others
  float* score;
  int64_t* position;  // of the key; in a sweep, its number in the whole walk, so that shards compose
};

}  // namespace emc2
