// Draws of small problems from the softmax by the plain formula: argmax of score + Gumbel noise, in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/race.h"
#include "problem.h"

// Words of all magnitudes from either end, and some of all that lie between.
template <class Check>
void for_some_words(Check check) {
  const auto both_ends = [&](uint32_t first) {
    Words words{};
    for (int i = 0; i < emc2::kLanes; ++i) words[i] = first + 37 * i;
    check(words), check(~words);
  };
  for (uint32_t first = 0; first < 1u << 16; ++first) both_ends(first);
  for (int bit = 16; bit < 32; ++bit) {
    for (uint32_t i = 0; i < 1u << 14; ++i) both_ends((1u << bit) + i * (1u << (bit - 14)));
  }
}

inline void rough_noise_is_near_the_noise_and_the_bound_above_it() {
  double worst = 0, over = 0, under = 0;
  for_some_words([&](const Words& words) {
    const emc2::Floats rough = emc2::rough_gumbel_noise(words), bound = emc2::log_bound(words);
    for (int i = 0; i < emc2::kLanes; ++i) {
      worst = std::max(worst, std::fabs(rough[i] - emc2::gumbel_noise(words[i])));
      const double slack = std::log((words[i] + 0.5) / 4294967296.0) + 158 * std::log(2.0) - bound[i];
      over = std::max(over, -slack), under = std::max(under, words[i] >= 1 << 10 ? slack : 0);
    }
  });
  std::printf("rough noise: off by at most %.3g; bound on the logarithm: above by %.3g, below by %.3g\n", worst, over,
              under);
  CHECK(worst <= emc2::kNoiseError, "%.3g", worst);
  CHECK(over <= 7.2e-6 && under <= 0.061, "%.3g above, %.3g below", over, under);
}

// argmax of score + noise by the formula, all keys of all samples.
inline std::vector<int64_t> draws_by_the_book(const Problem& problem, int64_t samples) {
  std::vector<int64_t> positions;
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t sample = 0; sample < samples; ++sample) {
      double best = -static_cast<double>(kInfinity);
      int64_t position = -1;
      for (int64_t key = 0; key < problem.keys; ++key) {
        const double score = problem.dot(row, key) * 2.0 - problem.log_proposal[key];
        const double value = score + problem.gumbel_noise(row, emc2::kGumbelStream, key, sample);
        if (!problem.excluded(row, key) && value > best) best = value, position = key;
      }
      positions.push_back(position);
    }
  }
  return positions;
}

// What chains bring along, and where they end; poisoned, so that what is not written shows.
struct IsirStates {
  std::vector<int64_t> own_key, position, key;
  std::vector<float> own_score, score, lse;
  std::vector<double> value;

  IsirStates(int64_t rows, int64_t own)
      : own_key(rows * own),
        position(rows, -77),
        key(rows, -77),
        own_score(rows * own),
        score(rows, -77.0f),
        lse(rows, -77.0f),
        value(rows, -77.0) {
    for (int64_t& label : own_key) label = random_below(1000) << 32;
    for (float& own : own_score) own = random_below(4) ? static_cast<float>(random_below(9)) : kInfinity;
  }
};

inline void check_isir_row(const Problem& problem, const IsirStates& got, int64_t row, int64_t own, int64_t first_key) {
  int64_t position = -1, key = -1;
  double score = -static_cast<double>(kInfinity), value = score, total = 0;
  const auto candidate = [&](double of_candidate, double noise, int64_t at, int64_t label) {
    total += std::exp(of_candidate);
    if (of_candidate + noise > value) position = at, key = label, score = of_candidate, value = of_candidate + noise;
  };
  for (int64_t c = 0; c < own; ++c) {
    const int64_t at = row * own + c;
    if (got.own_score[at] < kInfinity)
      candidate(got.own_score[at], problem.gumbel_noise(row, emc2::kCarriedStream, c), -1 - c, got.own_key[at]);
  }
  for (int64_t k = 0; k < problem.keys; ++k) {
    const double of_key = problem.dot(row, k) * 2.0 - problem.log_proposal[k];
    if (!problem.excluded(row, k))
      candidate(of_key, problem.gumbel_noise(row, emc2::kGumbelStream, first_key + k), first_key + k,
                problem.key_ids[k]);
  }
  CHECK(got.position[row] == position && got.key[row] == key, "row %d of %d, %d keys: position %lld, not %lld",
        int(row), int(problem.rows), int(problem.keys), static_cast<long long>(got.position[row]),
        static_cast<long long>(position));
  CHECK(got.score[row] == score, "score %g, not %g", got.score[row], score);
  CHECK(got.value[row] == value || std::fabs(got.value[row] - value) < 1e-12, "value %g, not %g", got.value[row],
        value);
  const double lse = std::log(total);
  CHECK(got.lse[row] == lse || std::fabs(got.lse[row] - lse) < 1e-5 * (1 + std::fabs(lse)), "log-sum-exp %g, not %g",
        got.lse[row], lse);
}
