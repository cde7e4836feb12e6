// Cycles of the CPU core's parts, on one thread: what a vector of draws, of logarithms, of walked scores takes, and how
// near the products come to the processor's peak.
//
//   make core-cycles
//
// A cycle is what one addition takes that waits for the one before; the fewest of many runs count.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "cpu/gumbel.h"
#include "cpu/isir.h"
#include "cpu/lse.h"
#include "cpu/score_tiles.h"
#include "cpu/sweep.h"
#include "cpu/vector_philox.h"

namespace {

using namespace emc2;

template <class Call>
double fewest_seconds(Call call) {
  double fewest = 1e9;
  for (int run = 0; run < 40; ++run) {
    const auto start = std::chrono::steady_clock::now();
    call();
    fewest = std::min(fewest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return fewest;
}

volatile uint32_t sink;

double cycle_seconds() {
  constexpr int kAdditions = 1 << 20;
  return fewest_seconds([] {
           uint32_t sum = sink;
           for (int i = 0; i < kAdditions; ++i) {
             sum += i;
             asm volatile("" : "+r"(sum));  // else they are one multiplication
           }
           sink = sum;
         }) /
         kAdditions;
}

struct Arrays {
  int64_t rows, keys, dim;
  std::vector<float> queries, key_rows, score, threshold;
  std::vector<int64_t> ids, key_ids, key, positions;
  std::vector<int32_t> samples;

  Arrays(int64_t rows, int64_t keys, int64_t dim)
      : rows(rows),
        keys(keys),
        dim(dim),
        queries(rows * dim),
        key_rows(keys * dim),
        score(rows),
        threshold(rows),
        ids(rows),
        key_ids(keys),
        key(rows),
        positions(rows * 16),
        samples(rows * 16) {
    for (int64_t i = 0; i < rows * dim; ++i) queries[i] = static_cast<float>(i * 37 % 101 - 50) / 200;
    for (int64_t i = 0; i < keys * dim; ++i) key_rows[i] = static_cast<float>(i * 53 % 103 - 51) / 200;
    for (int64_t i = 0; i < rows; ++i) ids[i] = 3 * i;
    for (int64_t i = 0; i < keys; ++i) key_ids[i] = 3 * i + i % 2;
  }

  Operands operands() const { return {queries.data(), key_rows.data(), dim, dim, dim, Dtype::kFloat32}; }

  void set(ScoreParams& scores, bool excludes) const {
    scores.num_rows = rows, scores.num_keys = keys, scores.temperature = 0.07f;
    if (excludes) scores.query_ids = ids.data(), scores.key_ids = key_ids.data();
  }

  double walk_seconds(bool excludes) {
    Walk walk{};
    set(walk, excludes);
    walk.operands = operands(), walk.num_threads = 1;
    static_cast<Schedule&>(walk) = {keys, 0, keys, keys / 2, 16};
    walk.input = {key.data(), score.data(), nullptr};
    std::vector<int64_t> new_key(rows);
    std::vector<float> new_score(rows);
    walk.step_output = {samples.data(), new_key.data(), new_score.data(), threshold.data(), nullptr, nullptr};
    return fewest_seconds([&] { walk_sweep(walk); });
  }

  double gumbel_seconds(int64_t num_samples) {
    GumbelParams params{};
    set(params, true);
    params.operands = operands(), params.num_threads = 1;
    params.num_samples = num_samples, params.positions = positions.data();
    return fewest_seconds([&] { sample_gumbel(params); });
  }

  double lse_seconds() {
    LseParams params{};
    set(params, true);
    params.operands = operands(), params.num_threads = 1, params.lse = threshold.data();
    return fewest_seconds([&] { contrastive_lse(params); });
  }

  double isir_seconds() {
    IsirParams params{};
    set(params, true);
    params.operands = operands(), params.num_threads = 1, params.lse = threshold.data();
    std::vector<int64_t> new_key(rows);
    std::vector<float> new_score(rows);
    std::vector<double> value(rows);
    params.num_carried = 1, params.carried_key = key.data(), params.carried_score = score.data();
    params.position = positions.data(), params.key = new_key.data(), params.score = new_score.data();
    params.value = value.data();
    return fewest_seconds([&] { isir_step(params); });
  }
};

}  // namespace

int main() {
  const double cycle = cycle_seconds();
  std::printf("%s, %d lanes, %.2f GHz; cycles of a vector of %d (row, key) pairs:\n", kInstructionSet, kLanes,
              1e-9 / cycle, kLanes);
  const auto print = [cycle](const char* what, double seconds, double vectors) {
    std::printf("%-46s%7.2f\n", what, seconds / cycle / vectors);
  };
  constexpr int kBlocks = 20000;
  Words chains{};
  for (int lane = 0; lane < kLanes; ++lane) chains[lane] = 77 * lane;
  const VectorPhilox draws(philox_key(12345), 3, chains, chains);
  print("draws", fewest_seconds([&] {
          Words mixed{};
          for (uint32_t block = 0; block < kBlocks; ++block) {
            const auto words = draws.words(block);
            mixed ^= words.c0 ^ words.c1 ^ words.c2 ^ words.c3;
          }
          sink = mixed[0];
        }),
        4 * kBlocks);
  print("logarithm", fewest_seconds([&] {
          Floats sum{};
          Words word = chains;
          for (int i = 0; i < 4 * kBlocks; ++i) sum += exponential(word += 0x9E3779B9u);
          sink = static_cast<uint32_t>(sum[0]);
        }),
        4 * kBlocks);
  Arrays plain(512, 512, 0), wide(512, 512, 1024);
  const double vectors = 512.0 * 512 / kLanes;
  print("draws, logarithm, walk of given scores", plain.walk_seconds(false), vectors);
  print("the same, with ids", plain.walk_seconds(true), vectors);
  print("a Gumbel draw, of 16", plain.gumbel_seconds(16), 16 * vectors);
  print("log-sum-exp of given scores", plain.lse_seconds(), vectors);
  print("the same, with an i-SIR draw", plain.isir_seconds(), vectors);
  const double products = wide.walk_seconds(false) - plain.walk_seconds(false);
  std::printf("%-46s%7.1f operations a cycle, of %d\n", "products", 2.0 * 512 * 512 * 1024 / (products / cycle),
              kLanes * 4);
}
