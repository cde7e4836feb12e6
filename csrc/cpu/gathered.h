// Walks over gathered keys: each row has proposals of its own, drawn uniformly with replacement or given as positions.
#pragma once

#include "../params.h"

namespace emc2 {

// Throws std::invalid_argument for values that are not legal, positions outside the keys among them.
void walk_gathered(const Walk& walk);

}  // namespace emc2
