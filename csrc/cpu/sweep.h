// A sweep: every row is proposed the given keys one after another, each tile of scores while it is in the cache.
#pragma once

#include "walk_output.h"

namespace emc2 {

// There may be no rows, or no keys. Throws std::invalid_argument for values that are not legal, before anything is
// written.
void walk_sweep(const Walk& walk);

}  // namespace emc2
