// The similarities of queries and keys, made tile by tile: whoever looks at each of them once gets it from the
// first-level cache, and nothing of size (rows, keys) is ever written.
//
// Roofline: 2 d operations for each similarity, at two fused multiply-adds of a vector a cycle; the tile of keys and
// the block of queries stay in the second-level cache, so memory is read (keys * rows / kBlockRows + rows) * d
// elements. The multiply-adds bind: a block's sums fill the registers, and each of their operands is read from the
// first level.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dot.h"

namespace emc2 {

constexpr int kGroupVectors = 2;  // of rows that are walked together
constexpr int kGroupRows = kGroupVectors * kLanes;

// Keys whose sums, kGroupVectors each, fill 32 or 16 registers beside a column of queries and one number of a key.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kKeyBlock = 12;
#else
constexpr int kKeyBlock = 6;
#endif

// Below so many operations of a lane, waking the threads costs more than they save.
constexpr int64_t kParallelWork = 1 << 18;

constexpr int64_t kTileVectors = 2048 / kLanes;  // of scores: 8 KB, which stay in the first-level cache
constexpr int64_t kCachedElements = 1 << 16;     // 256 KB: of a tile's keys, and of a block's queries
constexpr int64_t kSummedAtOnce = 512;           // products of a similarity, before they are added to the others
constexpr int64_t kMostGroups = 8;  // of a block of rows, for which a tile's keys are read from memory once

// Interleaving the first half of the vectors with the second, log2(kLanes) times, transposes them.
EMC2_HD void transpose(Floats (&rows)[kLanes]) {
  Ints low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kLanes;
    high[lane] = low[lane] + kLanes / 2;
  }
  for (int span = 1; span < kLanes; span *= 2) {
    Floats mixed[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
    std::copy(mixed, mixed + kLanes, rows);
  }
}

// A group's rows, from `begin` on (the last one again past the end), as columns: vector v of component i, at
// columns[i * kGroupVectors + v], has component i of kLanes rows.
template <class Element>
void load_columns(const Element* rows, int64_t stride, int64_t begin, int64_t count, int64_t dim, int vectors,
                  Floats* columns) {
  for (int v = 0; v < vectors; ++v) {
    for (int64_t i = 0; i < dim; i += kLanes) {
      Floats block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = std::min(begin + v * kLanes + lane, count - 1);
        block[lane] = load_floats(rows + row * stride + i, dim - i);
      }
      transpose(block);
      for (int64_t j = i; j < std::min(i + kLanes, dim); ++j) columns[j * kGroupVectors + v] = block[j - i];
    }
  }
}

// The other way round: lanes begin .. end - 1 of each component's vector as rows of (rows, dim) float32. Whether all
// are finite.
inline bool store_rows(const Floats* columns, int64_t begin, int64_t end, int64_t dim, float* rows) {
  Floats total{};
  for (int64_t i = 0; i < dim; i += kLanes) {
    Floats block[kLanes] = {};
    const int64_t width = std::min<int64_t>(kLanes, dim - i);
    for (int64_t j = 0; j < width; ++j) {
      block[j] = columns[(i + j) * kGroupVectors];
      total += block[j] - block[j];  // 0, or NaN
    }
    transpose(block);
    for (int64_t row = begin; row < end; ++row) std::memcpy(rows + row * dim + i, &block[row - begin], 4 * width);
  }
  return !any(total != total);
}

// Which numbers of rows, `stride` apart, a product takes: kCount rows along their components, or kCount components of
// the rows one after another.
enum class Take { kRows, kComponents };

// sums[k * kGroupVectors + v] += sum over t < count of columns[t * kGroupVectors + v] * (component t of row k, or
// component k of row t), for k < kCount and v < kVectors. What is added is summed by itself first: over many terms,
// small ones would be rounded to a large sum. Not inlined: beside other loops GCC does not keep the sums in registers.
template <Take kTake, int kCount, int kVectors>
__attribute__((noinline)) void add_products(const Floats* columns, const float* rows, int64_t stride, int64_t count,
                                            Floats* sums) {
  constexpr bool kAlong = kTake == Take::kRows;
  Floats registers[kCount][kVectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    EMC2_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const Floats scalar = all_floats(rows[kAlong ? k * stride + t : t * stride + k]);
      EMC2_UNROLL
      for (int v = 0; v < kVectors; ++v) registers[k][v] += columns[t * kGroupVectors + v] * scalar;
    }
  }
  for (int k = 0; k < kCount; ++k) {
    for (int v = 0; v < kVectors; ++v) sums[k * kGroupVectors + v] += registers[k][v];
  }
}

