// The scores of a small sweep. Up to some 2^20 multiplies, calling torch's matrix product costs more than the product
// itself.
#pragma once

#include <type_traits>
#include <vector>

#include "dot.h"

namespace emc2 {

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

// Rows begin .. begin + kLanes - 1 (the last row again past the end) as columns: columns[i] holds component i of each.
template <class Element>
void load_columns(const Element* rows, int64_t stride, int64_t begin, int64_t count, int64_t dim, Floats* columns) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    Floats block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      block[lane] = load_floats(rows + std::min(begin + lane, count - 1) * stride + i, dim - i);
    }
    transpose(block);
    std::copy(block, block + std::min<int64_t>(kLanes, dim - i), columns + i);
  }
}

constexpr int kKeyBlock = 8;  // keys whose sums, and a column of queries, fit the registers

// kKeyBlock float32 keys from `begin` on, one behind the other at `stride`: where they lie, or widened into `buffer`.
struct KeyBlock {
  const float* rows;
  int64_t stride;

  template <class Element>
  KeyBlock(const Element* keys, int64_t key_stride, int64_t begin, int64_t count, int64_t dim,
           std::vector<float>& buffer) {
    if constexpr (std::is_same_v<Element, float>) {
      if (begin + kKeyBlock <= count) {
        rows = keys + begin * key_stride;
        stride = key_stride;
        return;
      }
    }
    stride = (dim + kLanes - 1) / kLanes * kLanes;
    buffer.resize(kKeyBlock * stride);
    for (int k = 0; k < kKeyBlock; ++k)
      load_row(keys + std::min(begin + k, count - 1) * key_stride, dim, buffer.data() + k * stride);
    rows = buffer.data();
  }
};

// dots[j * stride + lane] = <q, k_j> for the group of kLanes queries from row `begin` on, and all `count` keys j.
template <class Element>
void group_products(const Element* queries, int64_t query_stride, int64_t begin, int64_t rows, const Element* keys,
                    int64_t key_stride, int64_t count, int64_t dim, float* dots, int64_t stride) {
  std::vector<Floats> columns(dim);
  std::vector<float> buffer;
  load_columns(queries, query_stride, begin, rows, dim, columns.data());
  for (int64_t key = 0; key < count; key += kKeyBlock) {
    const KeyBlock block(keys, key_stride, key, count, dim, buffer);
    Floats sums[kKeyBlock] = {};
    for (int64_t i = 0; i < dim; ++i) {
      EMC2_UNROLL
      for (int k = 0; k < kKeyBlock; ++k) sums[k] += columns[i] * block.rows[k * block.stride + i];
    }
    for (int k = 0; k < kKeyBlock && key + k < count; ++k) store(dots + (key + k) * stride, sums[k]);
  }
}

}  // namespace emc2
