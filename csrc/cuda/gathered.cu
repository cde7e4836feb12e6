// Walks over gathered keys: a warp walks one chain, whose proposals are drawn here or given as positions.
//
// The keys of a large bank come from DRAM, and that should be all that is waited for. At d = 128 in bfloat16 a proposal
// is 256 bytes, one load instruction fetches two of them, and a warp issues 8 such loads before it needs the first: 4
// KB, or 80 KB with 20 warps on a multiprocessor, where its share of an H100's bandwidth times 1 us is 25 KB. Against
// that stand 29 issued instructions a proposal in sm_90 code; at 3 TB/s the four schedulers have some 75 slots for
// them.
#include <cassert>

#include "launch.cuh"
#include "vector_loads.cuh"
#include "warp_walk.cuh"

namespace emc2 {
namespace {

constexpr int kWarpsPerBlock = 4;       // few, so that a block does not wait long for its last chain
constexpr int kBlocksPerProcessor = 5;  // holds the compiler to 96 registers; with 80 the loads in flight would spill
constexpr int kGroup = 8;               // the fewest lanes that share a key

// Keys that a warp's loads are issued for before the first is used. Element by element, each takes eight times the
// loads.
template <bool kAligned>
constexpr int kInFlight = kAligned ? 8 : 2;

// What a failing assert() calls on a device, with a text that names the argument. At the end of a walk, because before
// that a call would have its registers spilled.
__device__ __forceinline__ void refuse_positions() {
#if !defined(EMC2_NO_DEVICE_ASSERTIONS)
  __assert_fail("emc2_kernels: proposal must hold positions in [0, number of keys), got one outside", "gathered.cu",
                __LINE__, "gathered_kernel");
#endif
}

// The proposals of a batch that starts at a multiple of 32: one call of the generator serves them all. Lanes 0 .. 15
// hold the blocks of the positions, lanes 16 .. 23 those of the acceptance draws.
class BatchDraws {
 public:
  __device__ __forceinline__ BatchDraws(const ChainDraws& draws, int64_t first) : lane_(recomputed(lane_id())) {
    const bool is_position = lane_ < 16;  // one call with either counter: a branch would make both, one after the other
    const auto drawn = draws.block(is_position ? kPositionStream : kAcceptanceStream,
                                   (first >> (is_position ? 1 : 2)) + (is_position ? lane_ : lane_ - 16));
    // Or the compiler calls the generator twice, where the positions are needed and where the acceptance draws are.
    block_ = {recomputed(drawn.c0), recomputed(drawn.c1), recomputed(drawn.c2), recomputed(drawn.c3)};
  }

  __device__ __forceinline__ uint32_t acceptance() const { return shuffle_word(block_, 16 + lane_ / 4, lane_ % 4); }

  __device__ __forceinline__ int64_t position(int64_t keys) const {
    const int source = lane_ / 2, word = lane_ % 2 * 2;
    const uint32_t low = shuffle_word(block_, source, word), high = shuffle_word(block_, source, word + 1);
    return static_cast<int64_t>(scale_to_range(low, high, static_cast<uint64_t>(keys)));
  }

