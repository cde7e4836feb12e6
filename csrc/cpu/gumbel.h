// Exact draws from the softmax of each row's scores: argmax of score + Gumbel noise, several samples in one pass. The
// caller makes the scores, tile by tile, with the matrix product that it has.
#pragma once

#include <vector>

#include "sweep.h"

namespace emc2 {

constexpr int64_t kMaxSamples = (int64_t{1} << 16) - 1;  // the counter has 16 bits for their numbers

// The best key so far of kLanes neighbouring rows, for one sample.
struct Race {
  Floats filter;  // what a score must exceed, beside a bound on its noise, to be looked at: see scan_samples
  double best[kLanes];
  int32_t position[kLanes];
};

class GumbelSampler {
 public:
  explicit GumbelSampler(const GumbelParams& params);  // throws std::invalid_argument for values that are not legal

  // Tiles of a row block come in key order: its first key starts the rows, its last one writes their positions.
  void scan(const Tile& tile);

 private:
  struct Rows;

  Rows load_rows(const Tile& tile, int64_t group) const;
  Ints excluded(const Rows& rows, int64_t key) const;
  void scan_samples(const Tile& tile, const Rows& rows, int64_t first, int64_t count, Race* races) const;

  GumbelParams params_;
  std::vector<Race> races_;  // of a row block: (groups, samples)
};

}  // namespace emc2
