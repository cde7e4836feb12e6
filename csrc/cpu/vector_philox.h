// Philox for a group of chains, one chain a lane.
//
// Rounds 1 and 2 of Philox mix the chain and the block only by exclusive-or, so all their multiplies belong to the row
// or to the column and leave the inner loop: five rounds of seven remain. tests/ops/test_philox.py holds this equal to
// the plain generator.
#pragma once

#include "simd.h"

namespace emc2 {

// A block's share of the state after two rounds, which all chains of a seed and step have in common.
struct BlockPhilox {
  uint32_t c0, c1, c2;

  EMC2_HD BlockPhilox(PhiloxKey key, uint32_t step, uint32_t block) {
    const auto p0 = multiply_wide(kPhiloxMultiplier0, block);
    const auto p1 = multiply_wide(kPhiloxMultiplier1, p0.high ^ step ^ key.k1);
    c0 = p1.high, c1 = p1.low, c2 = p0.low;
  }
};

struct VectorPhilox {
  PhiloxKey key;
  uint32_t step;
  SplitWords c0, c2, c3;  // the chains' share of the state after two rounds

  VectorPhilox() = default;

  VectorPhilox(PhiloxKey key, uint32_t step, Words chain_low, Words tag) : key(key), step(step) {
    const auto p1 = multiply_wide(kPhiloxMultiplier1, split(tag));
    const SplitWords first_c0 = p1.high ^ split(chain_low) ^ key.k0;
    const SplitWords first_c1 = p1.low;
    const auto p0 = multiply_wide(kPhiloxMultiplier0, first_c0);
    const PhiloxKey second = round_key(key, 1);
    c0 = first_c1 ^ second.k0;
    c2 = p0.high ^ second.k1;
    c3 = p0.low;
  }

  // The four words of a block: of proposals, or keys, 4 * block .. 4 * block + 3.
  EMC2_HD PhiloxBlock<Words> words(const BlockPhilox& block) const {
    const auto state = philox_rounds<SplitWords>({c0 ^ block.c0, SplitWords{} ^ block.c1, c2 ^ block.c2, c3}, key, 2);
    return {join(state.c0), join(state.c1), join(state.c2), join(state.c3)};
  }

  EMC2_HD PhiloxBlock<Words> words(uint32_t block) const { return words(BlockPhilox(key, step, block)); }
};

}  // namespace emc2
