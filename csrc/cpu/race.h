// argmax of score + Gumbel noise over keys that come tile by tile, one row a lane.
//
// Of each (key, sample) a quarter of a call of the generator and a bound on its value are made: noise only of the keys
// that may win by their bound, and in double only where float32 cannot tell which of two values is larger.
#pragma once

#include <algorithm>
#include <cmath>

#include "score_tiles.h"
#include "vector_philox.h"

namespace emc2 {

constexpr float kLog2 = 0.6931471805599453f;

// log v + 158 log 2 or less, by up to 0.061 (more for words below 2^10), v = (word + 0.5) * 2^-32: the bits of a float
// are its logarithm, but for a chord in place of a curve.
EMC2_HD Floats log_bound(Words word) {
  const Floats half = __builtin_convertvector((Ints)(word >> 1), Floats);
  return __builtin_convertvector((Ints)half, Floats) * (kLog2 * 0x1p-23f);
}

// log(1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1), up to 9e-6 of itself.
EMC2_HD Floats rough_log1p(Floats f) {
  Floats p = all_floats(-0.14213607f);
  p = p * f + 0.21929201f;
  p = p * f - 0.25388959f;
  p = p * f + 0.33273950f;
  p = p * f - 0.49991682f;
  return p * (f * f) + f;
}

// x = 2^exponent * (1 + f) > 0.
struct Factors {
  Ints exponent;
  Floats f;

  EMC2_HD explicit Factors(Floats x) : exponent(((Ints)x - 0x3f3504f3) >> 23) {
    f = (Floats)((Ints)x - (exponent << 23)) - 1.0f;
  }
};

// The noise of the contract, -log E with E = -log1p(-v), up to kNoiseError.
constexpr float kNoiseError = 1.2e-5f;
EMC2_HD Floats rough_gumbel_noise(Words word) {
  // Of v and 1 - v = (~word + 0.5) * 2^-32, the one that has E to all its digits.
  const Ints near_zero = word < 1u << 30;
  const Floats x = __builtin_convertvector(near_zero ? word : ~word, Floats) * 0x1p-32f + 0x1p-33f;
  const Factors one_less(x);
  const Ints exponent = near_zero ? all_ints(0) : one_less.exponent;
  const Floats f = near_zero ? -x : one_less.f;
  const Factors e(__builtin_convertvector(-exponent, Floats) * kLog2 - rough_log1p(f));
  return __builtin_convertvector(-e.exponent, Floats) * kLog2 - rough_log1p(e.f);
}

inline double gumbel_noise(uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

EMC2_HD Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7fffffff); }

// Scores of kLanes neighbouring rows with keys of a tile, in whole blocks of four draws; -inf where a block has other
// keys.
struct RaceScores {
  int64_t first_block, blocks, before;
  int32_t first_position;  // of the first block's first key
  Floats slots[kTileVectors / kGroupVectors + 6];

  // `number`: of the first of `count` keys among all draws. `position`: what the race calls it.
  RaceScores(int64_t number, int64_t position, int64_t count)
      : first_block(number / 4),
        blocks((number + count + 3) / 4 - number / 4),
        before(number % 4),
        first_position(static_cast<int32_t>(position - before)) {
    std::fill(slots, slots + before, all_floats(-kInfinity));
    std::fill(slots + before + count, slots + 4 * blocks, all_floats(-kInfinity));
  }

  Floats* keys() { return slots + before; }  // to be filled in
};

// The best key so far of kLanes neighbouring rows, for one sample. Of equal values the lowest position's is the best.
struct Race {
  Floats filter = all_floats(-kInfinity);  // what a score must exceed, beside a bound on its noise, to be looked at
  Floats value = all_floats(-kInfinity);   // of the leader: score + rough noise
  Floats score = all_floats(-kInfinity);
  Words word{};
  Ints position = all_ints(-1);

  double exact_value(int lane) const { return score[lane] + gumbel_noise(word[lane]); }

  EMC2_HD void run(const VectorPhilox& draws, const RaceScores& scores) {
    Bounded keys;
    Floats highest[4];
    Ints at_highest[4];
    for (int i = 0; i < 4; ++i) highest[i] = all_floats(-kInfinity), at_highest[i] = all_ints(0);
    for (int64_t block = 0; block < scores.blocks; ++block) {
      const PhiloxBlock<Words> drawn = draws.words(static_cast<uint32_t>(scores.first_block + block));
      const Words words[4] = {drawn.c0, drawn.c1, drawn.c2, drawn.c3};
      EMC2_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t at = 4 * block + i;
        keys.words[at] = words[i];
        keys.bounds[at] = scores.slots[at] - log_bound(words[i]);
        const Ints higher = keys.bounds[at] > highest[i];
        highest[i] = higher ? keys.bounds[at] : highest[i];
        at_highest[i] = higher ? all_ints(static_cast<int32_t>(at)) : at_highest[i];
      }
    }
    for (int i = 1; i < 4; ++i) {
      const Ints higher = highest[i] > highest[0];
      highest[0] = higher ? highest[i] : highest[0];
      at_highest[0] = higher ? at_highest[i] : at_highest[0];
    }
    const Ints promising = highest[0] > filter;
    if (any(promising)) enter(promising, at_highest[0], keys, scores);
  }

 private:
  struct Bounded {
    Words words[sizeof(RaceScores::slots) / sizeof(Floats)];
    Floats bounds[sizeof(RaceScores::slots) / sizeof(Floats)];  // of score + noise - 158 log 2, from above
  };

  // Each row's most promising key first: after it, hardly any other can win.
  __attribute__((noinline)) void enter(Ints promising, Ints most, const Bounded& keys, const RaceScores& scores) {
    Floats of_most{};
    Words word_of_most{};
    for (uint32_t left = lane_bits(promising); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      of_most[lane] = scores.slots[most[lane]][lane];
      word_of_most[lane] = keys.words[most[lane]][lane];
    }
    try_to_lead(promising, of_most, word_of_most, most + scores.first_position);
    for (int32_t at = 0; at < 4 * scores.blocks; ++at) {
      const Ints others = (keys.bounds[at] > filter) & (most != at);
      if (any(others)) try_to_lead(others, scores.slots[at], keys.words[at], all_ints(at + scores.first_position));
    }
  }

  EMC2_HD void try_to_lead(Ints candidates, Floats scores, Words words, Ints positions) {
    const Floats values = scores + rough_gumbel_noise(words);
    const Floats doubt = magnitude(values) * 0x1p-22f + 4 * kNoiseError;  // more than both values' errors
    Ints leads = candidates & (values - doubt > value);
    const Ints close = candidates & ~leads & (values + doubt >= value);
    if (__builtin_expect(any(close), 0)) leads |= lead_exactly(close, scores, words, positions);
    value = leads ? values : value;
    score = leads ? scores : score;
    word = leads ? words : word;
    position = leads ? positions : position;
    // A key beats the leader only if log E < its score - value, and log v <= log E. The margin is more than all
    // roundings (log_bound exceeds its bound by 7.2e-6 at most).
    filter = value - static_cast<float>(158 * 0.69314718055994530942 + 2e-4) - magnitude(value) * 0x1p-20f;
  }

  __attribute__((noinline)) Ints lead_exactly(Ints close, Floats scores, Words words, Ints positions) const {
    for (uint32_t left = lane_bits(close); left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const double theirs = scores[lane] + gumbel_noise(words[lane]), best = exact_value(lane);
      const bool wins = theirs > best || (theirs == best && positions[lane] < position[lane]);
      if (!wins) close[lane] = 0;
    }
    return close;
  }
};

}  // namespace emc2
