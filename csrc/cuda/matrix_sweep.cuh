// A large sweep on the matrix units of compute capability 9.0: a product's tiles are walked in registers, in the shadow of
// the next product.
//
// A block of three warpgroups has 128 rows, which stay in shared memory. One warpgroup copies keys, 64 dimensions of 128
// keys at a time, into a ring of stages; the other two have 64 rows each, and while the matrix unit multiplies a tile,
// they walk the one before. Two blocks of a cluster have the same keys: each copies half of them to both. Blocks stay,
// and take one piece of work after another: 256 rows and a split of the keys for a cluster.
//
// A copy makes the permutation that the walk wants. The keys of a split are a tensor of (step, segment, dimension), with
// the row's and the segment's length as strides; a box of 16 steps, 8 segments and 64 dimensions lands with the segments
// innermost, so that column 8 g + s of a product is step g of segment s.
//
// Roofline on an H100, 32,768 rows and keys in bfloat16: 2 d operations a pair on the matrix units, 0.35 ms at d = 128
// and 1.4 ms at 512; keys through the L2, 2 d bytes for 256 rows, 1.1 and 4.3 GB, 0.2 and 0.8 ms; the walk, 0.6 ms
// (tile_walk.cuh). The largest should be what it takes. Not measured.
#pragma once

#if defined(__CUDACC__)
#include "hopper.cuh"
#else
#include "hopper_emulator.h"
#endif
#include "sweep_epilogue.cuh"

namespace emc2::matrix_sweep {

using hopper::Barrier;

constexpr int kCluster = 2;  // blocks
constexpr int kGroups = 2;   // warpgroups of a block that multiply and walk
constexpr int kGroupThreads = 4 * kWarp;
constexpr int kThreads = (1 + kGroups) * kGroupThreads;
constexpr int kGroupRows = 64;  // of one product
constexpr int kBlockRows = kGroups * kGroupRows;
constexpr int kClusterRows = kCluster * kBlockRows;
constexpr int kChunk = 64;        // dimensions: 128 bytes of a row
constexpr int kProductDims = 16;  // of one instruction
constexpr int kRowBytes = 2 * kChunk;
constexpr int kMaxChunks = 8;
constexpr int kSlots = 14;  // of 16 KB: the queries' chunks and the stages of keys
constexpr int kCopyingRegisters = 40, kWalkingRegisters = 232;

struct alignas(1024) Slot {  // 128 rows of a chunk
  unsigned char bytes[kTileKeys * kRowBytes];
};
constexpr int kSlotBytes = sizeof(Slot);
static_assert(kBlockRows == kTileKeys, "a chunk of queries takes a slot, too");

struct Shared {
  Slot slots[kSlots];
  Barrier full[kSlots], empty[kSlots];  // of the stages
  Barrier queries_full, queries_empty;
};
static_assert(sizeof(Shared) <= 227 * 1024, "the most that a block of compute capability 9.0 may have");

struct MatrixSweep : SegmentedWalk {
  hopper::TensorMap query_map, key_map;
  int chunks;
  int32_t tiles;  // of a split
  int64_t clusters_of_rows, splits;
};

// The same in all lanes, as the compiler cannot see: it would not let products be under way across a branch on it.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

__device__ __forceinline__ bool is_first_lane() { return lane_id() == 0; }

// The stages in turn, and the parity of the phase that each is in.
struct Ring {
  int count, stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A cluster's pieces of work. All clusters that are at work at the same time look at the same keys.
struct Work {
  int64_t item;
  const MatrixSweep& sweep;

