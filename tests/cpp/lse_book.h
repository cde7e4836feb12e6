// Log-sum-exps of small problems, and the gradient of their weighted sum, by the plain formula in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "problem.h"

// Rows of a problem, whose keys may be its own queries. Weights and temperatures are small integers.
struct LseProblem : Problem {
  bool symmetric;
  std::vector<float> temperatures, weights;

  LseProblem(int64_t rows, int64_t keys, int64_t dim, bool symmetric)
      : Problem(rows, keys, dim, {keys, 0, keys, 0, 1}, true), symmetric(symmetric), temperatures(rows), weights(rows) {
    for (float& value : temperatures) value = 2.0f + static_cast<float>(random_below(5));
    for (float& value : weights) value = static_cast<float>(random_below(7)) - 3.0f;
    if (symmetric) key_rows = queries, key_ids = query_ids;
  }

  void set(emc2::ScoreParams& scores) const {
    scores.num_rows = rows, scores.num_keys = keys;
    scores.temperatures = temperatures.data(), scores.temperature_stride = 1;
    set_ids_and_law(scores);
  }
};

struct LseBook {
  std::vector<double> lse, d_queries, d_keys, d_temperatures;

  explicit LseBook(const LseProblem& problem)
      : lse(problem.rows),
        d_queries(problem.rows * problem.dim),
        d_keys(problem.keys * problem.dim),
        d_temperatures(problem.rows) {
    for (int64_t row = 0; row < problem.rows; ++row) add_row(problem, row);
  }

 private:
  void add_row(const LseProblem& problem, int64_t row) {
    const double temperature = problem.temperatures[row];
    const auto score = [&](int64_t key) {
      const double similarity = problem.dot(row, key) / temperature;  // the dot is exact
      return problem.excluded(row, key) ? -static_cast<double>(kInfinity) : similarity - problem.log_proposal[key];
    };
    double total = 0;
    for (int64_t key = 0; key < problem.keys; ++key) total += std::exp(score(key));
    lse[row] = std::log(total);
    std::vector<double>& of_keys = problem.symmetric ? d_queries : d_keys;
    for (int64_t key = 0; key < problem.keys; ++key) {
      if (score(key) == -static_cast<double>(kInfinity)) continue;
      const double share = std::exp(score(key) - lse[row]) * problem.weights[row] / temperature;
      for (int64_t i = 0; i < problem.dim; ++i) {
        d_queries[row * problem.dim + i] += share * problem.key_rows[key * problem.dim + i];
        of_keys[key * problem.dim + i] += share * problem.queries[row * problem.dim + i];
      }
      d_temperatures[row] -= share * problem.dot(row, key) / temperature;
    }
  }
};