 private:
  int lane_;
  PhiloxBlock<uint32_t> block_;
};

// Sums over the lanes of a group of `width`, for kCount keys at once: lane i of the group gets the sum of key i %
// kCount. Each round sends half of what is left, so that for 8 keys 7 shuffles do the work of 24; wider groups add up
// the rest.
template <int kCount>
__device__ __forceinline__ float transposed_sum(float (&sums)[kCount], int width) {
#pragma unroll
  for (int half = kCount / 2; half >= 1; half /= 2) {
    const bool upper = lane_id() & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? sums[i] : sums[i + half];
      const float kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
  }
  float sum = sums[0];
  for (int distance = kCount; distance < width; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// The products of one row with 32 keys. `width` lanes share a key, as many as it takes to cover it with one pack each:
// a power of two, 8 to 32. Group g fetches the keys that its own lanes propose, so a lane's product ends where it is
// needed.
template <class Element, bool kAligned>
class RowProducts {
 public:
  __device__ __forceinline__ RowProducts(const Operands& operands, int64_t row, int width)
      : query_(static_cast<const Element*>(operands.queries) + row * operands.query_stride),
        at_((lane_id() & (width - 1)) * kPackElements<Element>),
        width_(width),
        pack_(load_pack<kAligned>(query_, at_, static_cast<int>(operands.dim))) {}

  // `position` is the lane's own key. The order of additions depends on neither the lane nor the batch.
  __device__ __forceinline__ float product(const Operands& operands, uint32_t position) {
    float product = 0.0f;
    for (int first = 0; first < width_; first += kCount) {
      float sums[kCount] = {};
      add_products(operands, position, first, sums);
      const float sum = transposed_sum(sums, width_);
      if ((lane_id() & (width_ - kCount)) == first) product = sum;
    }
    return product;
  }

 private:
  static constexpr int kCount = kInFlight<kAligned>;

  __device__ __forceinline__ void add_products(const Operands& operands, uint32_t position, int first,
                                               float (&sums)[kCount]) {
    const Element* keys = static_cast<const Element*>(operands.keys);
    const int chunk = width_ * kPackElements<Element>, dim = static_cast<int>(operands.dim);
    for (int begin = 0; begin < dim; begin += chunk) {
      uint4 packs[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t key = __shfl_sync(kAllLanes, position, first + i, width_);
        packs[i] = load_pack<kAligned>(keys + key * operands.key_stride, begin + at_, dim);
      }
      if (dim > chunk) pack_ = load_pack<kAligned>(query_, begin + at_, dim);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] = add_product<Element>(sums[i], pack_, packs[i]);
    }
  }

  const Element* query_;
  int at_;  // of the lane's element in a chunk
  int width_;
  uint4 pack_;  // the lane's part of the query: all of it where a chunk covers a row
};

template <class Element, bool kAligned>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp, kBlocksPerProcessor)
    gathered_kernel(const __grid_constant__ TimedWalk walk, int width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= walk.num_rows) return;  // whole warps, and there is no barrier below
  const int64_t begin = walk.first_proposal;
  ChainDraws draws(walk, row);
  RowProducts<Element, kAligned> products(walk.operands, row, width);
  const float inverse_temperature = 1.0f / walk.row_temperature(row);
  const int64_t query_id = walk.query_ids ? walk.query_ids[row] : 0;
  WarpWalk chain(walk, row, 0);
  chain.begin(walk);
  bool is_outside = false;  // a given position, of the keys
  for (int64_t first = begin / kWarp * kWarp; first < walk.clock.end; first += kWarp) {
    const int64_t proposal = first + lane_id();
    const bool is_in_shard = proposal >= begin && proposal < walk.clock.end;
    draws.forget_round_keys();
    const BatchDraws drawn(draws, first);
    int64_t position = 0;
    if (!walk.positions) {
      position = drawn.position(walk.num_keys);
    } else if (is_in_shard) {
      position = walk.positions[row * walk.position_stride + (proposal - begin)];
      if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(walk.num_keys)) {
        is_outside = true;
        position = 0;
      }
    }
    const float product = products.product(walk.operands, static_cast<uint32_t>(position));
    float score = __fmul_rn(product, inverse_temperature);
    if (walk.log_proposal) score = __fsub_rn(score, walk.log_proposal[position]);
    const bool proposable = is_in_shard && !(walk.query_ids && walk.key_ids[position] == query_id);
    chain.batch(walk, proposed(score, exponential(drawn.acceptance()), static_cast<int32_t>(position), proposable));
  }
  chain.end(walk);
  if (is_outside) refuse_positions();
  refuse_bad_row(walk, row);
}

template <class Element>
const char* launch_typed(const Walk& walk, LaunchTarget target) {
  int width = kGroup;
  while (width < kWarp && width * kPackElements<Element> < walk.operands.dim) width *= 2;
  const TimedWalk timed{walk, sample_clock(walk, walk.first_proposal / kWarp * kWarp, kWarp)};
  const int64_t blocks = (walk.num_rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const auto kernel =
      rows_are_packs<Element>(walk.operands) ? gathered_kernel<Element, true> : gathered_kernel<Element, false>;
  return launch(kernel, {blocks, kWarpsPerBlock * kWarp}, target, timed, width);
}

}  // namespace

const char* load_gathered(int device) {
  return load({kernel_pointer(gathered_kernel<float, true>), kernel_pointer(gathered_kernel<float, false>),
               kernel_pointer(gathered_kernel<Bfloat16, true>), kernel_pointer(gathered_kernel<Bfloat16, false>),
               kernel_pointer(gathered_kernel<Float16, true>), kernel_pointer(gathered_kernel<Float16, false>)},
              device);
}

const char* launch_gathered(const Walk& walk, LaunchTarget target) {
  if (const char* error = why_unsupported(walk.operands)) return error;
  if (walk.num_keys == 0 && walk.num_proposals > 0) return "proposal must hold no positions where there are no keys";
  return dispatch_dtype(walk.operands.dtype,
                        [&](auto element) { return launch_typed<decltype(element)>(walk, target); });
}

}  // namespace emc2
