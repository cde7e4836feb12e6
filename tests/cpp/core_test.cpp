// The core's building blocks against plain definitions of the same things, and two small walks against a loop.
//
// Prints what failed; the exit status is 1 if anything did.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/checks.h"
#include "cpu/gathered.h"
#include "cpu/gumbel.h"
#include "cpu/isir.h"
#include "cpu/lse.h"
#include "cpu/philox_arrays.h"
#include "cpu/score_tiles.h"
#include "cpu/sweep.h"
#include "cpu/vector_philox.h"
#include "draws_book.h"
#include "lse_book.h"
#include "problem.h"

namespace {

using emc2::Floats;
using emc2::Ints;
using emc2::kInfinity;
using emc2::kLanes;
using emc2::Words;

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

uint32_t lane(const Words& words, int i) { return words[i]; }

void philox_has_the_published_answers() {
  const uint32_t answers[2][4] = {{0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u},
                                  {0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u}};
  for (int ones = 0; ones < 2; ++ones) {
    const uint32_t word = ones ? 0xffffffffu : 0u;
    const uint32_t counter[4] = {word, word, word, word};
    uint32_t drawn[4];
    emc2::philox_words(counter, 1, ones ? ~0ull : 0ull, drawn);
    for (int i = 0; i < 4; ++i) CHECK(drawn[i] == answers[ones][i], "word %d of case %d is %08x", i, ones, drawn[i]);
  }
}

// Hoisting two rounds must not change a bit.
void vector_philox_equals_the_plain_generator() {
  const uint64_t seeds[] = {0, 1, 0xffffffffull, 1ull << 32, (1ull << 63) + 12345, ~0ull};
  const uint32_t steps[] = {0, 1, 77, 0x80000000u, 0xffffffffu};
  for (int group = 0; group < 40; ++group) {
    uint64_t chains[kLanes];
    Words low{}, tag{};
    for (int i = 0; i < kLanes; ++i) {
      // Every other group has chain ids of all 40 bits, so that their high bits, which are in the tag, differ by lane.
      chains[i] = group % 2 ? random_bits() >> 24 : static_cast<uint64_t>(group * kLanes + i);
      low[i] = static_cast<uint32_t>(chains[i]);
      tag[i] = emc2::counter_tag(chains[i], emc2::kAcceptanceStream);
    }
    for (const uint64_t seed : seeds) {
      for (const uint32_t step : steps) {
        const emc2::PhiloxKey key = emc2::philox_key(seed);
        const emc2::VectorPhilox draws(key, step, low, tag);
        for (const uint32_t block :
             {0u, 1u, 2u, 255u, 0x80000001u, 0xffffffffu, static_cast<uint32_t>(random_bits())}) {
          const auto words = draws.words(block);
          for (int i = 0; i < kLanes; ++i) {
            const auto plain =
                emc2::philox_rounds(emc2::philox_counter(chains[i], emc2::kAcceptanceStream, step, block), key);
            CHECK(lane(words.c0, i) == plain.c0 && lane(words.c1, i) == plain.c1 && lane(words.c2, i) == plain.c2 &&
                      lane(words.c3, i) == plain.c3,
                  "chain %llu, seed %llu, step %u, block %u", static_cast<unsigned long long>(chains[i]),
                  static_cast<unsigned long long>(seed), step, block);
          }
        }
      }
    }
  }
}

double ulps(float value, double exact) { return std::fabs(value - exact) / std::ldexp(1.0, std::ilogb(exact) - 23); }

void exponential_is_minus_the_logarithm() {
  double worst = 0;
  uint32_t worst_at = 0;
  for (uint32_t first = 0; first < 1u << 23; first += kLanes) {
    Words word{};
    // The low nine bits are not part of u: any value of them must do.
    for (int i = 0; i < kLanes; ++i) word[i] = (first + i) << 9 | ((first + i) * 37u & 0x1ffu);
    const Floats e = emc2::exponential(word);
    for (int i = 0; i < kLanes; ++i) {
      const double error = ulps(e[i], -std::log(std::ldexp(2.0 * (first + i) + 1.0, -24)));
      if (error > worst) worst = error, worst_at = first + i;
      CHECK(e[i] >= 0.0f, "E(%u) = %g", first + i, e[i]);
    }
  }
  std::printf("exponential: at most %.3f ulp from -log u, at word >> 9 = %u\n", worst, worst_at);
  CHECK(worst <= 1.25, "%.3f ulp", worst);  // 1.14 with fused multiply-add, 1.22 without
}

void exp_nonpositive_is_the_exponential() {
  const auto exp_of = [](float x) { return emc2::exp_nonpositive(emc2::all_floats(x))[0]; };
  CHECK(exp_of(0.0f) == 1.0f && exp_of(-0.0f) == 1.0f, "exp(0) = %g", exp_of(0.0f));
  for (const float x : {-87.01f, -104.0f, -1e30f, -kInfinity}) CHECK(exp_of(x) == 0.0f, "exp(%g) = %g", x, exp_of(x));
  double worst = 0;
  const uint32_t last = bits_as<uint32_t>(87.0f);
  for (uint32_t bits = 0; bits <= last; bits += 521 * kLanes) {
    Floats x{};
    for (int i = 0; i < kLanes; ++i) x[i] = -bits_as<float>(std::min(bits + 521 * i, last));
    const Floats y = emc2::exp_nonpositive(x);
    for (int i = 0; i < kLanes; ++i) {
      const double exact = std::exp(static_cast<double>(x[i]));
      worst = std::max(worst, std::fabs(y[i] - exact) / exact);
    }
  }
  std::printf("exp_nonpositive: relative error at most %.3g\n", worst);
  CHECK(worst <= 1.2e-7, "%.3g", worst);  // over all floats: 0.89e-7 with fused multiply-add, 1.13e-7 without
}

float plain_float(emc2::Bfloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }

float plain_float(emc2::Float16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float sign = value.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * kInfinity;
  return sign *
         (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24));
}

