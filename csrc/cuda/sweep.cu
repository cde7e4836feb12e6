// Small sweeps in one launch: a warp walks a row, or two, and each lane scores one key of a batch.
//
// Where rows and keys are few, waiting is all there is: for the launch, for the first loads, for the barrier. So what
// belongs to a row is loaded first and looked at last, a block stages 64 keys at a time in shared memory with every
// load in flight at once, and all else (draws, walk, outputs) is done by the warp that has the scores in its registers.
// Any shape is walked rightly; large ones belong on matrix units.
#include <utility>

#include "launch.cuh"
#include "vector_loads.cuh"
#include "warp_walk.cuh"

namespace emc2 {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlocksPerProcessor = 2;  // left to itself, the compiler spills at 128 registers
constexpr int kTile = 64;               // keys in shared memory
constexpr int kHalves = kTile / kWarp;
constexpr int kChunk = 128;  // elements of each row in shared memory, as float32
constexpr int kQuads = kChunk / 4;
constexpr int64_t kManyRows = 512;  // above it two rows share each load of a key from shared memory

// One more quad than a row has: the lanes of a load, each in another row, then meet no bank twice.
using TileRow = float4[kQuads + 1];

template <int kRows>
struct Staged {
  TileRow keys[kTile];
  TileRow queries[kWarps * kRows];
};

// One thread's share of a chunk of `kCount` rows, elements at .. at + kChunk - 1 of each: one pack of every kStep-th
// row. Zeros past the last row.
template <class Element, int kCount>
struct Share {
  static constexpr int kPacks = kChunk / kPackElements<Element>;  // of a row
  static constexpr int kStep = kThreads / kPacks;
  static constexpr int kLoads = (kCount + kStep - 1) / kStep;
  const int row = static_cast<int>(threadIdx.x) / kPacks, pack = static_cast<int>(threadIdx.x) % kPacks;
  uint4 packs[kLoads];

  template <bool kAligned>
  __device__ __forceinline__ void load(const void* rows, int64_t stride, int64_t first, int64_t end, int at, int dim) {
    const Element* from = static_cast<const Element*>(rows) + (first + row) * stride;
    const int count = end - first < kCount ? static_cast<int>(end - first) : kCount;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      packs[i] = load_pack<kAligned>(from, at + pack * kPackElements<Element>, row + i * kStep < count ? dim : 0);
      from += kStep * stride;
    }
  }

  __device__ __forceinline__ void store(TileRow* to) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (kCount % kStep == 0 || row + i * kStep < kCount) {
        store_wide(packs[i], to[row + i * kStep] + pack * (kPackElements<Element> / 4), Element{});
      }
    }
  }
};

// All loads before the first store, which would wait for them.
template <class Element, bool kAligned, int kRows>
__device__ __forceinline__ void stage(const TimedWalk& walk, int64_t first_row, int64_t first_key, int at,
                                      Staged<kRows>& staged) {
  const Operands& operands = walk.operands;
  const int dim = static_cast<int>(operands.dim);
  Share<Element, kTile> keys;
  Share<Element, kWarps * kRows> queries;
  keys.template load<kAligned>(operands.keys, operands.key_stride, first_key, walk.num_keys, at, dim);
  queries.template load<kAligned>(operands.queries, operands.query_stride, first_row, walk.num_rows, at, dim);
  keys.store(staged.keys);
  queries.store(staged.queries);
}

// Adds a chunk's products of the warp's rows with the lane's key.
template <int kRows>
__device__ __forceinline__ void add_products(const TileRow& key, const TileRow* queries, int quads,
                                             float (&products)[kRows]) {
  float4 sums[kRows];  // four, because one would wait for its own last addition
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r] = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int i = 0; i < quads; ++i) {
    const float4 k = key[i];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 q = queries[r][i];
      sums[r] = make_float4(fmaf(q.x, k.x, sums[r].x), fmaf(q.y, k.y, sums[r].y), fmaf(q.z, k.z, sums[r].z),
                            fmaf(q.w, k.w, sums[r].w));
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) products[r] += (sums[r].x + sums[r].y) + (sums[r].z + sums[r].w);
}

