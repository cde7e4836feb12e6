#include "gumbel.h"

#include <algorithm>
#include <cmath>

#include "checks.h"

namespace emc2 {
namespace {

constexpr int64_t kParallelDraws = 1 << 14;  // below it, waking the threads costs more than they save
constexpr int64_t kSamplesAtOnce = 16;       // whose generators, 6 KB with AVX-512, stay in the first-level cache
constexpr int64_t kPrefetchKeys = 32;        // as in sweep.cpp

constexpr double kLog2 = 0.69314718055994530942;

// The noise of the contract: v = (word + 0.5) * 2^-32, E = -log1p(-v), noise -log E.
double gumbel_noise(uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

// log v + 158 log 2 or less, by up to 0.06 (more for words below 2^4): the bits of a float are its logarithm, but for a
// chord in place of a curve.
EMC2_HD Floats log_bound(Words word) {
  const Floats half = __builtin_convertvector((Ints)(word >> 1), Floats);
  return __builtin_convertvector((Ints)half, Floats) * static_cast<float>(kLog2 * 0x1p-23);
}

// A key beats `best` iff log E < score - best, and log v <= log E: so it must have log_bound + filter < score. The
// margin is more than all roundings (log_bound exceeds its bound by 7.2e-6 at most).
float race_filter(double best) {
  return static_cast<float>(best - 158 * kLog2 - 2e-4 - std::fabs(best) * 0x1p-20);
}

void start(Race& race) {
  race.filter = all_floats(-kInfinity);
  std::fill(race.best, race.best + kLanes, -static_cast<double>(kInfinity));
  std::fill(race.position, race.position + kLanes, -1);
}

// Some 10 of 1,000 keys come here, so their logarithms are taken one by one, in double.
void enter(Race& race, Ints candidates, Floats scores, Words words, int64_t key) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!candidates[lane]) continue;
    const double value = scores[lane] + gumbel_noise(words[lane]);
    if (value > race.best[lane]) {
      race.best[lane] = value;
      race.position[lane] = static_cast<int32_t>(key);
      race.filter[lane] = race_filter(value);
    }
  }
}

}  // namespace

// kLanes neighbouring rows.
struct GumbelSampler::Rows {
  int64_t begin, end;
  const float* dots;            // of the tile's first key
  Floats inverse_temperature;   // NaN past the last row, where nothing is drawn
  Words chain_low, chain_high;
  Words query_id_low, query_id_high;
};

GumbelSampler::GumbelSampler(const GumbelParams& params) : params_(params) {
  require(params_.num_samples >= 1 && params_.num_samples <= kMaxSamples, "num_samples: not in 1 .. 2^16 - 1");
  require_within(params_.chain_ids, params_.num_rows, kChains, "chain_ids: a value outside [0, 2^40)");
  require_temperatures(params_);
}

GumbelSampler::Rows GumbelSampler::load_rows(const Tile& tile, int64_t group) const {
  const int64_t begin = tile.row_begin + group * kLanes;
  Rows rows{begin, std::min(begin + kLanes, tile.row_end), tile.dots + group * kLanes, {}, {}, {}, {}, {}};
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t row = std::min(begin + lane, tile.row_end - 1);
    const uint64_t chain = params_.chain(row);
    const uint64_t id = params_.query_ids ? params_.query_ids[row] : 0;
    const float inverse = 1.0f / params_.row_temperature(row);
    rows.inverse_temperature[lane] = begin + lane < rows.end ? inverse : std::nanf("");
    rows.chain_low[lane] = static_cast<uint32_t>(chain), rows.chain_high[lane] = static_cast<uint32_t>(chain >> 32);
    rows.query_id_low[lane] = static_cast<uint32_t>(id), rows.query_id_high[lane] = static_cast<uint32_t>(id >> 32);
  }
  return rows;
}

