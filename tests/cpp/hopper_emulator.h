// csrc/cuda/hopper.cuh for a CPU: the same functions, on fibers.
//
// Barriers count arrivals and bytes as the PTX manual says. A tensor copy puts each 16 bytes where the 128-byte swizzle
// does, and a product finds them by its descriptor, bit by bit as the hardware would. Neither happens when it is asked
// for, where `emulator::late` says so: copies come in another order and only when somebody waits, products only when
// somebody waits for them. So what is read too early, or overwritten too early, comes out wrong.
#pragma once

#include <deque>
#include <functional>
#include <map>

#include "cuda_runtime.h"

#include "../../csrc/cuda/vector_loads.cuh"

namespace emc2::hopper {

constexpr bool kAvailable = true;

template <class Layout>
Layout& shared_memory() {
  return *reinterpret_cast<Layout*>(emulator::block().shared);
}

// From the beginning of the block's shared memory.
inline uint32_t offset_of(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::block().shared);
}

template <int kCount>
void shrink_registers() {}
template <int kCount>
void grow_registers() {}

// ---- Clusters.

inline uint32_t rank_of(const emulator::Block& block) {
  return emulator::cluster[0].get() == &block ? 0 : 1;
}
inline uint32_t cluster_rank() { return rank_of(emulator::block()); }

// As in a cluster: the block's rank is in the highest byte.
inline uint32_t shared_address(const void* pointer) { return cluster_rank() << 24 | offset_of(pointer); }

inline void sync_cluster() { emulator::meet(emulator::cluster_barrier, "sync_cluster"); }

// The same place in the shared memory of another block of the cluster.
template <class Value>
Value& place_in(uint32_t rank, Value& mine) {
  return *reinterpret_cast<Value*>(emulator::cluster[rank]->shared + offset_of(&mine));
}

// ---- Barriers.

struct Barrier {
  int32_t count, pending;
  int32_t bytes;  // announced and not come yet; below 0 where they came first
  uint32_t phase;

  void settle() {
    ++emulator::progress;
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = count;
  }
};

inline void init_barrier(Barrier& barrier, uint32_t count) {
  barrier = {static_cast<int32_t>(count), static_cast<int32_t>(count), 0, 0};
}
inline void fence_barrier_init() {}

inline void arrive(Barrier& barrier) {
  if (--barrier.pending < 0) emulator::fail("more arrivals at a barrier than it counts");
  barrier.settle();
}
inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  barrier.bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}
inline void arrive_at(Barrier& barrier, uint32_t rank) { arrive(place_in(rank, barrier)); }

inline std::deque<std::function<void()>> copies;  // asked for and not made yet
inline uint64_t copies_made = 0;

inline void wait(Barrier& barrier, uint32_t parity) {
  while ((barrier.phase & 1) == parity) {
    if (!copies.empty()) {
      const bool newest = ++copies_made % 2 == 0;  // not in the order in which they were asked for
      const auto copy = newest ? copies.back() : copies.front();
      newest ? copies.pop_back() : copies.pop_front();
      copy();
    }
    if ((barrier.phase & 1) == parity) emulator::yield();
  }
}

// ---- Tensor copies.

constexpr int kMaxDims = 3;
struct TensorMap {
  const char* matrix;
  int dims;
  uint64_t sizes[kMaxDims];
  uint64_t strides[kMaxDims];  // bytes
  uint32_t box[kMaxDims];
};

template <int kDims>
const char* encode(TensorMap& map, const void* matrix, Dtype, const uint64_t (&sizes)[kDims],
                   const uint64_t (&strides)[kDims - 1], const uint32_t (&box)[kDims]) {
  if (!emulator::has_context) return "the thread has no context";
  map = {static_cast<const char*>(matrix), kDims, {1, 1, 1}, {2, 0, 0}, {1, 1, 1}};
  for (int i = 0; i < kDims; ++i) {
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] > 256) return "a size is refused";
  }
  for (int i = 0; i + 1 < kDims; ++i) {
    map.strides[i + 1] = strides[i];
    if (strides[i] == 0 || strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return "a stride is refused";
  }
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || 2 * box[0] > 128) return "a matrix is refused";
  return nullptr;
}

inline void prefetch_map(const TensorMap&) {}

inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

inline uint32_t box_bytes(const TensorMap& map) { return 2 * map.box[0] * map.box[1] * map.box[2]; }

