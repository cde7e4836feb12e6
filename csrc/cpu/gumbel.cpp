#include "gumbel.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "race.h"
#include "row_vector.h"
#include "score_tiles.h"

namespace emc2 {
namespace {

constexpr int64_t kDraw = 16;              // operations of a (key, sample)
constexpr int64_t kCachedRaces = 1 << 14;  // (row, sample) of a block of rows, 20 bytes each

struct RacingRows : RowVector {
  Words chain_low, chain_high;
  std::vector<Race> races;  // of the samples
};

class GumbelSampler {
 public:
  struct Group {
    RacingRows vectors[kGroupVectors];
  };

  // `shared`: several groups have the same rows, and other keys.
  GumbelSampler(const GumbelParams& params, bool shared) : params_(params) {
    std::fill(params.positions, params.positions + params.num_rows * params.num_samples, -1);
    if (shared) best_.resize(params.num_rows * params.num_samples, -static_cast<double>(kInfinity));
  }

  void start(Group& group, int64_t number) const;
  void walk(Group& group, const ScoreTile& tile) const;
  void end(const Group& group);

 private:
  const GumbelParams& params_;
  std::vector<double> best_;  // (rows, samples) values at the positions so far
};

void GumbelSampler::start(Group& group, int64_t number) const {
  for (int v = 0; v < kGroupVectors; ++v) {
    RacingRows& rows = group.vectors[v];
    static_cast<RowVector&>(rows) = RowVector(params_, number * kGroupRows + v * kLanes);
    rows.chain_low = low_words(params_.chain_ids, rows.begin, params_.num_rows, 0);
    rows.chain_high = low_words(params_.chain_ids, rows.begin, params_.num_rows, 32);
    rows.races.assign(params_.num_samples, Race());
  }
}

void GumbelSampler::walk(Group& group, const ScoreTile& tile) const {
  const PhiloxKey key = philox_key(params_.seed_value());
  RaceScores scores(tile.key_begin, tile.key_begin, tile.count());
  for (int v = 0; v < tile.vectors; ++v) {
    RacingRows& rows = group.vectors[v];
    for (int64_t i = 0; i < tile.count(); ++i)
      scores.keys()[i] = rows.score(params_, tile.dots[i * kGroupVectors + v], tile.key_begin + i);
    for (int64_t s = 0; s < params_.num_samples; ++s) {
      const Words tag = rows.chain_high << 8 | counter_tag(0, kGumbelStream, static_cast<uint32_t>(s));
      rows.races[s].run(VectorPhilox(key, params_.step_value(), rows.chain_low, tag), scores);
    }
  }
}

// Of equal values the lowest position wins, whichever group ends first.
void GumbelSampler::end(const Group& group) {
  const auto write = [this](int64_t at, const Race& race, int lane) {
    const int64_t position = race.position[lane];
    if (!best_.empty()) {
      const double value = race.exact_value(lane);
      const bool wins = value > best_[at] || (value == best_[at] && position < params_.positions[at]);
      if (position < 0 || !wins) return;
      best_[at] = value;
    }
    params_.positions[at] = position;
  };
#pragma omp critical(emc2_gumbel)
  for (const RacingRows& rows : group.vectors) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int lane = row - rows.begin;
      for (int64_t s = 0; s < params_.num_samples; ++s) write(row * params_.num_samples + s, rows.races[s], lane);
    }
  }
}

}  // namespace

void sample_gumbel(const GumbelParams& params) {
  require(params.num_samples >= 1 && params.num_samples <= kMaxSamples, "num_samples: not in 1 .. 2^16 - 1");
  require_within(params.chain_ids, params.num_rows, kChains, "chain_ids: a value outside [0, 2^40)");
  require_scores(params);
  Blocking blocking(params.num_rows, params.num_keys, params.operands.dim, kDraw * params.num_samples,
                    params.num_threads, kCachedRaces / params.num_samples);
  blocking.split_keys();
  GumbelSampler sampler(params, blocking.key_ranges > 1);
  dispatch_dtype(params.operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(params.operands, blocking, sampler); });
}

}  // namespace emc2