  __device__ __forceinline__ explicit Work(const MatrixSweep& sweep_)
      : item(static_cast<int64_t>(blockIdx.x) / kCluster), sweep(sweep_) {}
  __device__ __forceinline__ bool is_left() const { return item < sweep.clusters_of_rows * sweep.splits; }
  __device__ __forceinline__ void advance() { item += static_cast<int64_t>(gridDim.x) / kCluster; }
  __device__ __forceinline__ int64_t split() const { return item / sweep.clusters_of_rows; }
  __device__ __forceinline__ int64_t first_row(uint32_t rank) const {
    return item % sweep.clusters_of_rows * kClusterRows + rank * kBlockRows;
  }
};

// ---- One thread of a block asks for all copies.

__device__ __forceinline__ void copy_all(const MatrixSweep& sweep, Shared& shared, uint32_t rank) {
  constexpr int kShare = kSteps / kCluster;  // steps of a tile that this block copies, to both
  Ring ring{kSlots - sweep.chunks};
  uint32_t queries_parity = 0;
  hopper::prefetch_map(sweep.query_map);
  hopper::prefetch_map(sweep.key_map);
  for (Work work(sweep); work.is_left(); work.advance()) {
    hopper::wait(shared.queries_empty, queries_parity ^ 1);
    hopper::arrive_expecting(shared.queries_full, static_cast<uint32_t>(sweep.chunks * kSlotBytes));
    for (int chunk = 0; chunk < sweep.chunks; ++chunk) {
      hopper::copy_box(&shared.slots[chunk], sweep.query_map, chunk * kChunk,
                       static_cast<int>(work.first_row(rank)), shared.queries_full);
    }
    const int segment = static_cast<int>(work.split()) * kSegments;
    for (int32_t tile = 0; tile < sweep.tiles; ++tile) {
      for (int chunk = 0; chunk < sweep.chunks; ++chunk, ring.advance()) {
        hopper::wait(shared.empty[ring.stage], ring.parity ^ 1);  // of both blocks, or the other's would be overwritten
        hopper::arrive_expecting(shared.full[ring.stage], kSlotBytes);
        unsigned char* const to = shared.slots[sweep.chunks + ring.stage].bytes + rank * (kSlotBytes / kCluster);
        hopper::copy_box_to((1 << kCluster) - 1, to, sweep.key_map, chunk * kChunk, segment,
                            tile * kSteps + static_cast<int>(rank) * kShare, shared.full[ring.stage]);
      }
    }
    queries_parity ^= 1;
  }
}

// ---- Products of a warpgroup's rows with the tiles in the stages, chunk by chunk.

// A matrix whose row 0 is at `rows` as the instruction wants it described: 8 rows of 128 bytes are an atom, in which 16
// bytes have been exchanged. The leading offset means nothing there. An address has the block's rank in the cluster
// above what a description has room for.
__device__ __forceinline__ uint64_t describe(const void* rows) {
  constexpr uint64_t kSwizzle128 = 1, kAtomBytes = 8 * kRowBytes;
  constexpr uint32_t kWithinBlock = (1u << 18) - 1;
  return kSwizzle128 << 62 | kAtomBytes >> 4 << 32 | uint64_t{1} << 16 |
         (hopper::shared_address(rows) & kWithinBlock) >> 4;
}
constexpr uint64_t kNextProduct = 2 * kProductDims >> 4;  // in a description, from one product's dimensions to the next's

template <class Element>
class TileProducts {
 public:
  float sums[kThreadScores];

  __device__ __forceinline__ TileProducts(const MatrixSweep& sweep, Shared& shared, int group)
      : sweep_(sweep), shared_(shared), group_(group), ring_{kSlots - sweep.chunks} {}

  __device__ __forceinline__ void begin_tile() { chunk_ = 0; }

  // Of the tile, up to this chunk. The sums must not be looked at until `complete`.
  __device__ __forceinline__ void multiply_until(int end) {
    for (; chunk_ < end; ++chunk_) {
      hopper::wait(shared_.full[ring_.stage], ring_.parity);
      hopper::fence_sums(sums);
      hopper::fence_products();
      const uint64_t rows = describe(shared_.slots[chunk_].bytes + group_ * (kSlotBytes / kGroups));
      const uint64_t keys = describe(&shared_.slots[sweep_.chunks + ring_.stage]);
#pragma unroll
      for (int i = 0; i < kChunk / kProductDims; ++i) {  // past the last dimension copies have left zeros
        hopper::multiply(sums, rows + i * kNextProduct, keys + i * kNextProduct, i > 0 || chunk_ > 0, Element{});
      }
      hopper::commit_products();
      hopper::wait_products<1>();  // those of the chunk before, which have had the time of a quarter of a walk
      release();
      held_ = ring_.stage;
      ring_.advance();
    }
  }

  __device__ __forceinline__ void complete() {
    hopper::wait_products<0>();
    hopper::fence_sums(sums);
    release();
  }

 private:
  __device__ __forceinline__ void release() {
    if (held_ >= 0 && is_first_lane()) {
#pragma unroll
      for (uint32_t rank = 0; rank < kCluster; ++rank) hopper::arrive_at(shared_.empty[held_], rank);
    }
    held_ = -1;
  }

  const MatrixSweep& sweep_;
  Shared& shared_;
  int group_;
  Ring ring_;      // where the next chunk is
  int held_ = -1;  // a stage that products under way read
  int chunk_ = 0;  // the tile's next one
};

// ---- The walk.

constexpr int kDrawn = 4;  // steps of a block of draws
constexpr int kRuns = kSteps / kDrawn;

// One piece of work of a warp: sixteen rows, of which the thread has two, and a split's segments, of which it has two.
struct WarpSplit {
  ThreadRows rows;
  int64_t ids[kThreadRows];
  int64_t first_segment;                  // of the thread's two
  uint32_t first_block[kThreadSegments];  // of draws, where they start
  ThreadWalks walks;