// Into a block's shared memory, from `address` on; `at`: the box's first element of each dimension.
inline void fill_box(char* shared, uint32_t address, const TensorMap& map, const int64_t (&at)[kMaxDims]) {
  for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
    for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
      for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, address += 2) {
        const int64_t place[kMaxDims] = {at[0] + i0, at[1] + i1, at[2] + i2};
        bool inside = true;
        int64_t offset = 0;
        for (int i = 0; i < kMaxDims; ++i) {
          inside &= place[i] >= 0 && place[i] < static_cast<int64_t>(map.sizes[i]);
          offset += place[i] * static_cast<int64_t>(map.strides[i]);
        }
        uint16_t bits = 0;
        if (inside) std::memcpy(&bits, map.matrix + offset, sizeof bits);
        std::memcpy(shared + swizzle128(address), &bits, sizeof bits);
      }
    }
  }
}

inline void copy(uint16_t ranks, void* to, const TensorMap& map, const int64_t (&at)[kMaxDims], Barrier& barrier) {
  const uint32_t address = offset_of(to), barrier_address = offset_of(&barrier);
  if (address % 1024 != 0) emulator::fail("a copy into shared memory that is not aligned");
  ++emulator::progress;
  const int64_t at0 = at[0], at1 = at[1], at2 = at[2];
  for (size_t rank = 0; rank < emulator::cluster.size(); ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    char* const shared = emulator::cluster[rank]->shared;
    const auto make = [=, &map] {
      fill_box(shared, address, map, {at0, at1, at2});
      Barrier& told = *reinterpret_cast<Barrier*>(shared + barrier_address);
      told.bytes -= static_cast<int32_t>(box_bytes(map));
      told.settle();
    };
    if (emulator::late) {
      copies.push_back(make);
    } else {
      make();
    }
  }
}

inline void copy_box(void* to, const TensorMap& map, int column, int row, Barrier& barrier) {
  copy(static_cast<uint16_t>(1 << cluster_rank()), to, map, {column, row, 0}, barrier);
}
inline void copy_box_to(uint16_t ranks, void* to, const TensorMap& map, int column, int segment, int step,
                        Barrier& barrier) {
  copy(ranks, to, map, {column, segment, step}, barrier);
}

// ---- Products.

struct Products {
  std::deque<std::pair<int, std::function<void()>>> waiting;  // with the number of their group
  int group = 0;
};
inline std::map<const emulator::Fiber*, Products> products;  // under way
inline Products& own_products() { return products[emulator::current]; }

inline void meet_group() {
  emulator::meet(emulator::block().warpgroups[emulator::current->thread.x / 128], "an instruction of a warpgroup");
}

inline void fence_products() {}
template <int kCount>
void fence_sums(float (&)[kCount]) {}

// A descriptor: 8 rows of 128 bytes are an atom, and atoms are `stride` bytes apart. In no field is what belongs to
// another; the leading offset, which this swizzle does not use, is 1 by the PTX manual.
inline bool is_clean(uint64_t description) {
  constexpr uint64_t kStart = 0x3fff, kStride = uint64_t{0x3fff} << 32;
  return (description & ~(kStart | kStride)) == (uint64_t{1} << 62 | uint64_t{1} << 16);
}

template <class Half>
float operand(const char* shared, uint64_t description, int row, int column) {
  const uint32_t start = static_cast<uint32_t>(description & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(description >> 32 & 0x3fff) << 4;
  const uint32_t address = start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8 * 128 + 2 * column);
  uint16_t bits;
  std::memcpy(&bits, shared + swizzle128(address), sizeof bits);
  return low_half(bits, Half{});
}

template <class Half>
void multiply(float (&sums)[64], uint64_t rows, uint64_t columns, bool add, Half) {
  if (rows >> 62 != 1 || columns >> 62 != 1) emulator::fail("only the 128-byte swizzle is emulated");
  if (!is_clean(rows) || !is_clean(columns)) emulator::fail("a description holds more than its fields");
  meet_group();
  const char* const shared = emulator::block().shared;
  const int thread = static_cast<int>(emulator::current->thread.x) % 128;
  const auto make = [=, &sums] {
    for (int i = 0; i < 64; ++i) {
      const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      float sum = add ? sums[i] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += operand<Half>(shared, rows, row, k) * operand<Half>(shared, columns, column, k);
      sums[i] = sum;
    }
  };
  Products& mine = own_products();
  if (emulator::late) {
    for (float& sum : sums) sum = add ? sum : __builtin_nanf("");  // nobody may look
    mine.waiting.emplace_back(mine.group, make);
  } else {
    make();
  }
}

inline void commit_products() { ++own_products().group; }

template <int kGroups>
void wait_products() {
  meet_group();
  Products& mine = own_products();
  while (!mine.waiting.empty() && mine.waiting.front().first < mine.group - kGroups) {
    mine.waiting.front().second();
    mine.waiting.pop_front();
  }
}

}  // namespace emc2::hopper