template <class Half>
void every_half_is_widened_right(const char* name) {
  for (uint32_t first = 0; first < 1u << 16; first += kLanes) {
    Half halves[kLanes];
    for (int i = 0; i < kLanes; ++i) halves[i].bits = static_cast<uint16_t>(first + i);
    const Floats wide = emc2::load_floats(halves);
    for (int i = 0; i < kLanes; ++i) {
      const float got = wide[i], want = plain_float(halves[i]);
      const bool same = std::isnan(want) ? std::isnan(got) : bits_as<uint32_t>(got) == bits_as<uint32_t>(want);
      CHECK(same, "%s %04x is %g, not %g", name, halves[i].bits, got, want);
    }
  }
}

void short_loads_end_in_zeros() {
  std::vector<float> row(kLanes);
  for (int i = 0; i < kLanes; ++i) row[i] = 1.0f + i;
  for (int left = 0; left <= kLanes; ++left) {
    const std::vector<float> end(row.begin(), row.begin() + left);  // reading past it is what a sanitizer would see
    const Floats loaded = emc2::load_floats(end.data(), left);
    for (int i = 0; i < kLanes; ++i) {
      CHECK(loaded[i] == (i < left ? 1.0f + i : 0.0f), "lane %d of %d is %g", i, left, static_cast<double>(loaded[i]));
    }
  }
}

void transpose_swaps_rows_and_columns() {
  Floats rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) rows[i][j] = 100.0f * i + j;
  }
  emc2::transpose(rows);
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) CHECK(rows[i][j] == 100.0f * j + i, "row %d, lane %d is %g", i, j, rows[i][j]);
  }
}

using Step = emc2::Transition<float, int64_t>;
const Step identity{-kInfinity, -kInfinity, -1};

bool same(const Step& a, const Step& b) {
  return a.threshold == b.threshold && a.score == b.score && a.position == b.position;
}

// Few values, so that ties are common.
Step random_step(int64_t position) {
  if (random_below(6) == 0) return identity;
  const float score = static_cast<float>(random_below(8)) - 4.0f;
  return {score + static_cast<float>(random_below(4)), score, position};
}

// What a step that is not proposable looks like in the kernels: never below its threshold, any score, NaN included.
Step random_unproposable_step(int64_t position) {
  const float scores[] = {std::nanf(""), -kInfinity, kInfinity, 3.0f, -3.0f};
  return {-kInfinity, scores[random_below(5)], position};
}

