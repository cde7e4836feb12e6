#include "isir.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "race.h"
#include "row_vector.h"
#include "running_lse.h"
#include "score_tiles.h"

namespace emc2 {
namespace {

constexpr int64_t kWalked = 32;  // operations of a score beside its product

struct SteppingRows : RowVector {
  VectorPhilox draws;
  RunningLse lse;
  Race race;
};

class IsirStep {
 public:
  struct Group {
    SteppingRows vectors[kGroupVectors];
  };

  explicit IsirStep(const IsirParams& params) : params_(params) {}

  void start(Group& group, int64_t number) const;
  void walk(Group& group, const ScoreTile& tile) const;
  void end(const Group& group) const;

 private:
  VectorPhilox draws(int64_t row_begin, Stream stream) const;
  void enter_own(SteppingRows& rows) const;

  const IsirParams& params_;
};

VectorPhilox IsirStep::draws(int64_t row_begin, Stream stream) const {
  const IdVector chains(params_.chain_ids, row_begin, params_.num_rows);
  const Words tag = chains.high << 8 | counter_tag(0, stream);
  return VectorPhilox(philox_key(params_.seed_value()), params_.step_value(), chains.low, tag);
}

void IsirStep::start(Group& group, int64_t number) const {
  for (int v = 0; v < kGroupVectors; ++v) {
    SteppingRows& rows = group.vectors[v];
    static_cast<RowVector&>(rows) = RowVector(params_, number * kGroupRows + v * kLanes);
    rows.draws = draws(rows.begin, kGumbelStream);
    rows.lse = RunningLse();
    rows.race = Race();
    enter_own(rows);
  }
}

// What the chains bring along has the lowest positions: of equal values it wins.
void IsirStep::enter_own(SteppingRows& rows) const {
  RaceScores own(0, -kMaxCarried, params_.num_carried);
  for (int64_t c = 0; c < params_.num_carried; ++c) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = std::min(rows.begin + lane, params_.num_rows - 1);
      const float score = params_.carried_score[row * params_.num_carried + c];
      own.keys()[c][lane] = std::isfinite(score) ? score : -kInfinity;
    }
  }
  rows.lse.add(own.keys(), params_.num_carried, 1);
  rows.race.run(draws(rows.begin, kCarriedStream), own);
}

void IsirStep::walk(Group& group, const ScoreTile& tile) const {
  RaceScores scores(params_.first_key + tile.key_begin, tile.key_begin, tile.count());
  for (int v = 0; v < tile.vectors; ++v) {
    SteppingRows& rows = group.vectors[v];
    for (int64_t i = 0; i < tile.count(); ++i)
      scores.keys()[i] = rows.score(params_, tile.dots[i * kGroupVectors + v], tile.key_begin + i);
    rows.lse.add(scores.keys(), tile.count(), 1);
    rows.race.run(rows.draws, scores);
  }
}

void IsirStep::end(const Group& group) const {
  for (const SteppingRows& rows : group.vectors) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int lane = static_cast<int>(row - rows.begin);
      const int64_t key = rows.race.position[lane], number = params_.first_key + key, own = key + kMaxCarried;
      if (key >= 0) {
        params_.position[row] = number;
        params_.key[row] = params_.key_labels ? params_.key_labels[key] : number;
      } else {
        const bool any = rows.race.score[lane] > -kInfinity;
        params_.position[row] = any ? -1 - own : -1;
        params_.key[row] = any ? params_.carried_key[row * params_.num_carried + own] : -1;
      }
      params_.score[row] = rows.race.score[lane];
      params_.lse[row] = rows.lse.value(lane);
      params_.value[row] = rows.race.exact_value(lane);
    }
  }
}

}  // namespace

void isir_step(const IsirParams& params) {
  require(params.num_carried >= 0 && params.num_carried <= kMaxCarried, "state.key: not 0 .. 4 candidates a row");
  require(params.first_key >= 0 && params.first_key <= kMaxProposals - params.num_keys,
          "first_key: keys' numbers past 2^33");
  require_within(params.chain_ids, params.num_rows, kChains, "chain_ids: a value outside [0, 2^40)");
  require_scores(params);
  // Roofline: memory and products as in score_tiles.h. With AVX-512 a vector of scores takes d / 2 cycles for its
  // products and, among 512 keys, 19 for ids and log-sum-exp and 21 for the race, 7 of them the generator's (`make
  // core-cycles`): arithmetic binds, and from 80 components on most of it is the products'. The race costs more among
  // fewer keys: in a row's first tiles somebody new leads in nearly each.
  const Blocking blocking(params.num_rows, params.num_keys, params.operands.dim, kWalked, params.num_threads);
  const IsirStep step(params);
  dispatch_dtype(params.operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(params.operands, blocking, step); });
}

}  // namespace emc2
