// Small walks for the core, and what they must come to: a loop over the proposals.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/gathered.h"
#include "cpu/simd.h"

using emc2::kInfinity;
using emc2::Words;

// A walk whose scores are small integers: exact in every order of addition, so that the kernels must agree to the last
// bit with a loop over the proposals.
struct Problem {
  int64_t rows, keys, dim;
  emc2::Schedule schedule;
  bool steps;  // whether chains enter it, or it is wanted as a transition
  std::vector<float> queries, key_rows;
  std::vector<int64_t> chain_ids, query_ids, key_ids, carried_ids, state_key;
  std::vector<float> state_score, log_proposal;
  uint64_t seed = (1ull << 63) + 5;
  uint32_t step = 0xfffffffeu;

  Problem(int64_t rows, int64_t keys, int64_t dim, emc2::Schedule schedule, bool steps)
      : rows(rows),
        keys(keys),
        dim(dim),
        schedule(schedule),
        steps(steps),
        queries(rows * dim),
        key_rows(keys * dim),
        chain_ids(rows),
        query_ids(rows),
        key_ids(keys),
        carried_ids(rows),
        state_key(rows),
        state_score(rows),
        log_proposal(keys) {
    for (float& value : queries) value = static_cast<float>(random_below(5) - 2);
    for (float& value : key_rows) value = static_cast<float>(random_below(5) - 2);
    // Past 2^32, and so few that many pairs agree in one half of their bits only.
    for (int64_t& id : query_ids) id = random_below(3) + (random_below(3) << 32);
    for (int64_t& id : key_ids) id = random_below(3) + (random_below(3) << 32);
    for (int64_t& id : carried_ids) id = random_below(3) + (random_below(3) << 32);
    for (float& value : log_proposal) value = static_cast<float>(random_below(5) - 2);
    for (int64_t row = 0; row < rows; ++row) {
      chain_ids[row] = static_cast<int64_t>(random_bits() >> 24);
      state_key[row] = 1000 + row;
      state_score[row] = row % 3 ? static_cast<float>(random_below(9)) : row % 2 ? -kInfinity : std::nanf("");
    }
  }

  emc2::Operands operands() const { return {queries.data(), key_rows.data(), dim, dim, dim, emc2::Dtype::kFloat32}; }

  float dot(int64_t row, int64_t key) const {
    float sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += queries[row * dim + i] * key_rows[key * dim + i];
    return sum;
  }

  // For what looks at every key; walks have neither a second id nor, here, a law.
  bool excluded(int64_t row, int64_t key) const {
    return key_ids[key] == query_ids[row] || key_ids[key] == carried_ids[row];
  }

  void set_ids_and_law(emc2::ScoreParams& scores) const {
    scores.query_ids = query_ids.data(), scores.key_ids = key_ids.data(), scores.carried_ids = carried_ids.data();
    scores.log_proposal = log_proposal.data();
  }

  emc2::PhiloxBlock<uint32_t> words(int64_t row, emc2::Stream stream, int64_t block, int64_t sample = 0) const {
    const auto counter =
        emc2::philox_counter(chain_ids[row], stream, step, static_cast<uint32_t>(block), static_cast<uint32_t>(sample));
    return emc2::philox_rounds(counter, emc2::philox_key(seed));
  }

  double gumbel_noise(int64_t row, emc2::Stream stream, int64_t number, int64_t sample = 0) const {
    const auto block = words(row, stream, number / 4, sample);
    const uint32_t word[] = {block.c0, block.c1, block.c2, block.c3};
    return -std::log(-std::log1p(-(word[number % 4] + 0.5) / 4294967296.0));
  }

  float e(int64_t row, int64_t proposal) const {
    const auto block = words(row, emc2::kAcceptanceStream, proposal / 4);
    const uint32_t word[] = {block.c0, block.c1, block.c2, block.c3};
    return emc2::exponential(Words{} + word[proposal % 4])[0];
  }

  int64_t drawn_position(int64_t row, int64_t proposal) const {
    const auto block = words(row, emc2::kPositionStream, proposal / 2);
    return static_cast<int64_t>(proposal % 2 ? emc2::scale_to_range(block.c2, block.c3, keys)
                                             : emc2::scale_to_range(block.c0, block.c1, keys));
  }
};

