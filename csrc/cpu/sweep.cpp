#include "sweep.h"

#include <algorithm>

#include "checks.h"
#include "row_vector.h"
#include "running_lse.h"
#include "score_tiles.h"
#include "vector_philox.h"

namespace emc2 {
namespace {

constexpr int64_t kWalked = 32;  // operations of a proposal beside its product

// How far the walk of kLanes rows has come.
struct Progress {
  Transition<Floats, Ints> prefix;
  Floats current;  // score of the walk from the incoming state; kept only where accepts are counted
  Ints accepted;

  Progress() = default;
  // Field by field: a copy as a whole, GCC leaves in memory.
  Progress(const Progress& other) { *this = other; }
  Progress& operator=(const Progress& other) {
    prefix.threshold = other.prefix.threshold, prefix.score = other.prefix.score;
    prefix.position = other.prefix.position, current = other.current, accepted = other.accepted;
    return *this;
  }
};

struct WalkingRows : RowVector {
  Floats state;  // incoming score
  VectorPhilox draws;
  Progress progress;
  RunningLse lse;
};

class Sweep {
 public:
  struct Group {
    WalkingRows vectors[kGroupVectors];
  };

  explicit Sweep(const Walk& walk);

  void start(Group& group, int64_t number) const;
  void walk(Group& group, const ScoreTile& tile) const;
  void end(const Group& group) const;

 private:
  using Kernel = void (Sweep::*)(Group&, const ScoreTile&) const;

  Kernel kernel() const;
  template <bool kExclude, bool kWeighted, bool kCount>
  void propose(const WalkingRows& rows, Progress& at, int64_t key, Ints position, Floats dot, Floats e) const;
  template <bool kExclude, bool kWeighted, bool kCount>
  void walk_keys(Group& group, const ScoreTile& tile, const Floats* e, int64_t begin, int64_t end) const;
  template <bool kExclude, bool kWeighted, bool kCount>
  void walk_tile(Group& group, const ScoreTile& tile) const;
  void draw_acceptance(const Group& group, int vectors, int64_t first, int64_t end, Floats* e) const;
  void write_samples(const WalkingRows& rows, int64_t sample) const;
  RowTransition lane_prefix(const WalkingRows& rows, int lane) const;

