// A sweep: every row is proposed the given keys one after another. The caller makes the scores, tile by tile, with the
// matrix product that it has; this class walks each tile while it is in cache. Small sweeps are done whole, products
// included.
#pragma once

#include <vector>

#include "vector_philox.h"
#include "walk_output.h"

namespace emc2 {

// <q_i, k_j> for rows row_begin .. row_end - 1 and keys key_begin .. key_end - 1, key by key: dots[(j - key_begin) *
// stride + (i - row_begin)]. row_begin is a multiple of 64; each key's run is readable up to the next multiple of 16
// rows.
struct Tile {
  const float* dots;
  int64_t stride;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
};

// kLanes neighbouring rows and how far their walk has come.
struct RowGroup {
  Transition<Floats, Ints> prefix;
  VectorPhilox draws;
  Floats inverse_temperature;
  Words query_id_low, query_id_high;
  Floats state;    // incoming score
  Floats current;  // score of the walk from the incoming state; kept only where accepts are counted
  Ints accepted;
  Floats lse_max, lse_sum;
};

class Sweep {
 public:
  explicit Sweep(const Walk& walk);  // throws std::invalid_argument for values that are not legal

  // Tiles of a row block come in key order: its first key starts the rows, its last one ends them.
  void walk(const Tile& tile);
  void walk_small();  // all keys, products with walk.operands included; there may be none

 private:
  using Kernel = void (Sweep::*)(const Tile&, int64_t);

  void start(int64_t group);
  void end(int64_t group) const;
  Kernel kernel() const;
  template <class Prepare>
  void walk_groups(const Tile& tile, bool parallel, Prepare prepare);
  template <class Element>
  void walk_small();
  template <bool kExclude, bool kWeighted, bool kCount>
  void walk_group(const Tile& tile, int64_t group);
  void add_lse(const Tile& tile, int64_t group);
  void write_samples(int64_t group, int64_t sample) const;
  RowTransition lane_prefix(const RowGroup& rows, int lane) const;
  Ints excluded(const RowGroup& rows, int64_t key) const;

  Walk walk_;
  std::vector<RowGroup> groups_;
};

}  // namespace emc2
