#include "sweep.h"

#include <algorithm>
#include <cmath>

#include "products.h"
#include "values.h"

namespace emc2 {
namespace {

// Below this many (row, key) elements, or multiplies where there are any, waking the threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;
constexpr int64_t kParallelMultiplies = 1 << 17;
constexpr int64_t kPrefetchKeys = 32;  // ahead of the walk: a third-level cache line takes as long as some ten keys

// The low words of kLanes values shifted right, from `begin` on (the last one again past the end); null: of row
// numbers.
EMC2_HD Words low_words(const int64_t* values, int64_t begin, int64_t rows, int shift) {
  Words words{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = std::min(begin + lane, rows - 1);
    words[lane] = static_cast<uint32_t>(static_cast<uint64_t>(values ? values[row] : row) >> shift);
  }
  return words;
}

}  // namespace

Sweep::Sweep(const Recorder& recorder)
    : recorder_(recorder), walk_(recorder_.walk), groups_((walk_.rows + kLanes - 1) / kLanes) {
  require_sound(walk_);
}

void Sweep::start(int64_t group) {
  RowGroup& rows = groups_[group];
  const int64_t begin = group * kLanes;
  const Words chain_low = low_words(walk_.chain_ids, begin, walk_.rows, 0);
  const Words chain_high = low_words(walk_.chain_ids, begin, walk_.rows, 32);
  const Words tag = chain_high << 8 | counter_tag(0, kAcceptanceStream);
  rows.draws = AcceptanceDraws(philox_key(walk_.seed), walk_.step, chain_low, tag);
  if (walk_.query_ids) {
    rows.query_id_low = low_words(walk_.query_ids, begin, walk_.rows, 0);
    rows.query_id_high = low_words(walk_.query_ids, begin, walk_.rows, 32);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = std::min(begin + lane, walk_.rows - 1);
    rows.inverse_temperature[lane] = 1.0f / (walk_.temperatures ? walk_.temperatures[row] : walk_.temperature);
    rows.state[lane] = recorder_.incoming(row);
  }
  rows.prefix = {all_floats(-kInfinity), all_floats(-kInfinity), all_ints(-1)};
  rows.current = rows.state;
  rows.accepted = all_ints(0);
  rows.lse_max = all_floats(-kInfinity);
  rows.lse_sum = all_floats(0.0f);
  // What was due before this shard, the shard leaves alone.
  for (int64_t r = 0; r < walk_.schedule.samples_before(walk_.schedule.first); ++r) record(group, r);
}

void Sweep::end(int64_t group) const {
  const RowGroup& rows = groups_[group];
  const Schedule& schedule = walk_.schedule;
  // What is due after this shard is left at the shard's own last state.
  for (int64_t r = schedule.samples_before(schedule.first + schedule.count); r < schedule.samples; ++r)
    record(group, r);
  for (int64_t row = group * kLanes; row < std::min((group + 1) * kLanes, walk_.rows); ++row) {
    const int lane = row % kLanes;
    recorder_.end(row, prefix_of(rows, lane), rows.state[lane]);
    if (recorder_.step.accepted) recorder_.step.accepted[row] = rows.accepted[lane];
    if (recorder_.step.lse) recorder_.step.lse[row] = rows.lse_max[lane] + std::log(rows.lse_sum[lane]);
  }
}

EMC2_HD Ints Sweep::excluded(const RowGroup& rows, int64_t key) const {
  const uint64_t id = static_cast<uint64_t>(walk_.key_ids[key]);
  const Ints same = rows.query_id_low == static_cast<uint32_t>(id);
  if (__builtin_expect(!any(same), 1)) return same;
  return same & (rows.query_id_high == static_cast<uint32_t>(id >> 32));
}

template <bool kExclude, bool kWeighted, bool kCount>
void Sweep::walk_group(const Tile& tile, int64_t group) {
  RowGroup& rows = groups_[group];
  const Schedule& schedule = walk_.schedule;
  const float* dots = tile.dots + (group * kLanes - tile.row_begin);
  const int64_t begin = schedule.first + tile.key_begin;
  const int64_t end = schedule.first + tile.key_end;
  int64_t sample = schedule.samples_before(begin);
  int64_t sample_at = sample < schedule.samples ? schedule.proposal_of_sample(sample) : -1;
  // Locals stay in registers; through `rows` each proposal would store them.
  auto prefix = rows.prefix;
  Floats current = rows.current;
  Ints accepted = rows.accepted;

  const auto propose = [&](int64_t proposal, Floats e) __attribute__((always_inline)) {
    const int64_t key = proposal - schedule.first;
    Floats score = load<Floats>(dots + (key - tile.key_begin) * tile.stride) * rows.inverse_temperature;
    if (kWeighted) score -= walk_.log_proposal[key];
    Floats threshold = score < kInfinity ? score + e : all_floats(-kInfinity);
    if (kExclude) threshold = excluded(rows, key) ? all_floats(-kInfinity) : threshold;
    prefix = compose(prefix, {threshold, score, all_ints(static_cast<int32_t>(key))});
    if (kCount) {
      const Ints moves = current < threshold;
      current = moves ? score : current;
      accepted -= moves;  // a set lane is -1
    }
    if (__builtin_expect(proposal == sample_at, 0)) {
      rows.prefix = prefix;
      record(group, sample);
      sample_at = ++sample < schedule.samples ? schedule.proposal_of_sample(sample) : -1;
    }
  };

  for (int64_t block = begin / 4; 4 * block < end; ++block) {
    // A column of the tile is a line from every key's run: no hardware prefetcher sees that coming.
    for (int i = 0; i < 4; ++i) __builtin_prefetch(dots + (4 * block + i - begin + kPrefetchKeys) * tile.stride);
    const PhiloxBlock<Words> words = rows.draws.words(static_cast<uint32_t>(block));
    const Floats e[4] = {exponential(words.c0), exponential(words.c1), exponential(words.c2), exponential(words.c3)};
    const int64_t first = 4 * block;
    if (first >= begin && first + 4 <= end) {
      EMC2_UNROLL
      for (int i = 0; i < 4; ++i) propose(first + i, e[i]);
    } else {
      for (int64_t p = std::max(first, begin); p < std::min(first + 4, end); ++p) propose(p, e[p - first]);
    }
  }
  rows.prefix = prefix;
  rows.current = current;
  rows.accepted = accepted;
}

// Adds a tile to the running log-sum-exp of similarity / temperature: the largest score first, so that each needs one
// exponential.
void Sweep::add_lse(const Tile& tile, int64_t group) {
  RowGroup& rows = groups_[group];
  const float* dots = tile.dots + (group * kLanes - tile.row_begin);
  const auto score_of = [&](int64_t key) __attribute__((always_inline)) {
    const Floats score = load<Floats>(dots + (key - tile.key_begin) * tile.stride) * rows.inverse_temperature;
    Ints counts = score < kInfinity;
    if (walk_.query_ids) counts &= ~excluded(rows, key);
    return counts ? score : all_floats(-kInfinity);
  };
  Floats largest = rows.lse_max;
  for (int64_t key = tile.key_begin; key < tile.key_end; ++key) {
    const Floats score = score_of(key);
    largest = score > largest ? score : largest;
  }
  const Floats shift = largest > -kInfinity ? largest : all_floats(0.0f);
  Floats sum = rows.lse_sum * exp_nonpositive(rows.lse_max - shift);
  for (int64_t key = tile.key_begin; key < tile.key_end; ++key) sum += exp_nonpositive(score_of(key) - shift);
  rows.lse_max = largest;
  rows.lse_sum = sum;
}

RowTransition Sweep::prefix_of(const RowGroup& rows, int lane) const {
  const int32_t key = rows.prefix.position[lane];
  return {rows.prefix.threshold[lane], rows.prefix.score[lane], key < 0 ? -1 : walk_.schedule.first + key};
}

void Sweep::record(int64_t group, int64_t sample) const {
  const RowGroup& rows = groups_[group];
  const int64_t begin = group * kLanes;
  const int64_t end = std::min(begin + kLanes, walk_.rows);
  if (int32_t* samples = recorder_.step.samples) {
    const Ints reached = rows.state < rows.prefix.threshold ? rows.prefix.position : all_ints(-1);
    for (int64_t row = begin; row < end; ++row) samples[row * walk_.schedule.samples + sample] = reached[row - begin];
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    recorder_.sample(row, sample, prefix_of(rows, row - begin), rows.state[row - begin]);
  }
}

Sweep::Kernel Sweep::kernel() const {
  static constexpr Kernel kernels[2][2][2] = {
      {{&Sweep::walk_group<false, false, false>, &Sweep::walk_group<false, false, true>},
       {&Sweep::walk_group<false, true, false>, &Sweep::walk_group<false, true, true>}},
      {{&Sweep::walk_group<true, false, false>, &Sweep::walk_group<true, false, true>},
       {&Sweep::walk_group<true, true, false>, &Sweep::walk_group<true, true, true>}}};
  return kernels[walk_.query_ids != nullptr][walk_.log_proposal != nullptr][recorder_.step.accepted != nullptr];
}

// `prepare(group)` makes the scores of a group of rows, where they are not there yet.
template <class Prepare>
void Sweep::walk_groups(const Tile& tile, bool parallel, Prepare prepare) {
  const Kernel walk_one = kernel();
  const int64_t first = tile.row_begin / kLanes;
  const int64_t last = (tile.row_end + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(dynamic) num_threads(walk_.threads) if (parallel)
  for (int64_t group = first; group < last; ++group) {
    prepare(group);
    if (tile.key_begin == 0) start(group);
    (this->*walk_one)(tile, group);
    if (recorder_.step.lse) add_lse(tile, group);
    if (tile.key_end == walk_.keys) end(group);
  }
}

void Sweep::walk(const Tile& tile) {
  const int64_t elements = (tile.row_end - tile.row_begin) * (tile.key_end - tile.key_begin);
  walk_groups(tile, elements >= kParallelElements, [](int64_t) {});
}

template <class Element>
void Sweep::walk_small_of(const Operands& operands) {
  const int64_t stride = static_cast<int64_t>(groups_.size()) * kLanes;
  std::vector<float> dots(stride * walk_.keys);
  const bool parallel = walk_.rows * walk_.keys * operands.dim >= kParallelMultiplies;
  walk_groups({dots.data(), stride, 0, walk_.rows, 0, walk_.keys}, parallel, [&](int64_t group) {
    group_products(static_cast<const Element*>(operands.queries), operands.query_stride, group * kLanes, walk_.rows,
                   static_cast<const Element*>(operands.keys), operands.key_stride, walk_.keys, operands.dim,
                   dots.data() + group * kLanes, stride);
  });
}

void Sweep::walk_small(const Operands& operands) {
  with_element(operands.dtype, [&](auto element) { walk_small_of<decltype(element)>(operands); });
}

}  // namespace emc2
