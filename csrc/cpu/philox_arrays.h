// Draws of arrays of counters, outside a walk.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "checks.h"

namespace emc2 {

// The view coins of items, whose numbers are the streams' chain ids: the top bit of word 0 of block 0.
inline void view_coins(const StreamParams& items, int64_t count, int64_t* views) {
  require_within(items.chain_ids, count, kChains, "items: a value outside [0, 2^40)");
  const PhiloxKey key = philox_key(items.seed_value());
  for (int64_t i = 0; i < count; ++i) {
    views[i] = philox_rounds(philox_counter(items.chain(i), kViewCoinStream, items.step_value(), 0), key).c0 >> 31;
  }
}

// Whole counters, four words each: what the tests compare between backends.
inline void philox_words(const uint32_t* counters, int64_t count, uint64_t seed, uint32_t* words) {
  for (int64_t i = 0; i < 4 * count; i += 4) {
    const auto block =
        philox_rounds<uint32_t>({counters[i], counters[i + 1], counters[i + 2], counters[i + 3]}, philox_key(seed));
    words[i] = block.c0;
    words[i + 1] = block.c1;
    words[i + 2] = block.c2;
    words[i + 3] = block.c3;
  }
}

}  // namespace emc2
