// What the kernels are told, by the names of emc2_kernels/backends/params.py: sizes, and pointers where that has
// tensors. Strides count elements, pointers belong to the caller, and vectors without a stride are contiguous.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace emc2 {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Half-precision elements, as bits: each kernel widens them in its own way.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// `call` with a value of the dtype's element type; what it returns.
template <class Call>
auto dispatch_dtype(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return call(Bfloat16{});
    case Dtype::kFloat16:
      return call(Float16{});
    case Dtype::kFloat32:
      break;
  }
  return call(float{});
}

struct Operands {
  const void* queries;  // (num_rows, dim)
  const void* keys;     // (num_keys, dim)
  int64_t query_stride, key_stride;
  int64_t dim;
  Dtype dtype;
};

// s_ij = <q_i, k_j> / temperature_i - log g_j. A key with one of the row's ids, or whose score is not finite, is left
// out.
struct ScoreParams {
  int64_t num_rows;
  int64_t num_keys;
  float temperature;           // of all rows, unless:
  const float* temperatures;   // (num_rows,) or null
  int64_t temperature_stride;  // 0: one for all rows, in memory
  const int64_t* query_ids;    // (num_rows,) or null: nothing is excluded
  const int64_t* key_ids;      // (num_keys,) or null
  const int64_t* carried_ids;  // (num_rows,) a second id of the row, or null
  const float* log_proposal;   // (num_keys,) log g, or null: zeros

  EMC2_HD float row_temperature(int64_t row) const {
    return temperatures ? temperatures[row * temperature_stride] : temperature;
  }
};

// Which draws of the random-number contract (philox.h) are a row's. Seed and step are numbers or, so that a replayed
// CUDA graph reads others each time, addresses of them.
struct StreamParams {
  uint64_t seed;
  const int64_t* seed_address;  // null: `seed`
  uint32_t step;
  const int64_t* step_address;  // null: `step`
  const int64_t* chain_ids;     // (num_rows,) or null: the row number

  EMC2_HD uint64_t seed_value() const { return seed_address ? static_cast<uint64_t>(*seed_address) : seed; }
  EMC2_HD uint32_t step_value() const { return step_address ? static_cast<uint32_t>(*step_address) : step; }
  EMC2_HD uint64_t chain(int64_t row) const { return static_cast<uint64_t>(chain_ids ? chain_ids[row] : row); }
};

// Where a walk of `total_proposals` is sampled. A shard of it holds proposals first_proposal .. first_proposal +
// num_proposals - 1; only transitions are walked in shards, because a step's samples and labels are positions in the
// keys that it was given.
struct Schedule {
  int64_t total_proposals;
  int64_t first_proposal;
  int64_t num_proposals;
  int64_t burn_in;
  int64_t num_samples;

  EMC2_HD int64_t end_proposal() const { return first_proposal + num_proposals; }

  // Sample r is the state after this proposal: burn_in + ceil((r + 1) * (total - burn_in) / num_samples) - 1.
  EMC2_HD int64_t sample_point(int64_t r) const {
    return burn_in + ((r + 1) * (total_proposals - burn_in) + num_samples - 1) / num_samples - 1;
  }

  // How many samples are taken after one of the proposals 0 .. end - 1.
  EMC2_HD int64_t count_samples(int64_t end) const {
    return end <= burn_in ? 0 : (end - burn_in) * num_samples / (total_proposals - burn_in);
  }
};

struct WalkParams : ScoreParams, StreamParams, Schedule {
  const int64_t* positions;  // (num_rows, num_proposals) with unit last stride; null: drawn uniformly, or a sweep
  int64_t position_stride;
  int num_threads;  // on a CPU
};

// Where chains enter a step, and what their keys are called.
struct StepInput {
  const int64_t* key;         // (num_rows,)
  const float* score;         // (num_rows,)
  const int64_t* key_labels;  // (num_keys,) what `key` holds for a position, or null: the position
};

struct StepOutput {
  int32_t* samples;   // (num_rows, num_samples), contiguous
  int64_t* key;       // (num_rows,)
  float* score;       // (num_rows,)
  float* threshold;   // (num_rows,)
  int32_t* accepted;  // (num_rows,) or null
  float* lse;         // (num_rows,) or null; sweeps only
};

struct TransitionOutput {
  float* threshold;  // (num_rows, num_samples), contiguous, as are the others
  float* score;
  int64_t* position;  // of the key; in a sweep, its number in the whole walk, so that shards compose
};

// One call: a step, whose `transition_output` is all null, or a transition, whose `input` and `step_output` are.
struct Walk : WalkParams {
  Operands operands;
  StepInput input;
  StepOutput step_output;
  TransitionOutput transition_output;
};

// Exact draws from the softmax of each row's scores.
struct GumbelParams : ScoreParams, StreamParams {
  Operands operands;
  int64_t num_samples;
  int64_t* positions;  // (num_rows, num_samples), contiguous; -1: the row has no key
  int num_threads;
};

// What a chain brings along to a step over all keys, and the next states. A row without candidates is left with
// position and key -1, and -inf thrice.
struct IsirParams : ScoreParams, StreamParams {
  Operands operands;
  int64_t num_carried;         // C, candidates of a chain's own
  const int64_t* carried_key;  // (num_rows, C) labels, contiguous
  const float* carried_score;  // (num_rows, C), contiguous; one that is not finite is no candidate
  const int64_t* key_labels;   // (num_keys,) what `key` holds for a key, or null: its number
  int64_t first_key;           // number of the first key: the noise, and `position`, go by it
  int64_t* position;           // (num_rows,) a key's number, or -1 - c: the chain's own candidate c
  int64_t* key;                // (num_rows,)
  float* score;                // (num_rows,)
  float* lse;                  // (num_rows,) over all candidates
  double* value;               // (num_rows,) score + noise of what was drawn
  int num_threads;
};

// Log-sum-exp of each row's scores.
struct LseParams : ScoreParams {
  Operands operands;
  float* lse;  // (num_rows,)
  int num_threads;
};

struct LseGradientParams : ScoreParams {
  Operands operands;
  const float* grad;      // (num_rows,) of the log-sum-exps
  const float* lse;       // (num_rows,)
  bool symmetric;         // queries and keys are one operand, and d_queries has both gradients
  float* d_queries;       // (num_rows, dim), contiguous, as are the others
  float* d_keys;          // (num_keys, dim); null: not wanted, or symmetric
  float* d_temperatures;  // (num_rows,) or null
  int num_threads;
};

}  // namespace emc2