void transitions_compose() {
  for (int64_t trial = 0; trial < 200000; ++trial) {
    const Step a = random_step(1), b = random_step(2), c = random_step(3);
    CHECK(same(compose(compose(a, b), c), compose(a, compose(b, c))), "not associative: (%g %g) (%g %g) (%g %g)",
          a.threshold, a.score, b.threshold, b.score, c.threshold, c.score);
    CHECK(same(compose(identity, a), a) && same(compose(a, identity), a), "identity with (%g %g)", a.threshold,
          a.score);
    // A step, then another, is what their composition does.
    const float x = static_cast<float>(random_below(16)) - 8.0f;
    const auto enter = [](const Step& step, float score) { return score < step.threshold ? step.score : score; };
    CHECK(enter(compose(a, b), x) == enter(b, enter(a, x)), "(%g %g) (%g %g) from %g", a.threshold, a.score,
          b.threshold, b.score, x);
  }
  // Only as the second operand does a step that is not proposable have to be harmless: walks start from the identity.
  for (int walk = 0; walk < 5000; ++walk) {
    Step with = identity, without = identity;
    for (int64_t position = 0; position < 12; ++position) {
      if (random_below(3) == 0) with = compose(with, random_unproposable_step(position));
      const Step step = random_step(position);
      with = compose(with, step), without = compose(without, step);
    }
    CHECK(same(with, without), "an identity step leaked: (%g %g), not (%g %g)", with.threshold, with.score,
          without.threshold, without.score);
  }
  // In lanes, as in scalars.
  for (int trial = 0; trial < 2000; ++trial) {
    Step first[kLanes], then[kLanes];
    emc2::Transition<Floats, Ints> wide_first{}, wide_then{};
    for (int i = 0; i < kLanes; ++i) {
      first[i] = random_step(1), then[i] = random_below(4) ? random_step(2) : random_unproposable_step(2);
      wide_first.threshold[i] = first[i].threshold, wide_first.score[i] = first[i].score;
      wide_then.threshold[i] = then[i].threshold, wide_then.score[i] = then[i].score;
      wide_first.position[i] = static_cast<int32_t>(first[i].position);
      wide_then.position[i] = static_cast<int32_t>(then[i].position);
    }
    const auto wide = compose(wide_first, wide_then);
    for (int i = 0; i < kLanes; ++i) {
      const Step got{wide.threshold[i], wide.score[i], wide.position[i]};
      CHECK(same(got, compose(first[i], then[i])), "lane %d", i);
    }
  }
}

void samples_are_taken_where_the_schedule_says() {
  for (int64_t total = 1; total <= 24; ++total) {
    for (int64_t burn_in = 0; burn_in < total; ++burn_in) {
      for (int64_t samples = 1; samples <= total - burn_in; ++samples) {
        const emc2::Schedule schedule{total, 0, total, burn_in, samples};
        const int64_t kept = total - burn_in;
        std::vector<int64_t> taken(total + 1);  // after each number of proposals
        for (int64_t r = 0; r < samples; ++r) {
          int64_t after = 1;  // the least number of proposals that holds a share (r + 1) / samples of those kept
          while (after * samples < (r + 1) * kept) ++after;
          CHECK(schedule.sample_point(r) == burn_in + after - 1, "sample %d of %d, %d + %d proposals", int(r),
                int(samples), int(burn_in), int(kept));
          for (int64_t p = burn_in + after; p <= total; ++p) ++taken[p];
        }
        for (int64_t p = 0; p <= total; ++p) {
          CHECK(schedule.count_samples(p) == taken[p], "before proposal %d: %d of %d samples, %d + %d proposals",
                int(p), int(schedule.count_samples(p)), int(samples), int(burn_in), int(kept));
        }
      }
    }
  }
  const emc2::Schedule nothing{0, 0, 0, 5, 3};  // no keys: legal, whatever was asked
  CHECK(nothing.count_samples(0) == 0, "a walk of nothing takes samples");
  const int64_t many = (1ll << 31) - 1;  // products of two such numbers must not overflow
  const emc2::Schedule longest{many, 0, many, 0, many};
  CHECK(longest.sample_point(many - 1) == many - 1 && longest.count_samples(many - 1) == many - 1, "overflow");
}

