// The random-number contract: Philox4x32 with 7 rounds (Salmon et al., SC 2011), and which counter names which draw.
//
// A draw is a pure function of (seed, chain, stream, step, block), so it does not depend on tile shape, row order,
// thread or backend. emc2_kernels/rng.py states the same contract in torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace emc2 {

constexpr int kPhiloxRounds = 7;  // the fewest that pass BigCrush; the kernels are bound by this arithmetic
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

enum Stream : uint32_t {
  kAcceptanceStream = 0,
  kPositionStream = 1,
  kGumbelStream = 2,
  kViewCoinStream = 3,
  kCarriedStream = 4,
};

struct PhiloxKey {
  uint32_t k0, k1;
};

// Four 32-bit words. Word is uint32_t, or a vector of them with one chain in each lane.
template <class Word>
struct PhiloxBlock {
  Word c0, c1, c2, c3;
};

template <class Word>
struct WideProduct {
  Word high, low;
};

EMC2_HD WideProduct<uint32_t> multiply_wide(uint32_t multiplier, uint32_t word) {
  const uint64_t product = static_cast<uint64_t>(multiplier) * word;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

EMC2_HD PhiloxKey philox_key(uint64_t seed) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}; }

EMC2_HD PhiloxKey round_key(PhiloxKey key, int round) {
  return {key.k0 + static_cast<uint32_t>(round) * kPhiloxWeyl0, key.k1 + static_cast<uint32_t>(round) * kPhiloxWeyl1};
}

template <class Word>
EMC2_HD PhiloxBlock<Word> philox_round(PhiloxBlock<Word> counter, PhiloxKey key) {
  const auto p0 = multiply_wide(kPhiloxMultiplier0, counter.c0);
  const auto p1 = multiply_wide(kPhiloxMultiplier1, counter.c2);
  return {p1.high ^ counter.c1 ^ key.k0, p1.low, p0.high ^ counter.c3 ^ key.k1, p0.low};
}

// Rounds first .. kPhiloxRounds - 1; a caller that has done the first ones itself starts later.
template <class Word>
EMC2_HD PhiloxBlock<Word> philox_rounds(PhiloxBlock<Word> counter, PhiloxKey key, int first = 0) {
  EMC2_UNROLL
  for (int round = first; round < kPhiloxRounds; ++round) counter = philox_round(counter, round_key(key, round));
  return counter;
}

// The third counter word. Chain ids have 40 bits: 32 in the second word and 8 here.
EMC2_HD uint32_t counter_tag(uint64_t chain, Stream stream, uint32_t sample = 0) {
  return sample << 16 | static_cast<uint32_t>(chain >> 32) << 8 | stream;
}

EMC2_HD PhiloxBlock<uint32_t> philox_counter(uint64_t chain, Stream stream, uint32_t step, uint32_t block,
                                             uint32_t sample = 0) {
  return {block, static_cast<uint32_t>(chain), counter_tag(chain, stream, sample), step};
}

// u = (word >> 9) * 2^-23 + 2^-24 is (2 * (word >> 9) + 1) * 2^-24: this is the odd integer, exact as a float.
template <class Word>
EMC2_HD Word acceptance_numerator(Word word) {
  return word >> 8 | 1u;
}

// High 64 bits of value * count: uniform over 0 .. count - 1 up to count / 2^64.
EMC2_HD uint64_t scale_to_range(uint32_t low, uint32_t high, uint64_t count) {
  const uint64_t value = static_cast<uint64_t>(high) << 32 | low;
#if defined(__CUDA_ARCH__)
  return __umul64hi(value, count);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(value) * count) >> 64);
#endif
}

}  // namespace emc2
