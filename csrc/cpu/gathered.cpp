#include "gathered.h"

#include <algorithm>
#include <vector>

#include "dot.h"
#include "values.h"

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

EMC2_HD PhiloxBlock<Words> chain_blocks(const Walk& walk, uint64_t chain, Stream stream, uint32_t first_block) {
  Words block;
  for (int lane = 0; lane < kLanes; ++lane) block[lane] = first_block + lane;
  const Words low = Words{} + static_cast<uint32_t>(chain), tag = Words{} + counter_tag(chain, stream),
              step = Words{} + walk.step;
  const auto state =
      philox_rounds<SplitWords>({split(block), split(low), split(tag), split(step)}, philox_key(walk.seed));
  return {join(state.c0), join(state.c1), join(state.c2), join(state.c3)};
}

void draw_acceptance(const Walk& walk, uint64_t chain, int64_t first, Chunk& chunk) {
  const auto words = chain_blocks(walk, chain, kAcceptanceStream, static_cast<uint32_t>(first / 4));
  const Floats e[4] = {exponential(words.c0), exponential(words.c1), exponential(words.c2), exponential(words.c3)};
  for (int i = 0; i < kChunk; ++i) chunk.e[i] = e[i % 4][i / 4];
}

void draw_positions(const Walk& walk, uint64_t chain, int64_t first, Chunk& chunk) {
  for (int half = 0; half < 2; ++half) {  // a block has two positions, so the chunk takes two calls
    const auto words = chain_blocks(walk, chain, kPositionStream, static_cast<uint32_t>(first / 2 + half * kLanes));
    for (int lane = 0; lane < kLanes; ++lane) {
      int64_t* position = chunk.position + half * kChunk / 2 + 2 * lane;
      position[0] = scale_to_range(words.c0[lane], words.c1[lane], walk.keys);
      position[1] = scale_to_range(words.c2[lane], words.c3[lane], walk.keys);
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
  RowScores(const Walk& walk, const Operands& operands, int64_t row, float* query)
      : walk_(walk), operands_(operands), keys_(static_cast<const Element*>(operands.keys)), row_(row), query_(query) {
    load_row(static_cast<const Element*>(operands.queries) + row * operands.query_stride, operands.dim, query);
    inverse_temperature_ = 1.0f / (walk.temperatures ? walk.temperatures[row] : walk.temperature);
  }

  EMC2_HD const Element* key(int64_t position) const { return keys_ + position * operands_.key_stride; }

  EMC2_HD float score(int64_t position) const {
    const float score = dot(query_, key(position), operands_.dim) * inverse_temperature_;
    return walk_.log_proposal ? score - walk_.log_proposal[position] : score;
  }

  EMC2_HD bool excluded(int64_t position) const {
    return walk_.query_ids && walk_.query_ids[row_] == walk_.key_ids[position];
  }

 private:
  const Walk& walk_;
  const Operands& operands_;
  const Element* keys_;
  int64_t row_;
  const float* query_;
  float inverse_temperature_;
};

// Draws the proposals from .. to - 1 of a row, all within one chunk.
void fill_chunk(const Walk& walk, const Positions& positions, int64_t row, int64_t from, int64_t to, Chunk& chunk) {
  const uint64_t chain = walk.chain_ids ? walk.chain_ids[row] : row;
  const int64_t first = from / kChunk * kChunk;
  draw_acceptance(walk, chain, first, chunk);
  if (positions.data) {
    const int64_t* given = positions.data + row * positions.stride - walk.schedule.first;
    std::copy(given + from, given + to, chunk.position + (from - first));
  } else {
    draw_positions(walk, chain, first, chunk);
  }
}

template <class Element>
void walk_row(const Recorder& recorder, const Operands& operands, const Positions& positions, int64_t row,
              float* query) {
  const Walk& walk = recorder.walk;
  const Schedule& schedule = walk.schedule;
  const RowScores<Element> scores(walk, operands, row, query);
  const float state = recorder.incoming(row);
  RowTransition prefix{-kInfinity, -kInfinity, -1};
  float current = state;
  int32_t accepted = 0;
  int64_t sample = 0;
  const auto record_until = [&](int64_t end) {
    for (; sample < end; ++sample) recorder.sample(row, sample, prefix, state);
    return sample < schedule.samples && schedule.count ? schedule.proposal_of_sample(sample) : -1;
  };

  const int64_t end = schedule.first + schedule.count;
  int64_t sample_at = record_until(schedule.samples_before(schedule.first));
  for (int64_t from = schedule.first, to; from < end; from = to) {
    to = std::min(from / kChunk * kChunk + kChunk, end);
    Chunk chunk;
    fill_chunk(walk, positions, row, from, to, chunk);
    for (int64_t p = from; p < to; ++p) {
      if (p + kPrefetchDistance < to)
        prefetch_row(scores.key(chunk.position[(p + kPrefetchDistance) % kChunk]), operands.dim);
      const int64_t key = chunk.position[p % kChunk];
      const float score = scores.score(key);
      const float threshold = score < kInfinity && !scores.excluded(key) ? score + chunk.e[p % kChunk] : -kInfinity;
      prefix = compose(prefix, {threshold, score, key});
      accepted += current < threshold;
      current = current < threshold ? score : current;
      if (p == sample_at) sample_at = record_until(sample + 1);
    }
  }
  record_until(schedule.samples);
  recorder.end(row, prefix, state);
  if (recorder.step.accepted) recorder.step.accepted[row] = accepted;
}

template <class Element>
void walk_rows(const Recorder& recorder, const Operands& operands, const Positions& positions) {
  const Walk& walk = recorder.walk;
  const int64_t padded = (operands.dim + kLanes - 1) / kLanes * kLanes;
  const bool parallel = walk.rows * walk.schedule.count * operands.dim >= kParallelMultiplies;
#pragma omp parallel num_threads(walk.threads) if (parallel)
  {
    std::vector<float> query(padded);
#pragma omp for schedule(dynamic, 8)
    for (int64_t row = 0; row < walk.rows; ++row) walk_row<Element>(recorder, operands, positions, row, query.data());
  }
}

}  // namespace

void walk_gathered(const Recorder& recorder, const Operands& operands, const Positions& positions) {
  const Walk& walk = recorder.walk;
  require_sound(walk);
  require(walk.keys > 0 || walk.schedule.count == 0, "proposal: there are no keys to propose");
  for (int64_t row = 0; row < walk.rows && positions.data; ++row) {
    require_within(positions.data + row * positions.stride, walk.schedule.count, walk.keys,
                   "proposal: a position that no key has");
  }
  with_element(operands.dtype, [&](auto element) { walk_rows<decltype(element)>(recorder, operands, positions); });
}

}  // namespace emc2
