// argmax of score + Gumbel noise over keys that come tile by tile, one row a lane. What each (key, sample) needs is a
// quarter of a call of the generator and a comparison; noise is made only for keys that may win by a bound on it, and
// in float32 where that can tell which of two values is larger.
#pragma once

#include <cmath>

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

// The best key so far of kLanes neighbouring rows, for one sample. Of equal values the lowest position's is the best.
struct Race {
  Floats filter = all_floats(-kInfinity);  // what a score must exceed, beside a bound on its noise, to be looked at
  Floats value = all_floats(-kInfinity);   // of the leader: score + rough noise
  Floats score = all_floats(-kInfinity);
  Words word{};
  Ints position = all_ints(-1);

  double exact_value(int lane) const { return score[lane] + gumbel_noise(word[lane]); }

  // Keys `position` .. + 3, one after another, the most promising first: after it, the others hardly ever can win.
  // `bounds` are above their values, by the filter's measure.
  void enter(Floats (&bounds)[4], const Floats (&scores)[4], const Words (&words)[4], int32_t first) {
    Ints left;
    do {
      Floats bound = bounds[0], its_score = scores[0];
      Words its_word = words[0];
      Ints key = all_ints(0);
      for (int i = 1; i < 4; ++i) {
        const Ints more = bounds[i] > bound;
        bound = more ? bounds[i] : bound;
        its_score = more ? scores[i] : its_score;
        its_word = more ? words[i] : its_word;
        key = more ? all_ints(i) : key;
      }
      try_to_lead(bound > filter, its_score, its_word, key + first);
      left = all_ints(0);
      for (int i = 0; i < 4; ++i) {
        bounds[i] = key == i ? all_floats(-kInfinity) : bounds[i];
        left |= bounds[i] > filter;
      }
    } while (any(left));
  }

 private:
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

// Keys begin .. end - 1, whose draws are numbered from first_key on, enter the races of `count` samples, by the blocks
// of four draws. `scores_of(key, scores)` gives the scores of four keys from `key` on; -inf where one is not of these
// keys.
template <class ScoresOf>
EMC2_HD void race_keys(int64_t first_key, int64_t begin, int64_t end, const VectorPhilox* draws, Race* races,
                       int64_t count, ScoresOf scores_of) {
  for (int64_t block = (first_key + begin) / 4; 4 * block < first_key + end; ++block) {
    const int64_t key = 4 * block - first_key;
    const BlockPhilox share(draws->key, draws->step, static_cast<uint32_t>(block));
    Floats scores[4];
    scores_of(key, scores);
    for (int64_t s = 0; s < count; ++s) {
      Race& race = races[s];
      const PhiloxBlock<Words> drawn = draws[s].words(share);
      const Words words[4] = {drawn.c0, drawn.c1, drawn.c2, drawn.c3};
      Floats bounds[4];
      Ints some{};
      for (int i = 0; i < 4; ++i) {
        bounds[i] = scores[i] - log_bound(words[i]);
        some |= bounds[i] > race.filter;
      }
      if (__builtin_expect(any(some), 0)) race.enter(bounds, scores, words, static_cast<int32_t>(key));
    }
  }
}

}  // namespace emc2