  __device__ __forceinline__ WarpSplit(const MatrixSweep& sweep, int64_t first_row, int64_t split)
      : rows(sweep, first_row + lane_id() / 4, first_row + lane_id() / 4 + 8),
        ids{id_of(sweep, rows.row[0]), id_of(sweep, rows.row[1])},
        first_segment(split * kSegments + lane_id() % 4 * kThreadSegments),
        first_block{block_of(sweep, first_segment), block_of(sweep, first_segment + 1)} {}

  __device__ __forceinline__ static uint32_t block_of(const MatrixSweep& sweep, int64_t segment) {
    return static_cast<uint32_t>((sweep.first_proposal + segment * sweep.segment_length) / kDrawn);
  }

  __device__ __forceinline__ static int64_t id_of(const Walk& walk, int64_t row) {
    return walk.query_ids ? walk.query_ids[ThreadRows::existing(walk, row)] : 0;
  }
};

// What a tile that holds a sample point leaves for the epilogue.
__device__ __forceinline__ void record(const MatrixSweep& sweep, int64_t row, int64_t sample, const SegmentWalk& walk,
                                       int32_t tile, int64_t first_key) {
  if (row >= sweep.num_rows) return;
  const int32_t number = walk.number_at(tile);
  sweep.records[row * sweep.num_samples + sample] = {
      walk.threshold, walk.score, number < 0 ? -1 : static_cast<int32_t>(first_key + number), 0};
}

// Walks sixteen steps of the thread's four chains. `before_run`: what is done before the next four steps of each.
template <bool kRecord, class BeforeRun>
__device__ __forceinline__ void walk_tile(const MatrixSweep& sweep, WarpSplit& split,
                                          const float (&scores)[kThreadScores], int32_t tile, BeforeRun before_run) {
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    before_run(run);
#pragma unroll
    for (int s = 0; s < kThreadSegments; ++s) {
      const BlockDraws block(split.rows.key, split.rows.step,
                             split.first_block[s] + static_cast<uint32_t>(tile * kRuns + run));
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        const PhiloxBlock<uint32_t> words = meet(split.rows.draws[i], block, split.rows.key);
        const uint32_t drawn[kDrawn] = {words.c0, words.c1, words.c2, words.c3};
        const int64_t first_key = (split.first_segment + s) * sweep.segment_length;
        SampleTicks ticks(sweep, sweep.first_proposal + first_key + tile * kSteps + run * kDrawn);
        SegmentWalk& walk = split.walks.of[i][s];
#pragma unroll
        for (int k = 0; k < kDrawn; ++k) {
          const int step = run * kDrawn + k;
          const float score = scores[score_index(step, i, s)];
          walk.step(threshold_of(score, drawn[k]), score, step);
          if (kRecord) {
            const int64_t sample = ticks.tick(sweep);
            if (sample >= 0) record(sweep, split.rows.row[i], sample, walk, tile, first_key);
          }
        }
      }
    }
  }
}

// The ids of four of a tile's keys, which the lane looks up for its warp. All lanes have the whole tile.
struct LaneIds {
  int64_t ids[4] = {};

  __device__ __forceinline__ void load(const MatrixSweep& sweep, int64_t split, int32_t tile) {
    if (!sweep.query_ids || tile >= sweep.tiles) return;
    const int64_t segment = split * kSegments + lane_id() / 4;
    const int64_t* const from = sweep.key_ids + segment * sweep.segment_length + tile * kSteps + lane_id() % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) ids[i] = __ldg(from + i);
  }

  __device__ __forceinline__ bool any_member(const IdFilter& filter, const int64_t (&rows)[kThreadRows]) const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= filter.any_member(ids[i], rows);
    return found;
  }
};

// Walks a tile, while the matrix unit multiplies the next one, of `next_chunks`.
//
// A tile is walked as if all scores were finite. NaN and -inf are never accepted; +inf would be, and shows: as an
// infinite threshold. Then the warp walks the tile again without it.
template <class Element>
__device__ __forceinline__ void walk_scores(const MatrixSweep& sweep, WarpSplit& split, float (&scores)[kThreadScores],
                                            int32_t tile, bool has_samples, int next_chunks,
                                            TileProducts<Element>& products) {
  bool is_infinite = false;
  if (has_samples) {
    products.multiply_until(next_chunks);
  } else {
    const ThreadWalks before = split.walks;
    walk_tile<false>(sweep, split, scores, tile,
                     [&](int run) { products.multiply_until(((run + 1) * next_chunks + kRuns - 1) / kRuns); });
    is_infinite = __any_sync(kAllLanes, split.walks.has_infinite());
    if (is_infinite) split.walks = before;
  }
  if (has_samples || is_infinite) {
    exclude_infinite(scores);
    walk_tile<true>(sweep, split, scores, tile, [](int) {});
  }
  split.walks.end_tile(tile);
}