// Of a lane's scores so far: log-sum-exp as largest + log(sum). One exponential each.
struct LogSumExp {
  float largest = kMinusInfinity, sum = 0.0f;

  __device__ __forceinline__ void add(float score) {
    const float above = score - largest, scale = __expf(-fabsf(above));
    sum = above > 0.0f ? fmaf(sum, scale, 1.0f) : sum + scale;
    largest = fmaxf(largest, score);
  }

  // Of all lanes, in every lane.
  __device__ __forceinline__ float total() const {
    float all_largest = largest;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      all_largest = fmaxf(all_largest, __shfl_xor_sync(kAllLanes, all_largest, distance));
    }
    float all = largest > kMinusInfinity ? sum * __expf(largest - all_largest) : 0.0f;
    for (int distance = 1; distance < kWarp; distance *= 2) all += __shfl_xor_sync(kAllLanes, all, distance);
    return all > 0.0f ? all_largest + logf(all) : kMinusInfinity;
  }
};

// What a lane's key brings along.
struct LaneKey {
  int64_t position, id;
  float log_proposal;

  __device__ __forceinline__ LaneKey(const WalkParams& walk, int64_t position_)
      : position(position_), id(0), log_proposal(0) {
    if (position >= walk.num_keys) return;
    if (walk.query_ids) id = walk.key_ids[position];
    if (walk.log_proposal) log_proposal = walk.log_proposal[position];
  }
};

struct SweepRow {
  ChainDraws draws;
  int64_t query_id;
  float temperature;
  WarpWalk chain;
  LogSumExp lse;

  __device__ __forceinline__ SweepRow(const TimedWalk& walk, int64_t row)
      : draws(walk, row),
        query_id(walk.query_ids ? walk.query_ids[row] : 0),
        temperature(walk.row_temperature(row)),
        chain(walk, row, walk.first_proposal) {}

  // Walks 32 keys, one a lane. Lane i of the warp has the draws of the tile's i-th block of proposals.
  __device__ __forceinline__ void batch(const TimedWalk& walk, const LaneKey& key, float product,
                                        const PhiloxBlock<uint32_t>& drawn, int64_t first_block) {
    const int64_t proposal = walk.first_proposal + key.position;
    const uint32_t word =
        shuffle_word(drawn, static_cast<int>(proposal / 4 - first_block), static_cast<int>(proposal % 4));
    // Taken out of the loop, the division would wait for the temperature before the keys are asked for.
    const float similarity = __fmul_rn(product, 1.0f / recomputed(temperature));
    const float score = walk.log_proposal ? __fsub_rn(similarity, key.log_proposal) : similarity;
    const bool proposable = key.position < walk.num_keys && !(walk.query_ids && key.id == query_id);
    chain.batch(walk, proposed(score, exponential(word), static_cast<int32_t>(key.position), proposable));
    if (walk.step_output.lse && proposable && fabsf(similarity) < __builtin_inff()) lse.add(similarity);
  }

  __device__ __forceinline__ void end(const TimedWalk& walk) const {
    chain.end(walk);
    if (!walk.step_output.lse) return;
    const float total = lse.total();
    if (lane_id() == 0) walk.step_output.lse[chain.row()] = total;
  }
};

// The rows of a warp; those past the last row are copies of it, and nothing of them is kept.
template <int kRows>
struct WarpRows {
  SweepRow at[kRows];
  int count;

  template <int... kIndex>
  __device__ __forceinline__ WarpRows(const TimedWalk& walk, int64_t first, std::integer_sequence<int, kIndex...>)
      : at{SweepRow(walk, first + kIndex < walk.num_rows ? first + kIndex : walk.num_rows - 1)...},
        count(static_cast<int>(walk.num_rows - first < kRows ? walk.num_rows - first : kRows)) {}

