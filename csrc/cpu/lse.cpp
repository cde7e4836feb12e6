#include "lse.h"

#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"
#include "row_vector.h"
#include "running_lse.h"
#include "score_tiles.h"

namespace emc2 {
namespace {

constexpr int64_t kExponential = 16;  // operations of a score beside its product

class LogSumExp {
 public:
  struct Group {
    RowVector rows[kGroupVectors];
    RunningLse lse[kGroupVectors];
  };

  explicit LogSumExp(const LseParams& params) : params_(params) {}

  void start(Group& group, int64_t number) const {
    for (int v = 0; v < kGroupVectors; ++v) {
      group.rows[v] = RowVector(params_, number * kGroupRows + v * kLanes);
      group.lse[v] = RunningLse();
    }
  }

  void walk(Group& group, const ScoreTile& tile) const {
    Floats scores[kTileVectors];
    for (int64_t i = 0; i < tile.count(); ++i) {
      for (int v = 0; v < tile.vectors; ++v) {
        const int64_t at = i * kGroupVectors + v;
        scores[at] = group.rows[v].score(params_, tile.dots[at], tile.key_begin + i);
      }
    }
    for (int v = 0; v < tile.vectors; ++v) group.lse[v].add(scores + v, tile.count(), kGroupVectors);
  }

  void end(const Group& group) const {
    for (int v = 0; v < kGroupVectors; ++v) {
      const RowVector& rows = group.rows[v];
      for (int64_t row = rows.begin; row < rows.end; ++row) params_.lse[row] = group.lse[v].value(row - rows.begin);
    }
  }

 private:
  const LseParams& params_;
};

// What the gradient of the log-sum-exps takes from each query that has one: its share of a key is coefficient *
// exp(score - level), with coefficient = d_lse / temperature.
struct Shares {
  std::vector<float> coefficient, level, inverse_temperature;

  explicit Shares(const LseGradientParams& params)
      : coefficient(params.num_rows), level(params.num_rows), inverse_temperature(params.num_rows) {
    for (int64_t row = 0; row < params.num_rows; ++row) {
      const bool has_keys = params.lse[row] > -kInfinity;
      inverse_temperature[row] = 1.0f / params.row_temperature(row);
      coefficient[row] = has_keys ? params.grad[row] * inverse_temperature[row] : 0.0f;
      level[row] = has_keys ? params.lse[row] : 0.0f;
    }
  }
};

Floats lanes_of(const float* values, int64_t begin, int64_t count) {
  Floats lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[std::min(begin + lane, count - 1)];
  return lanes;
}

// kLanes neighbouring queries, and their shares of a key.
struct QueryVector {
  RowVector rows;
  Floats coefficient, level;

  QueryVector() = default;

  QueryVector(const ScoreParams& params, const Shares& shares, int64_t begin)
      : rows(params, begin),
        coefficient(lanes_of(shares.coefficient.data(), begin, params.num_rows)),
        level(lanes_of(shares.level.data(), begin, params.num_rows)) {}

  EMC2_HD Floats share(const ScoreParams& params, Floats dot, int64_t key) const {
    return coefficient * exp_nonpositive(rows.score(params, dot, key) - level);
  }
};

// kLanes neighbouring keys, and a query's shares of them.
struct KeyVector {
  IdVector ids;
  Floats log_proposal{};

  KeyVector() = default;

  KeyVector(const ScoreParams& params, int64_t begin) {
    if (params.key_ids) ids = IdVector(params.key_ids, begin, params.num_keys);
    if (params.log_proposal) log_proposal = lanes_of(params.log_proposal, begin, params.num_keys);
  }

  EMC2_HD Floats share(const ScoreParams& params, const Shares& shares, Floats dot, int64_t query) const {
    const Floats score = dot * shares.inverse_temperature[query] - log_proposal;
    Ints counts = score < kInfinity;
    if (params.query_ids) counts &= ~ids.equal(params.query_ids[query]);
    if (params.carried_ids) counts &= ~ids.equal(params.carried_ids[query]);
    const Floats counted = counts ? score : all_floats(-kInfinity);
    return shares.coefficient[query] * exp_nonpositive(counted - shares.level[query]);
  }
};

// What the rows of tiles are: queries; keys, and then the tiles' keys are the queries; or both, of one operand.
enum class Rows { kQueries, kKeys, kBoth };

// The gradient of rows: sum over the tiles' keys of the row's share of the key, and of the key's share of the row,
// times the key.
//
// Roofline: as the scores, twice.
class Gradient {
 public:
  struct Group {
    int64_t number;
    QueryVector queries[kGroupVectors];
    KeyVector keys[kGroupVectors];
    Floats d_temperature[kGroupVectors];
    std::vector<Floats> sums;  // as load_columns leaves queries
  };

  Gradient(const LseGradientParams& params, const Shares& shares, Rows rows)
      : params_(params),
        shares_(shares),
        are_queries_(rows != Rows::kKeys),
        are_keys_(rows != Rows::kQueries),
        gradient_(are_queries_ ? params.d_queries : params.d_keys),
        d_temperatures_(are_queries_ ? params.d_temperatures : nullptr) {}

