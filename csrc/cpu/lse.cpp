#include "lse.h"

#include <cmath>
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

// What the gradient of the log-sum-exps takes from each row that has one: its share of a key is
// coefficient * exp(similarity * inverse_temperature - level), with coefficient = d_lse / temperature.
struct Shares {
  std::vector<float> coefficient, level, inverse_temperature;

  Shares() = default;

  explicit Shares(const LseGradientParams& params)
      : coefficient(params.num_rows), level(params.num_rows), inverse_temperature(params.num_rows) {
    for (int64_t row = 0; row < params.num_rows; ++row) {
      const bool has_keys = params.lse[row] > -kInfinity;
      inverse_temperature[row] = 1.0f / params.row_temperature(row);
      coefficient[row] = has_keys ? params.grad[row] * inverse_temperature[row] : 0.0f;
      level[row] = has_keys ? params.lse[row] : 0.0f;
    }
  }

  Floats lanes(const std::vector<float>& values, int64_t begin) const {
    Floats lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[std::min<int64_t>(begin + lane, values.size() - 1)];
    return lanes;
  }
};

// The gradient of operands: sum over keys of the row's share of the key, and of the key's share of the row, times the
// key. Rows have shares where they are queries, keys have where they are.
//
// Roofline: as the scores, twice.
class Gradient {
 public:
  struct Group {
    RowVector rows[kGroupVectors];
    Floats coefficient[kGroupVectors], level[kGroupVectors];
    Floats d_temperature[kGroupVectors];
    std::vector<Floats> sums;  // as load_columns leaves queries
  };

  // `gradient` (rows, dim) float32; `d_temperatures` (rows,) or null.
  Gradient(const ScoreParams& params, int64_t dim, const Shares* of_rows, const Shares* of_keys, float* gradient,
           float* d_temperatures)
      : params_(params),
        dim_(dim),
        of_rows_(of_rows),
        of_keys_(of_keys),
        gradient_(gradient),
        d_temperatures_(d_temperatures) {}

  bool finite() const { return finite_; }  // whether all of `gradient` is

  void start(Group& group, int64_t number) const {
    for (int v = 0; v < kGroupVectors; ++v) {
      const int64_t begin = number * kGroupRows + v * kLanes;
      group.rows[v] = RowVector(params_, begin);
      if (of_rows_) {
        group.coefficient[v] = of_rows_->lanes(of_rows_->coefficient, begin);
        group.level[v] = of_rows_->lanes(of_rows_->level, begin);
      }
      group.d_temperature[v] = Floats{};
    }
    group.sums.assign(dim_ * kGroupVectors, Floats{});
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
    tile.keys->add_weighted(weights, tile.count(), dim_, tile.vectors, group.sums.data());
    for (int v = 0; v < tile.vectors; ++v) group.d_temperature[v] += d_temperature[v];
  }

  void end(const Group& group) {
    bool finite = true;
    for (int v = 0; v < kGroupVectors; ++v) {
      const RowVector& rows = group.rows[v];
      finite &= store_rows(group.sums.data() + v, rows.begin, rows.end, dim_, gradient_);
      for (int64_t row = rows.begin; row < rows.end && d_temperatures_; ++row)
        d_temperatures_[row] = group.d_temperature[v][row - rows.begin];
    }
    if (finite) return;
#pragma omp atomic write
    finite_ = false;
  }

 private:
  EMC2_HD Floats weight(const Group& group, int v, Floats dot, int64_t key, Floats& d_temperature) const {
    const RowVector& rows = group.rows[v];
    Floats weight{};
    if (of_rows_) {
      const Floats score = rows.score(params_, dot, key);
      const Floats share = group.coefficient[v] * exp_nonpositive(score - group.level[v]);
      weight = share;
      // d lse / d temperature = -sum of exp(score - lse) * score / temperature; a score of -inf has no part.
      if (d_temperatures_) d_temperature -= share > 0.0f || share < 0.0f ? share * score : Floats{};
    }
    if (of_keys_) {
      const Floats score = rows.counted(params_, dot * of_keys_->inverse_temperature[key], key);
      weight += of_keys_->coefficient[key] * exp_nonpositive(score - of_keys_->level[key]);
    }
    return weight;
  }

  const ScoreParams& params_;
  int64_t dim_;
  const Shares *of_rows_, *of_keys_;
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

void write_gradient(const ScoreParams& params, const Operands& operands, int num_threads, const Shares* of_rows,
                    const Shares* of_keys, float* gradient, float* d_temperatures) {
  const Blocking blocking(params.num_rows, params.num_keys, operands.dim, operands.dim + kExponential, num_threads);
  Gradient walker(params, operands.dim, of_rows, of_keys, gradient, d_temperatures);
  dispatch_dtype(operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(operands, blocking, walker); });
  if (walker.finite()) return;
  // A key that is not finite has no share, but 0 * NaN is NaN: again, with zeros in its place. Rows stay as they are.
  Gradient again(params, operands.dim, of_rows, of_keys, gradient, d_temperatures);
  dispatch_dtype(operands.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto* keys = static_cast<const Element*>(operands.keys);
    const std::vector<float> finite = finite_rows(keys, operands.key_stride, params.num_keys, operands.dim);
    walk_score_tiles<Element>(operands, blocking, again, finite.data());
  });
}

}  // namespace

void contrastive_lse(const LseParams& params) {
  require_temperatures(params);
  const Blocking blocking(params.num_rows, params.num_keys, params.operands.dim, kExponential, params.num_threads);
  LogSumExp walker(params);
  dispatch_dtype(params.operands.dtype,
                 [&](auto element) { walk_score_tiles<decltype(element)>(params.operands, blocking, walker); });
}

void contrastive_lse_backward(const LseGradientParams& params) {
  require_temperatures(params);
  const Shares shares(params);
  const Shares* of_keys = params.symmetric ? &shares : nullptr;
  write_gradient(params, params.operands, params.num_threads, &shares, of_keys, params.d_queries,
                 params.d_temperatures);
  if (params.symmetric) return;
  ScoreParams turned{};
  turned.num_rows = params.num_keys, turned.num_keys = params.num_rows, turned.temperature = 1.0f;
  turned.query_ids = params.query_ids ? params.key_ids : nullptr, turned.key_ids = params.query_ids;
  const Operands& given = params.operands;
  const Operands operands{given.keys, given.queries, given.key_stride, given.query_stride, given.dim, given.dtype};
  write_gradient(turned, operands, params.num_threads, nullptr, &shares, params.d_keys, nullptr);
}

}  // namespace emc2