// The high 64 bits of a 64 x 64 bit product, by long multiplication in base 2^16.
uint64_t high_product(uint64_t a, uint64_t b) {
  uint64_t digits[9] = {};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const uint64_t product = (a >> 16 * i & 0xffff) * (b >> 16 * j & 0xffff);
      digits[i + j] += product & 0xffff;
      digits[i + j + 1] += product >> 16;
    }
  }
  for (int i = 0; i < 8; ++i) digits[i + 1] += digits[i] >> 16, digits[i] &= 0xffff;
  return digits[4] | digits[5] << 16 | digits[6] << 32 | digits[7] << 48;
}

void positions_scale_exactly() {
  for (int trial = 0; trial < 200000; ++trial) {
    const uint64_t value = trial % 5 ? random_bits() : ~0ull - static_cast<uint64_t>(trial % 3);
    uint64_t count = random_bits() >> random_below(64);
    if (trial % 7 == 0) count = 1;
    if (trial % 7 == 1) count = (1ull << 31) - 1;
    const uint64_t got = emc2::scale_to_range(static_cast<uint32_t>(value), static_cast<uint32_t>(value >> 32), count);
    CHECK(got == high_product(value, count), "%llu * %llu", static_cast<unsigned long long>(value),
          static_cast<unsigned long long>(count));
    CHECK(got < count || count == 0, "%llu is no position among %llu keys", static_cast<unsigned long long>(got),
          static_cast<unsigned long long>(count));
  }
}

void walk_of_uniform_draws(const Problem& problem, int threads) {
  Results got(problem);
  emc2::walk_gathered(got.walk(problem, threads));
  const auto drawn = [&](int64_t row, int64_t p) { return problem.drawn_position(row, p); };
  check_same(got, walk_by_the_book(problem, drawn, false), "uniform draws");
}

void sweeps(const Problem& problem, int threads) {
  const auto in_order = [&](int64_t, int64_t p) { return p - problem.schedule.first_proposal; };
  const Results want = walk_by_the_book(problem, in_order, true);
  Results got(problem);
  emc2::walk_sweep(got.walk(problem, threads));
  check_same(got, want, "a sweep");
}

void walks_follow_the_book(int threads) {
  // Rows, keys and dimensions on both sides of a vector's width; the last problems are large enough for several
  // threads, and have several tiles of keys, which end inside a block of four draws, and several groups in a block of
  // rows.
  const int64_t shapes[][3] = {{1, 1, 1}, {7, 9, 3}, {17, 33, 19}, {70, 301, 40}, {700, 150, 2}};
  for (const auto& [rows, keys, dim] : shapes) {
    const int64_t draws = 2 * keys + 5;
    walk_of_uniform_draws({rows, keys, dim, {draws, 0, draws, draws / 3, 3}, true}, threads);
    sweeps({rows, keys, dim, {keys, 0, keys, keys / 3, (keys + 1) / 2}, true}, threads);
    // Shards that begin inside a block of four draws, past 2^32, with sample points before, in and after them.
    for (const int64_t first : {int64_t{6}, int64_t{1} << 32 | 3}) {
      const auto schedule = [first](int64_t count) {
        return emc2::Schedule{first + count + 2, first, count, first - 3, count + 5};
      };
      walk_of_uniform_draws({rows, keys, dim, schedule(draws), false}, threads);
      sweeps({rows, keys, dim, schedule(keys), false}, threads);
    }
  }
}

void gumbel_draws_follow_the_book(int threads) {
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {7, 9, 3, 3}, {17, 33, 4, 17}, {70, 301, 5, 20}};
  for (const auto& [rows, keys, dim, samples] : shapes) {
    const Problem problem(rows, keys, dim, {keys, 0, keys, 0, 1}, true);
    std::vector<int64_t> positions(rows * samples, -77);
    emc2::GumbelParams params{};
    params.num_rows = rows, params.num_keys = keys, params.temperature = 0.5f, params.num_threads = threads;
    problem.set_ids_and_law(params);
    params.seed = problem.seed, params.step = problem.step, params.chain_ids = problem.chain_ids.data();
    params.num_samples = samples, params.positions = positions.data(), params.operands = problem.operands();
    emc2::sample_gumbel(params);
    CHECK(positions == draws_by_the_book(problem, samples), "Gumbel draws of %d rows and %d keys",
          static_cast<int>(rows), static_cast<int>(keys));
  }
}

