#include "sweep.h"

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "small_matmul.h"

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

Sweep::Sweep(const Walk& walk) : walk_(walk), groups_((walk.num_rows + kLanes - 1) / kLanes) { require_walk(walk); }

void Sweep::start(int64_t group) {
  RowGroup& rows = groups_[group];
  const int64_t begin = group * kLanes;
  const Words chain_low = low_words(walk_.chain_ids, begin, walk_.num_rows, 0);
  const Words chain_high = low_words(walk_.chain_ids, begin, walk_.num_rows, 32);
  const Words tag = chain_high << 8 | counter_tag(0, kAcceptanceStream);
  rows.draws = VectorPhilox(philox_key(walk_.seed_value()), walk_.step_value(), chain_low, tag);
  if (walk_.query_ids) {
    rows.query_id_low = low_words(walk_.query_ids, begin, walk_.num_rows, 0);
    rows.query_id_high = low_words(walk_.query_ids, begin, walk_.num_rows, 32);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = std::min(begin + lane, walk_.num_rows - 1);
    rows.inverse_temperature[lane] = 1.0f / walk_.row_temperature(row);
    rows.state[lane] = incoming_score(walk_, row);
  }
  rows.prefix = {all_floats(-kInfinity), all_floats(-kInfinity), all_ints(-1)};
  rows.current = rows.state;
  rows.accepted = all_ints(0);
  rows.lse_max = all_floats(-kInfinity);
  rows.lse_sum = all_floats(0.0f);
  // What was due before this shard, the shard leaves alone.
  for (int64_t r = 0; r < walk_.count_samples(walk_.first_proposal); ++r) write_samples(group, r);
}

void Sweep::end(int64_t group) const {
  const RowGroup& rows = groups_[group];
  // What is due after this shard is left at the shard's own last state.
  for (int64_t r = walk_.count_samples(walk_.end_proposal()); r < walk_.num_samples; ++r) write_samples(group, r);
  for (int64_t row = group * kLanes; row < std::min((group + 1) * kLanes, walk_.num_rows); ++row) {
    const int lane = row % kLanes;
    write_end(walk_, row, lane_prefix(rows, lane), rows.state[lane]);
    if (walk_.step_output.accepted) walk_.step_output.accepted[row] = rows.accepted[lane];
    if (walk_.step_output.lse) walk_.step_output.lse[row] = rows.lse_max[lane] + std::log(rows.lse_sum[lane]);
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
  const float* dots = tile.dots + (group * kLanes - tile.row_begin);
  const int64_t begin = walk_.first_proposal + tile.key_begin;
  const int64_t end = walk_.first_proposal + tile.key_end;
  int64_t sample = walk_.count_samples(begin);
  int64_t sample_at = sample < walk_.num_samples ? walk_.sample_point(sample) : -1;
  // Locals stay in registers; through `rows` each proposal would store them.
  auto prefix = rows.prefix;
  Floats current = rows.current;
  Ints accepted = rows.accepted;

  const auto propose = [&](int64_t proposal, Floats e) __attribute__((always_inline)) {
    const int64_t key = proposal - walk_.first_proposal;
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
      write_samples(group, sample);
      sample_at = ++sample < walk_.num_samples ? walk_.sample_point(sample) : -1;
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

RowTransition Sweep::lane_prefix(const RowGroup& rows, int lane) const {
  const int32_t key = rows.prefix.position[lane];
  return {rows.prefix.threshold[lane], rows.prefix.score[lane], key < 0 ? -1 : walk_.first_proposal + key};
}

void Sweep::write_samples(int64_t group, int64_t sample) const {
  const RowGroup& rows = groups_[group];
  const int64_t begin = group * kLanes;
  const int64_t end = std::min(begin + kLanes, walk_.num_rows);
  if (int32_t* samples = walk_.step_output.samples) {
    const Ints reached = rows.state < rows.prefix.threshold ? rows.prefix.position : all_ints(-1);
    for (int64_t row = begin; row < end; ++row) samples[row * walk_.num_samples + sample] = reached[row - begin];
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    write_sample(walk_, row, sample, lane_prefix(rows, row - begin), rows.state[row - begin]);
  }
}

Sweep::Kernel Sweep::kernel() const {
  static constexpr Kernel kernels[2][2][2] = {
      {{&Sweep::walk_group<false, false, false>, &Sweep::walk_group<false, false, true>},
       {&Sweep::walk_group<false, true, false>, &Sweep::walk_group<false, true, true>}},
      {{&Sweep::walk_group<true, false, false>, &Sweep::walk_group<true, false, true>},
       {&Sweep::walk_group<true, true, false>, &Sweep::walk_group<true, true, true>}}};
  return kernels[walk_.query_ids != nullptr][walk_.log_proposal != nullptr][walk_.step_output.accepted != nullptr];
}

// `prepare(group)` makes the scores of a group of rows, where they are not there yet.
template <class Prepare>
void Sweep::walk_groups(const Tile& tile, bool parallel, Prepare prepare) {
  const Kernel walk_one = kernel();
  const int64_t first = tile.row_begin / kLanes;
  const int64_t last = (tile.row_end + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(dynamic) num_threads(walk_.num_threads) if (parallel)
  for (int64_t group = first; group < last; ++group) {
    prepare(group);
    if (tile.key_begin == 0) start(group);
    (this->*walk_one)(tile, group);
    if (walk_.step_output.lse) add_lse(tile, group);
    if (tile.key_end == walk_.num_keys) end(group);
  }
}

void Sweep::walk(const Tile& tile) {
  const int64_t elements = (tile.row_end - tile.row_begin) * (tile.key_end - tile.key_begin);
  walk_groups(tile, elements >= kParallelElements, [](int64_t) {});
}

template <class Element>
void Sweep::walk_small() {
  const Operands& operands = walk_.operands;
  const int64_t stride = static_cast<int64_t>(groups_.size()) * kLanes;
  std::vector<float> dots(stride * walk_.num_keys);
  const bool parallel = walk_.num_rows * walk_.num_keys * operands.dim >= kParallelMultiplies;
  walk_groups({dots.data(), stride, 0, walk_.num_rows, 0, walk_.num_keys}, parallel, [&](int64_t group) {
    group_products(static_cast<const Element*>(operands.queries), operands.query_stride, group * kLanes, walk_.num_rows,
                   static_cast<const Element*>(operands.keys), operands.key_stride, walk_.num_keys, operands.dim,
                   dots.data() + group * kLanes, stride);
  });
}

void Sweep::walk_small() {
  dispatch_dtype(walk_.operands.dtype, [&](auto element) { walk_small<decltype(element)>(); });
}

}  // namespace emc2