// float32 keys of a tile, in whole blocks (the last key again past the end): where they lie, or widened into a buffer.
class KeyTile {
 public:
  template <class Element>
  void load(const Element* keys, int64_t stride, int64_t begin, int64_t end, int64_t dim) {
    if constexpr (std::is_same_v<Element, float>) {
      rows_ = keys + begin * stride, stride_ = stride;
      whole_ = (end - begin) / kKeyBlock * kKeyBlock;
    } else {
      whole_ = 0;
    }
    const int64_t rest = begin + whole_;
    copy_stride_ = padded_to_lanes(dim);
    copies_.resize((end - rest + kKeyBlock - 1) / kKeyBlock * kKeyBlock * copy_stride_);
    for (int64_t k = 0; k * copy_stride_ < static_cast<int64_t>(copies_.size()); ++k)
      load_row(keys + std::min(rest + k, end - 1) * stride, dim, copies_.data() + k * copy_stride_);
  }

  // Similarities of the first `count` keys and the first `vectors` of a group's: dots[k * kGroupVectors + v].
  void multiply(const Floats* columns, int64_t count, int64_t dim, int vectors, Floats* dots) const {
    vectors == 1 ? multiply<1>(columns, count, dim, dots) : multiply<kGroupVectors>(columns, count, dim, dots);
  }

  // Adds the first `count` keys, times the weights that the first `vectors` of a group have for each, to the columns
  // `sums`.
  void add_weighted(const Floats* weights, int64_t count, int64_t dim, int vectors, Floats* sums) const {
    vectors == 1 ? add_weighted<1>(weights, count, dim, sums) : add_weighted<kGroupVectors>(weights, count, dim, sums);
  }

 private:
  template <int kVectors>
  void multiply(const Floats* columns, int64_t count, int64_t dim, Floats* dots) const {
    for (int64_t k = 0; k < count; k += kKeyBlock) {
      const bool in_place = k < whole_;
      const float* block = in_place ? rows_ + k * stride_ : copies_.data() + (k - whole_) * copy_stride_;
      Floats* sums = dots + k * kGroupVectors;
      std::fill(sums, sums + kKeyBlock * kGroupVectors, Floats{});
      for (int64_t i = 0; i < dim; i += kSummedAtOnce) {
        add_products<Take::kRows, kKeyBlock, kVectors>(columns + i * kGroupVectors, block + i,
                                                       in_place ? stride_ : copy_stride_,
                                                       std::min(kSummedAtOnce, dim - i), sums);
      }
    }
  }

  template <int kVectors>
  void add_weighted(const Floats* weights, int64_t count, int64_t dim, Floats* sums) const {
    const int64_t here = std::min(count, whole_);
    add_weighted<kVectors>(weights, rows_, stride_, here, dim, sums);
    add_weighted<kVectors>(weights + here * kGroupVectors, copies_.data(), copy_stride_, count - here, dim, sums);
  }

  template <int kVectors>
  static void add_weighted(const Floats* weights, const float* keys, int64_t stride, int64_t count, int64_t dim,
                           Floats* sums) {
    int64_t i = 0;
    for (; i + kKeyBlock <= dim; i += kKeyBlock)
      add_products<Take::kComponents, kKeyBlock, kVectors>(weights, keys + i, stride, count, sums + i * kGroupVectors);
    for (; i + 4 <= dim; i += 4)
      add_products<Take::kComponents, 4, kVectors>(weights, keys + i, stride, count, sums + i * kGroupVectors);
    for (; i < dim; ++i)
      add_products<Take::kComponents, 1, kVectors>(weights, keys + i, stride, count, sums + i * kGroupVectors);
  }

  const float* rows_ = nullptr;
  int64_t stride_ = 0, whole_ = 0, copy_stride_ = 0;
  std::vector<float> copies_;
};

// Keys key_begin .. key_end - 1 of a group of rows.
struct ScoreTile {
  const Floats* dots;  // [(key - key_begin) * kGroupVectors + vector]
  const KeyTile* keys;
  int64_t key_begin, key_end;
  int vectors;  // of the group that have rows; what others hold means nothing

  int64_t count() const { return key_end - key_begin; }
};