void isir_steps_follow_the_book(int threads) {
  const int64_t shapes[][5] = {{1, 1, 1, 0, 0}, {7, 9, 3, 1, 3},    {17, 33, 4, 4, 1ll << 32 | 2},
                               {9, 0, 4, 2, 0}, {70, 301, 5, 1, 6}, {5, 61, 2, 0, 1}};
  for (const auto& [rows, keys, dim, own, first_key] : shapes) {
    const Problem problem(rows, keys, dim, {keys, 0, keys, 0, 1}, true);
    IsirStates states(rows, own);
    emc2::IsirParams params{};
    params.num_rows = rows, params.num_keys = keys, params.temperature = 0.5f, params.num_threads = threads;
    problem.set_ids_and_law(params);
    params.seed = problem.seed, params.step = problem.step, params.chain_ids = problem.chain_ids.data();
    params.operands = problem.operands(), params.key_labels = problem.key_ids.data(), params.first_key = first_key;
    params.num_carried = own, params.carried_key = states.own_key.data();
    params.carried_score = states.own_score.data(), params.position = states.position.data();
    params.key = states.key.data(), params.score = states.score.data(), params.lse = states.lse.data();
    params.value = states.value.data();
    emc2::isir_step(params);
    for (int64_t row = 0; row < rows; ++row) check_isir_row(problem, states, row, own, first_key);
  }
}

void check_close(const std::vector<float>& got, const std::vector<double>& want, const char* what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const bool same = got[i] == want[i] || std::fabs(got[i] - want[i]) <= 1e-5 * (1 + std::fabs(want[i]));
    CHECK(same, "%s, number %d: %g, not %g", what, int(i), got[i], want[i]);
  }
}

