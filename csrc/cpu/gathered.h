// Walks over gathered keys: each row has proposals of its own, drawn uniformly with replacement or given as positions.
#pragma once

#include "../operands.h"
#include "recorder.h"

namespace emc2 {

// Positions of the shard's proposals, (rows, schedule.count) with unit last stride; null: drawn from the position
// stream.
struct Positions {
  const int64_t* data;
  int64_t stride;
};

// Throws std::invalid_argument for values that are not legal, positions outside the keys among them.
void walk_gathered(const Recorder& recorder, const Operands& operands, const Positions& positions);

}  // namespace emc2
