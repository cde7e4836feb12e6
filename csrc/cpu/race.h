// argmax of score + Gumbel noise, keys in any number of tiles: what each (key, sample) needs is a quarter of a call of
// the generator and a comparison; the logarithms of the noise are taken only of keys that may win by a bound on it.
#pragma once

#include <algorithm>
#include <cmath>

#include "vector_philox.h"

namespace emc2 {

constexpr double kLog2 = 0.69314718055994530942;

// The noise of the contract: v = (word + 0.5) * 2^-32, E = -log1p(-v), noise -log E.
inline double gumbel_noise(uint32_t word) { return -std::log(-std::log1p(-(word + 0.5) * 0x1p-32)); }

// log v + 158 log 2 or less, by up to 0.06 (more for words below 2^4): the bits of a float are its logarithm, but for a
// chord in place of a curve.
EMC2_HD Floats log_bound(Words word) {
  const Floats half = __builtin_convertvector((Ints)(word >> 1), Floats);
  return __builtin_convertvector((Ints)half, Floats) * static_cast<float>(kLog2 * 0x1p-23);
}

// A key beats `best` iff log E < score - best, and log v <= log E: so it must have log_bound + filter < score. The
// margin is more than all roundings (log_bound exceeds its bound by 7.2e-6 at most).
inline float race_filter(double best) {
  return static_cast<float>(best - 158 * kLog2 - 2e-4 - std::fabs(best) * 0x1p-20);
}

// The best key so far of kLanes neighbouring rows, for one sample.
struct Race {
  Floats filter = all_floats(-kInfinity);  // what a score must exceed, beside a bound on its noise, to be looked at
  double best[kLanes];
  int32_t position[kLanes];

  Race() {
    std::fill(best, best + kLanes, -static_cast<double>(kInfinity));
    std::fill(position, position + kLanes, -1);
  }

  void lead(int lane, double value, float, int32_t key) {
    best[lane] = value;
    position[lane] = key;
    filter[lane] = race_filter(value);
  }
};

// Some 10 of 1,000 keys come here, so their logarithms are taken one by one, in double.
template <class AnyRace>
void enter(AnyRace& race, Ints candidates, Floats scores, Words words, int64_t key) {
  for (uint32_t left = lane_bits(candidates); left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const double value = scores[lane] + gumbel_noise(words[lane]);
    if (value > race.best[lane]) race.lead(lane, value, scores[lane], static_cast<int32_t>(key));
  }
}

// Keys begin .. end - 1, whose draws are numbered from first_key on, enter the races of `count` samples, by the blocks
// of four draws. `scores_of(key, scores)` gives the scores of four keys from `key` on; -inf where one is not of these
// keys.
template <class AnyRace, class ScoresOf>
EMC2_HD void race_keys(int64_t first_key, int64_t begin, int64_t end, const VectorPhilox* draws, AnyRace* races,
                       int64_t count, ScoresOf scores_of) {
  for (int64_t block = (first_key + begin) / 4; 4 * block < first_key + end; ++block) {
    const int64_t key = 4 * block - first_key;
    const BlockPhilox share(draws->key, draws->step, static_cast<uint32_t>(block));
    Floats scores[4];
    scores_of(key, scores);
    for (int64_t s = 0; s < count; ++s) {
      AnyRace& race = races[s];
      const PhiloxBlock<Words> drawn = draws[s].words(share);
      const Words words[4] = {drawn.c0, drawn.c1, drawn.c2, drawn.c3};
      Ints candidates[4], some{};
      for (int i = 0; i < 4; ++i) {
        candidates[i] = log_bound(words[i]) + race.filter < scores[i];
        some |= candidates[i];
      }
      if (__builtin_expect(!any(some), 1)) continue;
      for (int i = 0; i < 4; ++i) enter(race, candidates[i], scores[i], words[i], key + i);
    }
  }
}

}  // namespace emc2