void gradients_follow_the_book(int threads) {
  const int64_t shapes[][4] = {{1, 1, 1, 0}, {7, 9, 3, 0}, {17, 33, 19, 0}, {17, 17, 19, 1}, {70, 301, 29, 0}};
  for (const auto& [rows, keys, dim, symmetric] : shapes) {
    const LseProblem problem(rows, keys, dim, symmetric);
    const LseBook book(problem);
    std::vector<float> lse(rows);
    emc2::LseParams params{};
    problem.set(params);
    params.operands = problem.operands(), params.num_threads = threads, params.lse = lse.data();
    emc2::contrastive_lse(params);
    check_close(lse, book.lse, "log-sum-exps");
    std::vector<float> d_queries(rows * dim, 77.0f), d_keys(keys * dim, 77.0f), d_temperatures(rows, 77.0f);
    emc2::LseGradientParams backward{};
    problem.set(backward);
    backward.operands = params.operands, backward.num_threads = threads, backward.symmetric = symmetric;
    backward.grad = problem.weights.data(), backward.lse = lse.data(), backward.d_queries = d_queries.data();
    backward.d_keys = d_keys.data(), backward.d_temperatures = d_temperatures.data();
    emc2::contrastive_lse_backward(backward);
    check_close(d_queries, book.d_queries, "gradient of queries");
    if (!symmetric) check_close(d_keys, book.d_keys, "gradient of keys");
    check_close(d_temperatures, book.d_temperatures, "gradient of temperatures");
  }
}

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Before anything is written: what is poisoned stays so.
void bad_values_are_refused() {
  const int64_t rows = 9, keys = 7, draws = 5, stride = draws + 2;
  const auto walk = [&](emc2::Schedule schedule, int64_t position, int64_t chain) {
    Problem problem(rows, keys, 3, {draws, 0, draws, 0, 1}, true);
    problem.chain_ids[rows - 1] = chain;
    std::vector<int64_t> positions(rows * stride, keys);  // between the rows, where nobody looks
    for (int64_t i = 0; i < rows * draws; ++i) positions[i / draws * stride + i % draws] = keys - 1;
    positions[(rows - 1) * stride + draws - 1] = position;
    Results got(problem);
    const Results poisoned(problem);
    emc2::Walk walk = got.walk(problem, 1);
    static_cast<emc2::Schedule&>(walk) = schedule;
    const bool given = schedule.num_proposals == draws && schedule.first_proposal == 0;
    walk.positions = given ? positions.data() : nullptr, walk.position_stride = stride;
    const bool refused = refuses([&] { emc2::walk_gathered(walk); });
    if (refused) check_same(got, poisoned, "a walk that was refused");
    return refused;
  };
  const emc2::Schedule legal{draws, 0, draws, 0, 1};
  CHECK(!walk(legal, 0, 0) && !walk(legal, keys - 1, (1ll << 40) - 1), "legal values are refused");
  for (const int64_t position : {keys, int64_t{-1}, int64_t{1} << 40, std::numeric_limits<int64_t>::min()}) {
    CHECK(walk(legal, position, 0), "position %lld is taken", static_cast<long long>(position));
  }
  for (const int64_t chain : {int64_t{-1}, int64_t{1} << 40}) {
    CHECK(walk(legal, 0, chain), "chain %lld is taken", static_cast<long long>(chain));
  }
  const int64_t many = std::numeric_limits<int64_t>::max();
  const emc2::Schedule wrong[] = {
      {draws, 0, draws, draws, 1},
      {draws, 0, draws, -1, 1},
      {draws, 0, draws, 0, 0},
      {draws, 0, draws, 0, draws + 1},
      {draws, 1, draws, 0, 1},
      {draws, -1, draws, 0, 1},
      {draws, 0, -1, 0, 1},
      {many, many, 1, 0, 1},
      {(1ll << 33) + 1, 0, draws, 0, 1},
      {draws, many, many, 0, 1},
      {draws, 0, draws, many, many},
  };
  for (const emc2::Schedule& schedule : wrong) {
    CHECK(walk(schedule, 0, 0), "a schedule of %lld proposals is taken",
          static_cast<long long>(schedule.total_proposals));
  }
  const float temperatures[] = {1.0f, 0x1p-120f, 0x1p100f, 0x1p-121f, 0.0f, std::nanf(""), kInfinity, -1.0f};
  for (int64_t i = 0; i < 8; ++i) {
    const emc2::ScoreParams scores{2, 1, 1.0f, temperatures + i, 0, nullptr, nullptr, nullptr, nullptr};
    CHECK(refuses([&] { emc2::require_scores(scores); }) == (i > 2), "temperature %g", temperatures[i]);
  }
  for (const int64_t samples : {int64_t{0}, int64_t{1} << 16}) {
    emc2::GumbelParams params{};
    params.num_samples = samples;
    CHECK(refuses([&] { emc2::sample_gumbel(params); }), "%d samples are taken", static_cast<int>(samples));
  }
  for (const auto& [own, first_key] : {std::pair{5ll, 0ll}, {-1, 0}, {0, -1}, {0, (1ll << 33) - 1}}) {
    emc2::IsirParams params{};
    params.num_keys = 2, params.num_carried = own, params.first_key = first_key;
    CHECK(refuses([&] { emc2::isir_step(params); }), "%lld candidates, first key %lld are taken", own, first_key);
  }
  for (const float value : {0.0f, kInfinity, -kInfinity, std::nanf("")}) {
    const float law[] = {0.0f, value};
    const emc2::ScoreParams scores{1, 2, 1.0f, nullptr, 0, nullptr, nullptr, nullptr, law};
    CHECK(refuses([&] { emc2::require_scores(scores); }) == !(value >= 0), "a law of %g", value);
    emc2::Walk walk{};
    static_cast<emc2::Schedule&>(walk) = legal, static_cast<emc2::ScoreParams&>(walk) = scores;
    CHECK(refuses([&] { emc2::require_walk(walk); }) == !(value == 0), "a walk's law of %g", value);
  }
}

}  // namespace

int main() {
  std::printf("%s, %d lanes\n", emc2::kInstructionSet, kLanes);
  philox_has_the_published_answers();
  vector_philox_equals_the_plain_generator();
  exponential_is_minus_the_logarithm();
  exp_nonpositive_is_the_exponential();
  every_half_is_widened_right<emc2::Bfloat16>("bfloat16");
  every_half_is_widened_right<emc2::Float16>("float16");
  rough_noise_is_near_the_noise_and_the_bound_above_it();
  short_loads_end_in_zeros();
  transpose_swaps_rows_and_columns();
  transitions_compose();
  samples_are_taken_where_the_schedule_says();
  positions_scale_exactly();
  for (const int threads : {1, 3}) walks_follow_the_book(threads);
  for (const int threads : {1, 3}) gumbel_draws_follow_the_book(threads);
  for (const int threads : {1, 3}) isir_steps_follow_the_book(threads);
  for (const int threads : {1, 3}) gradients_follow_the_book(threads);
  bad_values_are_refused();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
