#include "gathered.h"

#include <algorithm>
#include <vector>

#include "checks.h"
#include "dot.h"
#include "walk_output.h"

namespace emc2 {
namespace {

constexpr int kChunk = 4 * kLanes;    // proposals whose acceptance draws one vector call of the generator makes
constexpr int kPrefetchDistance = 4;  // keys; rows of a large bank come from memory
constexpr int64_t kParallelMultiplies = 1 << 16;

// Everything about the next kChunk proposals of one row but their scores. `first` is a multiple of kChunk.
struct Chunk {
  alignas(64) float e[kChunk];
  int64_t position[kChunk];
};

EMC2_HD PhiloxBlock<Words> chain_blocks(const StreamParams& streams, uint64_t chain, Stream stream,
                                        uint32_t first_block) {
  Words block;
  for (int lane = 0; lane < kLanes; ++lane) block[lane] = first_block + lane;
  const Words low = Words{} + static_cast<uint32_t>(chain), tag = Words{} + counter_tag(chain, stream),
              step = Words{} + streams.step_value();
  const auto state =
      philox_rounds<SplitWords>({split(block), split(low), split(tag), split(step)}, philox_key(streams.seed_value()));
  return {join(state.c0), join(state.c1), join(state.c2), join(state.c3)};
}

void draw_acceptance(const WalkParams& walk, uint64_t chain, int64_t first, Chunk& chunk) {
  const auto words = chain_blocks(walk, chain, kAcceptanceStream, static_cast<uint32_t>(first / 4));
  const Floats e[4] = {exponential(words.c0), exponential(words.c1), exponential(words.c2), exponential(words.c3)};
  for (int i = 0; i < kChunk; ++i) chunk.e[i] = e[i % 4][i / 4];
}

void draw_positions(const WalkParams& walk, uint64_t chain, int64_t first, Chunk& chunk) {
  for (int half = 0; half < 2; ++half) {  // a block has two positions, so the chunk takes two calls
    const auto words = chain_blocks(walk, chain, kPositionStream, static_cast<uint32_t>(first / 2 + half * kLanes));
    for (int lane = 0; lane < kLanes; ++lane) {
      int64_t* position = chunk.position + half * kChunk / 2 + 2 * lane;
      position[0] = scale_to_range(words.c0[lane], words.c1[lane], walk.num_keys);
      position[1] = scale_to_range(words.c2[lane], words.c3[lane], walk.num_keys);
    }
  }
}

template <class Element>
EMC2_HD void prefetch_row(const Element* row, int64_t dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (size_t offset = 0; offset < dim * sizeof(Element); offset += 64) __builtin_prefetch(bytes + offset);
}

// The scores of one row with any key, as the walk wants them.
template <class Element>
class RowScores {
 public:
  RowScores(const Walk& walk, int64_t row, float* query)
      : walk_(walk),
        keys_(static_cast<const Element*>(walk.operands.keys)),
        row_(row),
        query_(query),
        inverse_temperature_(1.0f / walk.row_temperature(row)) {
    const Operands& operands = walk.operands;
    load_row(static_cast<const Element*>(operands.queries) + row * operands.query_stride, operands.dim, query);
  }

  EMC2_HD const Element* key(int64_t position) const { return keys_ + position * walk_.operands.key_stride; }

  EMC2_HD float score(int64_t position) const {
    const float score = dot(query_, key(position), walk_.operands.dim) * inverse_temperature_;
    return walk_.log_proposal ? score - walk_.log_proposal[position] : score;
  }

  EMC2_HD bool excluded(int64_t position) const {
    return walk_.query_ids && walk_.query_ids[row_] == walk_.key_ids[position];
  }

 private:
  const Walk& walk_;
  const Element* keys_;
  int64_t row_;
  const float* query_;
  float inverse_temperature_;
};

// Draws the proposals from .. to - 1 of a row, all within one chunk.
void fill_chunk(const WalkParams& walk, int64_t row, int64_t from, int64_t to, Chunk& chunk) {
  const uint64_t chain = walk.chain(row);
  const int64_t first = from / kChunk * kChunk;
  draw_acceptance(walk, chain, first, chunk);
  if (walk.positions) {
    const int64_t* given = walk.positions + row * walk.position_stride - walk.first_proposal;
    std::copy(given + from, given + to, chunk.position + (from - first));
  } else {
    draw_positions(walk, chain, first, chunk);
  }
}

template <class Element>
void walk_row(const Walk& walk, int64_t row, float* query) {
  const RowScores<Element> scores(walk, row, query);
  const float state = incoming_score(walk, row);
  RowTransition prefix{-kInfinity, -kInfinity, -1};
  float current = state;
  int32_t accepted = 0;
  int64_t sample = 0;
  const auto record_until = [&](int64_t end) {
    for (; sample < end; ++sample) write_sample(walk, row, sample, prefix, state);
    return sample < walk.num_samples && walk.num_proposals ? walk.sample_point(sample) : -1;
  };

  const int64_t end = walk.end_proposal();
  int64_t sample_at = record_until(walk.count_samples(walk.first_proposal));
  for (int64_t from = walk.first_proposal, to; from < end; from = to) {
    to = std::min(from / kChunk * kChunk + kChunk, end);
    Chunk chunk;
    fill_chunk(walk, row, from, to, chunk);
    for (int64_t p = from; p < to; ++p) {
      if (p + kPrefetchDistance < to)
        prefetch_row(scores.key(chunk.position[(p + kPrefetchDistance) % kChunk]), walk.operands.dim);
      const int64_t key = chunk.position[p % kChunk];
      const float score = scores.score(key);
      const float threshold = score < kInfinity && !scores.excluded(key) ? score + chunk.e[p % kChunk] : -kInfinity;
      prefix = compose(prefix, {threshold, score, key});
      accepted += current < threshold;
      current = current < threshold ? score : current;
      if (p == sample_at) sample_at = record_until(sample + 1);
    }
  }
  record_until(walk.num_samples);
  write_end(walk, row, prefix, state);
  if (walk.step_output.accepted) walk.step_output.accepted[row] = accepted;
}

template <class Element>
void walk_rows(const Walk& walk) {
  const int64_t dim = walk.operands.dim, padded = padded_to_lanes(dim);
  const bool parallel = walk.num_rows * walk.num_proposals * dim >= kParallelMultiplies;
#pragma omp parallel num_threads(walk.num_threads) if (parallel)
  {
    std::vector<float> query(padded);
#pragma omp for schedule(dynamic, 8)
    for (int64_t row = 0; row < walk.num_rows; ++row) walk_row<Element>(walk, row, query.data());
  }
}

}  // namespace

void walk_gathered(const Walk& walk) {
  require_walk(walk);
  require(walk.num_keys > 0 || walk.num_proposals == 0, "proposal: there are no keys to propose");
  for (int64_t row = 0; row < walk.num_rows && walk.positions; ++row) {
    require_within(walk.positions + row * walk.position_stride, walk.num_proposals, walk.num_keys,
                   "proposal: a position that no key has");
  }
  dispatch_dtype(walk.operands.dtype, [&](auto element) { walk_rows<decltype(element)>(walk); });
}

}  // namespace emc2