EMC2_HD Ints GumbelSampler::excluded(const Rows& rows, int64_t key) const {
  const uint64_t id = static_cast<uint64_t>(params_.key_ids[key]);
  const Ints same = rows.query_id_low == static_cast<uint32_t>(id);
  if (__builtin_expect(!any(same), 1)) return same;
  return same & (rows.query_id_high == static_cast<uint32_t>(id >> 32));
}

// All keys of a tile for a few samples. What each (key, sample) needs is a quarter of a call of the generator and a
// comparison; the logarithms of the noise are taken only of keys that may win by a bound on it.
void GumbelSampler::scan_samples(const Tile& tile, const Rows& rows, int64_t first, int64_t count,
                                 Race* races) const {
  VectorPhilox draws[kSamplesAtOnce];
  for (int64_t i = 0; i < count; ++i) {
    const Words tag = rows.chain_high << 8 | counter_tag(0, kGumbelStream, static_cast<uint32_t>(first + i));
    draws[i] = VectorPhilox(philox_key(params_.seed_value()), params_.step_value(), rows.chain_low, tag);
  }
  const float* dots = rows.dots;
  const auto score_of = [&](int64_t key) __attribute__((always_inline)) {
    if (key < tile.key_begin || key >= tile.key_end) return all_floats(-kInfinity);
    const Floats score = load<Floats>(dots + (key - tile.key_begin) * tile.stride) * rows.inverse_temperature;
    const Floats finite = score < kInfinity ? score : all_floats(-kInfinity);
    return params_.query_ids && any(excluded(rows, key)) ? (excluded(rows, key) ? all_floats(-kInfinity) : finite)
                                                       : finite;
  };
  for (int64_t block = tile.key_begin / 4; 4 * block < tile.key_end; ++block) {
    Floats scores[4];
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(dots + (4 * block + i - tile.key_begin + kPrefetchKeys) * tile.stride);
      scores[i] = score_of(4 * block + i);
    }
    for (int64_t s = 0; s < count; ++s) {
      const PhiloxBlock<Words> drawn = draws[s].words(static_cast<uint32_t>(block));
      const Words words[4] = {drawn.c0, drawn.c1, drawn.c2, drawn.c3};
      Ints candidates[4], some{};
      for (int i = 0; i < 4; ++i) {
        candidates[i] = log_bound(words[i]) + races[s].filter < scores[i];
        some |= candidates[i];
      }
      if (__builtin_expect(!any(some), 1)) continue;
      for (int i = 0; i < 4; ++i) enter(races[s], candidates[i], scores[i], words[i], 4 * block + i);
    }
  }
}

void GumbelSampler::scan(const Tile& tile) {
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t groups = (rows + kLanes - 1) / kLanes;
  // A task is a group of rows and some of its samples, fewer where there are too few groups for the threads.
  const int64_t wanted = std::max<int64_t>(1, params_.num_samples * groups / (2 * params_.num_threads));
  const int64_t at_once = std::min({kSamplesAtOnce, params_.num_samples, wanted});
  const int64_t chunks = (params_.num_samples + at_once - 1) / at_once;
  const bool parallel = rows * (tile.key_end - tile.key_begin) * params_.num_samples >= kParallelDraws;
  races_.resize(groups * params_.num_samples);
#pragma omp parallel for schedule(dynamic) num_threads(params_.num_threads) if (parallel)
  for (int64_t task = 0; task < groups * chunks; ++task) {
    const int64_t group = task / chunks;
    const int64_t first = task % chunks * at_once;
    const int64_t count = std::min(at_once, params_.num_samples - first);
    const Rows group_rows = load_rows(tile, group);
    Race* races = races_.data() + group * params_.num_samples + first;
    if (tile.key_begin == 0) std::for_each(races, races + count, start);
    scan_samples(tile, group_rows, first, count, races);
    if (tile.key_end < params_.num_keys) continue;
    for (int64_t row = group_rows.begin; row < group_rows.end; ++row) {
      for (int64_t s = 0; s < count; ++s) {
        params_.positions[row * params_.num_samples + first + s] = races[s].position[row - group_rows.begin];
      }
    }
  }
}

}  // namespace emc2
