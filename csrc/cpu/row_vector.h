// kLanes neighbouring rows, one a lane, and their scores with a key.
#pragma once

#include <algorithm>

#include "../params.h"
#include "simd.h"

namespace emc2 {

// The low words of kLanes values shifted right, from `begin` on (the last one again past the end); null: of row
// numbers.
EMC2_HD Words low_words(const int64_t* values, int64_t begin, int64_t count, int shift) {
  Words words{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t at = std::min(begin + lane, count - 1);
    words[lane] = static_cast<uint32_t>(static_cast<uint64_t>(values ? values[at] : at) >> shift);
  }
  return words;
}

// Ids of kLanes neighbouring rows, from `begin` on.
struct IdVector {
  Words low, high;

  IdVector() = default;
  IdVector(const int64_t* ids, int64_t begin, int64_t count)
      : low(low_words(ids, begin, count, 0)), high(low_words(ids, begin, count, 32)) {}

  EMC2_HD Ints equal(uint64_t id) const {
    const Ints same = low == static_cast<uint32_t>(id);
    if (__builtin_expect(!any(same), 1)) return same;
    return same & (high == static_cast<uint32_t>(id >> 32));
  }
};

struct RowVector {
  int64_t begin, end;
  Floats inverse_temperature;
  IdVector query_ids, carried_ids;

  RowVector() = default;

  RowVector(const ScoreParams& params, int64_t begin) : begin(begin), end(std::min(begin + kLanes, params.num_rows)) {
    for (int lane = 0; lane < kLanes; ++lane)
      inverse_temperature[lane] = 1.0f / params.row_temperature(std::min(begin + lane, params.num_rows - 1));
    if (params.query_ids) query_ids = IdVector(params.query_ids, begin, params.num_rows);
    if (params.carried_ids) carried_ids = IdVector(params.carried_ids, begin, params.num_rows);
  }

  // A score, or -inf where the key is excluded, or the score is not finite.
  EMC2_HD Floats counted(const ScoreParams& params, Floats score, int64_t key) const {
    Ints counts = score < kInfinity;
    if (params.query_ids) counts &= ~query_ids.equal(params.key_ids[key]);
    if (params.carried_ids) counts &= ~carried_ids.equal(params.key_ids[key]);
    return counts ? score : all_floats(-kInfinity);
  }

  EMC2_HD Floats score(const ScoreParams& params, Floats dot, int64_t key) const {
    Floats score = dot * inverse_temperature;
    if (params.log_proposal) score -= params.log_proposal[key];
    return counted(params, score, key);
  }
};

}  // namespace emc2