  const Walk& walk_;
  Kernel kernel_;
};

Sweep::Sweep(const Walk& walk) : walk_(walk), kernel_(kernel()) {}

void Sweep::start(Group& group, int64_t number) const {
  for (int v = 0; v < kGroupVectors; ++v) {
    WalkingRows& rows = group.vectors[v];
    static_cast<RowVector&>(rows) = RowVector(walk_, number * kGroupRows + v * kLanes);
    const Words chain_low = low_words(walk_.chain_ids, rows.begin, walk_.num_rows, 0);
    const Words chain_high = low_words(walk_.chain_ids, rows.begin, walk_.num_rows, 32);
    const Words tag = chain_high << 8 | counter_tag(0, kAcceptanceStream);
    rows.draws = VectorPhilox(philox_key(walk_.seed_value()), walk_.step_value(), chain_low, tag);
    for (int lane = 0; lane < kLanes; ++lane)
      rows.state[lane] = incoming_score(walk_, std::min(rows.begin + lane, walk_.num_rows - 1));
    rows.progress.prefix = {all_floats(-kInfinity), all_floats(-kInfinity), all_ints(-1)};
    rows.progress.current = rows.state, rows.progress.accepted = all_ints(0);
    rows.lse = RunningLse();
    // What was due before this shard, the shard leaves alone.
    for (int64_t r = 0; r < walk_.count_samples(walk_.first_proposal); ++r) write_samples(rows, r);
  }
}

void Sweep::end(const Group& group) const {
  for (const WalkingRows& rows : group.vectors) {
    // What is due after this shard is left at the shard's own last state.
    for (int64_t r = walk_.count_samples(walk_.end_proposal()); r < walk_.num_samples; ++r) write_samples(rows, r);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int lane = row % kLanes;
      write_end(walk_, row, lane_prefix(rows, lane), rows.state[lane]);
      if (walk_.step_output.accepted) walk_.step_output.accepted[row] = rows.progress.accepted[lane];
      if (walk_.step_output.lse) walk_.step_output.lse[row] = rows.lse.value(lane);
    }
  }
}

// E of proposals first .. end - 1, first a multiple of 4: e[(proposal - first) * kGroupVectors + vector].
void Sweep::draw_acceptance(const Group& group, int vectors, int64_t first, int64_t end, Floats* e) const {
  for (int v = 0; v < vectors; ++v) {
    const VectorPhilox draws = group.vectors[v].draws;
    Floats* to = e + v;
    for (int64_t block = first / 4; 4 * block < end; ++block, to += 4 * kGroupVectors) {
      const PhiloxBlock<Words> words = draws.words(static_cast<uint32_t>(block));
      to[0] = exponential(words.c0), to[kGroupVectors] = exponential(words.c1);
      to[2 * kGroupVectors] = exponential(words.c2), to[3 * kGroupVectors] = exponential(words.c3);
    }
  }
}

template <bool kExclude, bool kWeighted, bool kCount>
EMC2_HD void Sweep::propose(const WalkingRows& rows, Progress& at, int64_t key, Ints position, Floats dot,
                            Floats e) const {
  Floats score = dot * rows.inverse_temperature;
  if (kWeighted) score -= walk_.log_proposal[key];
  Floats threshold = score < kInfinity ? score + e : all_floats(-kInfinity);
  if (kExclude) threshold = rows.query_ids.equal(walk_.key_ids[key]) ? all_floats(-kInfinity) : threshold;
  at.prefix = compose(at.prefix, {threshold, score, position});
  if (kCount) {
    const Ints moves = at.current < threshold;
    at.current = moves ? score : at.current;
    at.accepted -= moves;  // a set lane is -1
  }
}

// Proposals of the keys begin .. end - 1 of a tile, `e` from its first key on.
template <bool kExclude, bool kWeighted, bool kCount>
EMC2_HD void Sweep::walk_keys(Group& group, const ScoreTile& tile, const Floats* e, int64_t begin, int64_t end) const {
  // Two vectors at once: one alone would wait for its own comparisons of scores.
  static_assert(kGroupVectors == 2, "one local for each");
  const bool both = tile.vectors == kGroupVectors;
  WalkingRows &rows_0 = group.vectors[0], &rows_1 = group.vectors[1];
  const Floats* dots = tile.dots + (begin - tile.key_begin) * kGroupVectors;
  e += (begin - tile.key_begin) * kGroupVectors;
  Ints position = all_ints(static_cast<int32_t>(begin));
  Progress at_0(rows_0.progress), at_1(rows_1.progress);
  for (int64_t key = begin; key < end; ++key, dots += kGroupVectors, e += kGroupVectors, position += 1) {
    propose<kExclude, kWeighted, kCount>(rows_0, at_0, key, position, dots[0], e[0]);
    if (both) propose<kExclude, kWeighted, kCount>(rows_1, at_1, key, position, dots[1], e[1]);
  }
  rows_0.progress = at_0, rows_1.progress = at_1;
}

template <bool kExclude, bool kWeighted, bool kCount>
void Sweep::walk_tile(Group& group, const ScoreTile& tile) const {
  const int64_t begin = walk_.first_proposal + tile.key_begin;
  const int64_t first_drawn = begin / 4 * 4;
  Floats drawn[kTileVectors + 4 * kGroupVectors];
  draw_acceptance(group, tile.vectors, first_drawn, walk_.first_proposal + tile.key_end, drawn);
  const Floats* e = drawn + (begin - first_drawn) * kGroupVectors;
  int64_t sample = walk_.count_samples(begin);
  for (int64_t key = tile.key_begin, stop; key < tile.key_end; key = stop) {
    const bool due = sample < walk_.num_samples;
    stop = due ? walk_.sample_point(sample) - walk_.first_proposal + 1 : tile.key_end;
    const bool reached = due && stop <= tile.key_end;
    stop = std::min(stop, tile.key_end);
    walk_keys<kExclude, kWeighted, kCount>(group, tile, e, key, stop);
    if (!reached) continue;
    for (const WalkingRows& rows : group.vectors) write_samples(rows, sample);
    ++sample;
  }
}

void Sweep::walk(Group& group, const ScoreTile& tile) const {
  (this->*kernel_)(group, tile);
  if (!walk_.step_output.lse) return;
  for (int v = 0; v < tile.vectors; ++v) {
    WalkingRows& rows = group.vectors[v];
    Floats scores[kTileVectors / kGroupVectors];
    for (int64_t i = 0; i < tile.count(); ++i) {  // of similarities / temperature, whatever the keys were drawn from
      const Floats similarity = tile.dots[i * kGroupVectors + v] * rows.inverse_temperature;
      scores[i] = rows.counted(walk_, similarity, tile.key_begin + i);
    }
    rows.lse.add(scores, tile.count(), 1);
  }
}

RowTransition Sweep::lane_prefix(const WalkingRows& rows, int lane) const {
  const int32_t key = rows.progress.prefix.position[lane];
  return {rows.progress.prefix.threshold[lane], rows.progress.prefix.score[lane],
          key < 0 ? -1 : walk_.first_proposal + key};
}

void Sweep::write_samples(const WalkingRows& rows, int64_t sample) const {
  if (int32_t* samples = walk_.step_output.samples) {
    const Ints reached = rows.state < rows.progress.prefix.threshold ? rows.progress.prefix.position : all_ints(-1);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      samples[row * walk_.num_samples + sample] = reached[row - rows.begin];
    return;
  }
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    write_sample(walk_, row, sample, lane_prefix(rows, row - rows.begin), rows.state[row - rows.begin]);
  }
}

Sweep::Kernel Sweep::kernel() const {
  static constexpr Kernel kernels[2][2][2] = {
      {{&Sweep::walk_tile<false, false, false>, &Sweep::walk_tile<false, false, true>},
       {&Sweep::walk_tile<false, true, false>, &Sweep::walk_tile<false, true, true>}},
      {{&Sweep::walk_tile<true, false, false>, &Sweep::walk_tile<true, false, true>},
       {&Sweep::walk_tile<true, true, false>, &Sweep::walk_tile<true, true, true>}}};
  return kernels[walk_.query_ids != nullptr][walk_.log_proposal != nullptr][walk_.step_output.accepted != nullptr];
}

}  // namespace

void walk_sweep(const Walk& walk) {
  require_walk(walk);
  const Blocking blocking(walk.num_rows, walk.num_keys, walk.operands.dim, kWalked, walk.num_threads);
  const Sweep sweep(walk);
  dispatch_dtype(walk.operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(walk.operands, blocking, sweep); });
}

}  // namespace emc2