  __device__ __forceinline__ void end(const TimedWalk& walk) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r < count) {
        at[r].end(walk);
        refuse_bad_row(walk, at[r].chain.row());
      }
    }
  }
};

// Products of the warp's rows with the lane's keys of a tile, which all warps of the block stage chunk by chunk.
template <class Element, int kRows>
__device__ __forceinline__ void tile_products(const TimedWalk& walk, bool is_aligned, int64_t tile,
                                              Staged<kRows>& staged, float (&products)[kHalves][kRows]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, dim = static_cast<int>(walk.operands.dim);
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * (kWarps * kRows);
  for (int at = 0; at < dim; at += kChunk) {
    if (tile > 0 || at > 0) __syncthreads();  // until no warp reads what was staged before
    if (is_aligned) {
      stage<Element, true>(walk, block_row, tile, at, staged);
    } else {
      stage<Element, false>(walk, block_row, tile, at, staged);
    }
    __syncthreads();
    const int quads = dim - at < kChunk ? (dim - at + 3) / 4 : kQuads;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (tile + half * kWarp < walk.num_keys) {
        add_products<kRows>(staged.keys[half * kWarp + lane_id()], staged.queries + warp * kRows, quads,
                            products[half]);
      }
    }
  }
}

template <class Element, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sweep_kernel(const __grid_constant__ TimedWalk walk, bool is_aligned) {
  __shared__ Staged<kRows> staged;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t warp_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  WarpRows<kRows> rows(walk, warp_row, std::make_integer_sequence<int, kRows>());
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows.count) rows.at[r].chain.begin(walk);
  }
  for (int64_t tile = 0; tile < walk.num_keys; tile += kTile) {
    const LaneKey keys[kHalves] = {LaneKey(walk, tile + lane_id()), LaneKey(walk, tile + kWarp + lane_id())};
    float products[kHalves][kRows] = {};
    tile_products<Element>(walk, is_aligned, tile, staged, products);
    const int64_t first_block = (walk.first_proposal + tile) / 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows.count) break;
      rows.at[r].draws.forget_round_keys();
      const auto drawn = rows.at[r].draws.block(kAcceptanceStream, first_block + lane_id());
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (tile + half * kWarp < walk.num_keys)
          rows.at[r].batch(walk, keys[half], products[half][r], drawn, first_block);
      }
    }
  }
  rows.end(walk);
}

template <class Element>
const char* launch_typed(const Walk& walk, LaunchTarget target) {
  const TimedWalk timed{walk, sample_clock(walk, walk.first_proposal, kWarp)};
  const bool is_aligned = rows_are_packs<Element>(walk.operands);
  const int rows = walk.num_rows > kManyRows ? 2 : 1;
  const auto kernel = rows == 2 ? sweep_kernel<Element, 2> : sweep_kernel<Element, 1>;
  const int64_t blocks = (walk.num_rows + kWarps * rows - 1) / (kWarps * rows);
  return launch(kernel, {blocks, kThreads}, target, timed, is_aligned);
}

}  // namespace

const char* load_sweep(int device) {
  return load({kernel_pointer(sweep_kernel<float, 1>), kernel_pointer(sweep_kernel<float, 2>),
               kernel_pointer(sweep_kernel<Bfloat16, 1>), kernel_pointer(sweep_kernel<Bfloat16, 2>),
               kernel_pointer(sweep_kernel<Float16, 1>), kernel_pointer(sweep_kernel<Float16, 2>)},
              device);
}

const char* launch_sweep(const Walk& walk, LaunchTarget target) {
  if (const char* error = why_unsupported(walk.operands)) return error;
  return dispatch_dtype(walk.operands.dtype,
                        [&](auto element) { return launch_typed<decltype(element)>(walk, target); });
}

}  // namespace emc2