  bool finite() const { return finite_; }  // whether all of the gradient is

  void start(Group& group, int64_t number) const {
    group.number = number;
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t begin = number * kGroupRows + v * kLanes;
      if (are_queries_) group.queries[v] = QueryVector(params_, shares_, begin);
      if (are_keys_) group.keys[v] = KeyVector(params_, begin);
      group.d_temperature[v] = Floats{};
    }
    group.sums.assign(params_.operands.dim * kGroupVectors, Floats{});
  }

  void walk(Group& group, const ScoreTile& tile) const {
    Floats weights[kTileVectors];
    Floats d_temperature[kGroupVectors] = {};  // of the tile, for the reason of add_products
    for (int64_t i = 0; i < tile.count(); ++i) {
      for (int v = 0; v < tile.vectors; ++v) {
        const int64_t at = i * kGroupVectors + v;
        weights[at] = weight(group, v, tile.dots[at], tile.key_begin + i, d_temperature[v]);
      }
    }
    tile.keys->add_weighted(weights, tile.count(), params_.operands.dim, tile.vectors, group.sums.data());
    for (int v = 0; v < tile.vectors; ++v) group.d_temperature[v] += d_temperature[v];
  }

  void end(const Group& group) {
    const int64_t num_rows = are_queries_ ? params_.num_rows : params_.num_keys;
    bool finite = true;
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t begin = group.number * kGroupRows + v * kLanes, end = std::min(begin + kLanes, num_rows);
      finite &= store_rows(group.sums.data() + v, begin, end, params_.operands.dim, gradient_);
      for (int64_t row = begin; row < end && d_temperatures_; ++row)
        d_temperatures_[row] = group.d_temperature[v][row - begin];
    }
    if (finite) return;
#pragma omp atomic write
    finite_ = false;
  }

 private:
  EMC2_HD Floats weight(const Group& group, int v, Floats dot, int64_t key, Floats& d_temperature) const {
    Floats weight{};
    if (are_queries_) {
      const QueryVector& queries = group.queries[v];
      const Floats share = queries.share(params_, dot, key);
      weight = share;
      if (d_temperatures_) {
        // d lse / d temperature = -sum of exp(score - lse) * similarity / temperature^2, g being no part of it; what is
        // left out has none.
        const Floats similarity = dot * queries.rows.inverse_temperature;
        d_temperature -= share > 0.0f || share < 0.0f ? share * similarity : Floats{};
      }
    }
    if (are_keys_) weight += group.keys[v].share(params_, shares_, dot, key);
    return weight;
  }

  const LseGradientParams& params_;
  const Shares& shares_;
  bool are_queries_, are_keys_;
  float *gradient_, *d_temperatures_;
  bool finite_ = true;
};

// (count, dim) float32 rows: those that are finite, and zeros in the place of others.
template <class Element>
std::vector<float> finite_rows(const Element* rows, int64_t stride, int64_t count, int64_t dim) {
  const int64_t padded = padded_to_lanes(dim);
  std::vector<float> copies(count * padded);
  for (int64_t row = 0; row < count; ++row) {
    float* copy = copies.data() + row * padded;
    load_row(rows + row * stride, dim, copy);
    if (!all_of(copy, dim, [](float value) { return std::fabs(value) < kInfinity; })) std::fill(copy, copy + dim, 0.0f);
  }
  return copies;
}

void write_gradient(const LseGradientParams& params, const Shares& shares, Rows rows) {
  Operands operands = params.operands;
  int64_t num_rows = params.num_rows, num_keys = params.num_keys;
  if (rows == Rows::kKeys) {
    std::swap(operands.queries, operands.keys);
    std::swap(operands.query_stride, operands.key_stride);
    std::swap(num_rows, num_keys);
  }
  const Blocking blocking(num_rows, num_keys, operands.dim, operands.dim + kExponential, params.num_threads);
  Gradient walker(params, shares, rows);
  dispatch_dtype(operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(operands, blocking, walker); });
  if (walker.finite()) return;
  // A key that is not finite has no share, but 0 * NaN is NaN: again, with zeros in its place. Rows stay as they are.
  Gradient again(params, shares, rows);
  dispatch_dtype(operands.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* keys = static_cast<const Element*>(operands.keys);
    const std::vector<float> finite = finite_rows(keys, operands.key_stride, num_keys, operands.dim);
    walk_score_tiles<Element>(operands, blocking, again, finite.data());
  });
}

}  // namespace

void contrastive_lse(const LseParams& params) {
  require_scores(params);
  const Blocking blocking(params.num_rows, params.num_keys, params.operands.dim, kExponential, params.num_threads);
  LogSumExp walker(params);
  dispatch_dtype(params.operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(params.operands, blocking, walker); });
}

void contrastive_lse_backward(const LseGradientParams& params) {
  require_scores(params);
  const Shares shares(params);
  write_gradient(params, shares, params.symmetric ? Rows::kBoth : Rows::kQueries);
  if (!params.symmetric && params.d_keys) write_gradient(params, shares, Rows::kKeys);
}

}  // namespace emc2
