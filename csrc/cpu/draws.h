// Draws that are made on their own, outside a walk.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "values.h"

namespace emc2 {

// The view coin of an item: the top bit of word 0 of block 0, chain = item.
inline void view_coins(const int64_t* items, int64_t count, uint64_t seed, uint32_t step, int64_t* views) {
  require_within(items, count, kChains, "items: a value outside [0, 2^40)");
  for (int64_t i = 0; i < count; ++i) {
    views[i] = philox_rounds(philox_counter(items[i], kViewCoinStream, step, 0), philox_key(seed)).c0 >> 31;
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
