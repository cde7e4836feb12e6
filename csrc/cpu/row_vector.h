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

struct RowVector {
  int64_t begin, end;
  Floats inverse_temperature;
  Words id_low, id_high;

  RowVector() = default;

  RowVector(const ScoreParams& params, int64_t begin) : begin(begin), end(std::min(begin + kLanes, params.num_rows)) {
    for (int lane = 0; lane < kLanes; ++lane)
      inverse_temperature[lane] = 1.0f / params.row_temperature(std::min(begin + lane, params.num_rows - 1));
    if (!params.query_ids) return;
    id_low = low_words(params.query_ids, begin, params.num_rows, 0);
    id_high = low_words(params.query_ids, begin, params.num_rows, 32);
  }

  EMC2_HD Ints has_id(uint64_t id) const {
    const Ints same = id_low == static_cast<uint32_t>(id);
    if (__builtin_expect(!any(same), 1)) return same;
    return same & (id_high == static_cast<uint32_t>(id >> 32));
  }

  // A score, or -inf where the key is excluded, or the score is not finite.
  EMC2_HD Floats counted(const ScoreParams& params, Floats score, int64_t key) const {
    Ints counts = score < kInfinity;
    if (params.query_ids) counts &= ~has_id(params.key_ids[key]);
    return counts ? score : all_floats(-kInfinity);
  }

  EMC2_HD Floats score(const ScoreParams& params, Floats dot, int64_t key) const {
    return counted(params, dot * inverse_temperature, key);
  }
};

}  // namespace emc2