template <class Element>
__device__ __forceinline__ void walk_split(const MatrixSweep& sweep, WarpSplit& split, int64_t number,
                                           TileProducts<Element>& products, Barrier& queries_empty) {
  const IdFilter filter(split.ids);
  LaneIds lane_ids;
  lane_ids.load(sweep, number, 0);
  const int64_t first_proposal = sweep.first_proposal + number * kSegments * sweep.segment_length;
  int32_t sampled = uniform(next_sampled_tile(sweep, first_proposal, 0, sweep.tiles));
  products.begin_tile();
  products.multiply_until(sweep.chunks);
  for (int32_t tile = 0; tile < sweep.tiles; ++tile) {
    const bool is_last = tile + 1 == sweep.tiles;
    products.complete();
    if (is_last && is_first_lane()) hopper::arrive_at(queries_empty, hopper::cluster_rank());
    float scores[kThreadScores];
#pragma unroll
    for (int i = 0; i < kThreadScores; ++i) scores[i] = products.sums[i] * split.rows.scale[i / 2 % 2];
    products.begin_tile();
    if (sweep.query_ids && lane_ids.any_member(filter, split.ids)) {
      const int64_t* key_ids[kThreadSegments];
#pragma unroll
      for (int s = 0; s < kThreadSegments; ++s) {
        key_ids[s] = sweep.key_ids + (split.first_segment + s) * sweep.segment_length + tile * kSteps;
      }
      exclude_ids(scores, key_ids, split.ids);
    }
    lane_ids.load(sweep, number, tile + 1);
    walk_scores(sweep, split, scores, tile, tile == sampled, is_last ? 0 : sweep.chunks, products);
    if (tile == sampled) sampled = uniform(next_sampled_tile(sweep, first_proposal, tile + 1, sweep.tiles));
  }
}

__device__ __forceinline__ void store_segments(const MatrixSweep& sweep, const WarpSplit& split) {
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    if (split.rows.row[i] >= sweep.num_rows) continue;
#pragma unroll
    for (int s = 0; s < kThreadSegments; ++s) {
      const SegmentWalk& walk = split.walks.of[i][s];
      const int64_t segment = split.first_segment + s;
      const int64_t position = segment * sweep.segment_length + walk.number;
      sweep.segments[split.rows.row[i] * sweep.num_segments + segment] = {
          walk.threshold, walk.score, walk.number < 0 ? -1 : static_cast<int32_t>(position), 0};
    }
  }
}

template <class Element>
__device__ __forceinline__ void walk_all(const MatrixSweep& sweep, Shared& shared, uint32_t rank, int group) {
  const int warp = static_cast<int>(threadIdx.x) % kGroupThreads / kWarp;
  TileProducts<Element> products(sweep, shared, group);
  uint32_t queries_parity = 0;
  for (Work work(sweep); work.is_left(); work.advance()) {
    WarpSplit split(sweep, work.first_row(rank) + group * kGroupRows + warp * (kGroupRows / 4), work.split());
    hopper::wait(shared.queries_full, queries_parity);
    walk_split(sweep, split, work.split(), products, shared.queries_empty);
    store_segments(sweep, split);
    queries_parity ^= 1;
  }
}

__device__ __forceinline__ void init_barriers(Shared& shared) {
  constexpr uint32_t kWalkingWarps = kGroups * kGroupThreads / kWarp;
  for (int i = 0; i < kSlots; ++i) {
    hopper::init_barrier(shared.full[i], 1);
    hopper::init_barrier(shared.empty[i], kCluster * kWalkingWarps);
  }
  hopper::init_barrier(shared.queries_full, 1);
  hopper::init_barrier(shared.queries_empty, kWalkingWarps);
  hopper::fence_barrier_init();
}

// For other architectures it is compiled, because every launch is, and does nothing.
template <class Element>
__global__ void __launch_bounds__(kThreads, 1) matrix_sweep_kernel(const __grid_constant__ MatrixSweep sweep) {
  if constexpr (hopper::kAvailable) {
    Shared& shared = hopper::shared_memory<Shared>();
    const uint32_t rank = hopper::cluster_rank();
    const int group = uniform(static_cast<int>(threadIdx.x) / kGroupThreads);
    if (threadIdx.x == 0) init_barriers(shared);
    __syncwarp();  // which a cluster's barrier expects
    hopper::sync_cluster();
    if (group == 0) {
      hopper::shrink_registers<kCopyingRegisters>();
      if (threadIdx.x == 0) copy_all(sweep, shared, rank);
    } else {
      hopper::grow_registers<kWalkingRegisters>();
      walk_all<Element>(sweep, shared, rank, group - 1);
    }
    __syncwarp();
    hopper::sync_cluster();  // the other block may still copy into this one's memory, or arrive at its barriers
  }
}

}  // namespace emc2::matrix_sweep