// How rows and keys are cut: a task is a block of groups of rows, and a range of tiles of keys.
struct Blocking {
  int64_t rows, keys;
  int num_threads;
  int64_t groups, block_groups, tile_keys;
  int64_t key_ranges = 1;

  // `walked`: operations of a score after its product. `most_rows`: of a block, where what is kept for a row is large.
  Blocking(int64_t rows, int64_t keys, int64_t dim, int64_t walked, int threads,
           int64_t most_rows = kMostGroups * kGroupRows)
      : rows(rows), keys(keys), num_threads(rows * keys * (dim + walked) < kParallelWork ? 1 : std::max(threads, 1)) {
    groups = (rows + kGroupRows - 1) / kGroupRows;
    const int64_t fitting = std::min(kCachedElements / std::max<int64_t>(dim, 1), most_rows) / kGroupRows;
    const int64_t shared = groups / (4 * num_threads);  // leaves each thread some blocks
    block_groups = std::clamp<int64_t>(std::min(fitting, shared), 1, kMostGroups);
    const int64_t tile = std::min(kTileVectors / kGroupVectors, kCachedElements / std::max<int64_t>(dim, 1));
    tile_keys = std::max<int64_t>(tile / kKeyBlock, 1) * kKeyBlock;
  }

  int vectors(int64_t group) const {
    return static_cast<int>(std::min<int64_t>((rows - group * kGroupRows + kLanes - 1) / kLanes, kGroupVectors));
  }

  int64_t blocks() const { return (groups + block_groups - 1) / block_groups; }
  int64_t tiles() const { return (keys + tile_keys - 1) / tile_keys; }

  // For walks in any order: where there are too few rows for the threads, each takes some of the keys.
  void split_keys() {
    const int64_t wanted = blocks() ? (2 * num_threads + blocks() - 1) / blocks() : 1;
    if (num_threads > 1) key_ranges = std::clamp<int64_t>(tiles(), 1, wanted);
  }
};

// Gives `walker` all tiles of each group of rows, in the order of the keys; of several ranges of keys each to another
// Group. Walker::Group is what it keeps of a group: `start(group, number)`, `walk(group, tile)`, `end(group)`.
//
// `other_keys`: in the place of those of the operands; float32, rows padded to whole vectors.
template <class Element, class Walker>
void walk_score_tiles(const Operands& operands, const Blocking& blocking, Walker& walker,
                      const float* other_keys = nullptr) {
  const int64_t dim = operands.dim, tasks = blocking.blocks() * blocking.key_ranges;
  const int64_t range = (blocking.tiles() + blocking.key_ranges - 1) / blocking.key_ranges * blocking.tile_keys;
  const int threads = static_cast<int>(std::clamp<int64_t>(tasks, 1, blocking.num_threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<Floats> columns(blocking.block_groups * dim * kGroupVectors);
    std::vector<Floats> dots(blocking.tile_keys * kGroupVectors);
    std::vector<typename Walker::Group> states(blocking.block_groups);
    KeyTile tile;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task / blocking.key_ranges * blocking.block_groups;
      const int64_t count = std::min(blocking.block_groups, blocking.groups - first);
      for (int64_t g = 0; g < count; ++g) {
        load_columns(static_cast<const Element*>(operands.queries), operands.query_stride, (first + g) * kGroupRows,
                     blocking.rows, dim, blocking.vectors(first + g), columns.data() + g * dim * kGroupVectors);
        walker.start(states[g], first + g);
      }
      const int64_t range_begin = task % blocking.key_ranges * range;
      const int64_t range_end = std::min(range_begin + range, blocking.keys);
      for (int64_t begin = range_begin, end; begin < range_end; begin = end) {
        end = std::min(begin + blocking.tile_keys, range_end);
        if (other_keys) {
          tile.load(other_keys, padded_to_lanes(dim), begin, end, dim);
        } else {
          tile.load(static_cast<const Element*>(operands.keys), operands.key_stride, begin, end, dim);
        }
        for (int64_t g = 0; g < count; ++g) {
          const int vectors = blocking.vectors(first + g);
          tile.multiply(columns.data() + g * dim * kGroupVectors, end - begin, dim, vectors, dots.data());
          walker.walk(states[g], {dots.data(), &tile, begin, end, vectors});
        }
      }
      for (int64_t g = 0; g < count; ++g) walker.end(states[g]);
    }
  }
}

}  // namespace emc2