// What a walk leaves; poisoned, so that what is not written shows.
struct Results {
  std::vector<int32_t> samples, accepted;
  std::vector<int64_t> key, position_at;
  std::vector<float> score, threshold, score_at, threshold_at;

  explicit Results(const Problem& problem) {
    const int64_t rows = problem.rows, sampled = rows * problem.schedule.num_samples;
    if (problem.steps) {
      samples.resize(sampled, -77), accepted.resize(rows, -77), key.resize(rows, -77);
      score.resize(rows, -77.0f), threshold.resize(rows, -77.0f);
    } else {
      position_at.resize(sampled, -77), score_at.resize(sampled, -77.0f), threshold_at.resize(sampled, -77.0f);
    }
  }

  emc2::Walk walk(const Problem& problem, int threads) {
    emc2::Walk walk{};
    static_cast<emc2::Schedule&>(walk) = problem.schedule;
    walk.num_rows = problem.rows, walk.num_keys = problem.keys, walk.operands = problem.operands();
    walk.seed = problem.seed, walk.step = problem.step, walk.temperature = 0.5f, walk.num_threads = threads;
    walk.chain_ids = problem.chain_ids.data();
    walk.query_ids = problem.query_ids.data(), walk.key_ids = problem.key_ids.data();
    if (problem.steps) {
      walk.input = {problem.state_key.data(), problem.state_score.data(), problem.key_ids.data()};
      walk.step_output = {samples.data(), key.data(), score.data(), threshold.data(), accepted.data(), nullptr};
    } else {
      walk.transition_output = {threshold_at.data(), score_at.data(), position_at.data()};
    }
    return walk;
  }
};

// A chain as the method describes it: one proposal after another, accepted or not. A transition is the walk of a chain
// that enters it at -inf. `numbered` positions are those in the whole walk, of a sweep.
template <class KeyOfProposal>
Results walk_by_the_book(const Problem& problem, KeyOfProposal key_of, bool numbered) {
  Results out(problem);
  const emc2::Schedule& schedule = problem.schedule;
  for (int64_t row = 0; row < problem.rows; ++row) {
    float current = problem.steps ? problem.state_score[row] : -kInfinity;
    if (std::isnan(current)) current = -kInfinity;
    int64_t key = current > -kInfinity ? problem.state_key[row] : -1;
    int64_t position = -1;
    float threshold = -kInfinity;
    int32_t accepted = 0;
    for (int64_t p = std::min(schedule.first_proposal, schedule.burn_in); p < schedule.total_proposals; ++p) {
      const bool in_shard = p >= schedule.first_proposal && p < schedule.end_proposal();
      const int64_t proposed = in_shard ? key_of(row, p) : 0;
      if (in_shard && problem.key_ids[proposed] != problem.query_ids[row]) {
        const float score = problem.dot(row, proposed) * 2.0f, e = problem.e(row, p);
        threshold = std::max(threshold, score + e);
        if (score + e > current) {
          current = score, key = problem.key_ids[proposed], ++accepted;
          position = proposed + (numbered ? schedule.first_proposal : 0);
        }
      }
      for (int64_t r = 0; r < schedule.num_samples; ++r) {
        if (schedule.sample_point(r) != p) continue;
        const int64_t at = row * schedule.num_samples + r;
        if (problem.steps) {
          out.samples[at] = static_cast<int32_t>(position);
        } else {
          out.position_at[at] = position, out.score_at[at] = current, out.threshold_at[at] = threshold;
        }
      }
    }
    if (problem.steps)
      out.key[row] = key, out.score[row] = current, out.threshold[row] = threshold, out.accepted[row] = accepted;
  }
  return out;
}

inline void check_same(const Results& got, const Results& want, const char* walk) {
  CHECK(got.samples == want.samples, "%s", walk);
  CHECK(got.key == want.key, "%s", walk);
  CHECK(got.score == want.score, "%s", walk);
  CHECK(got.threshold == want.threshold, "%s", walk);
  CHECK(got.accepted == want.accepted, "%s", walk);
  CHECK(got.position_at == want.position_at, "%s", walk);
  CHECK(got.score_at == want.score_at, "%s", walk);
  CHECK(got.threshold_at == want.threshold_at, "%s", walk);
}
