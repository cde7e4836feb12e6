// The generator and the transition operator inside kernels. Compiled only (tests/test_native.py): no GPU is needed.
#include "mh_params.h"
#include "philox.h"
#include "transition.h"

using Step = emc2::Transition<float, int64_t>;

// One thread a chain: the four words of each block of its acceptance stream.
__global__ void acceptance_words(emc2::Walk walk, const int64_t* chain_ids, uint32_t blocks, uint32_t* words) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= walk.rows) return;
  const emc2::PhiloxKey key = emc2::philox_key(walk.seed);
  for (uint32_t block = 0; block < blocks; ++block) {
    const auto counter = emc2::philox_counter(chain_ids[row], emc2::kAcceptanceStream, walk.step, block);
    const auto drawn = emc2::philox_rounds(counter, key);
    uint32_t* to = words + 4 * (row * blocks + block);
    to[0] = drawn.c0, to[1] = drawn.c1, to[2] = drawn.c2, to[3] = drawn.c3;
  }
}

// One thread a chain: a whole walk over uniform draws from given scores.
__global__ void walk_of_uniform_draws(emc2::Walk walk, const float* scores, Step* whole) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= walk.rows) return;
  const emc2::PhiloxKey key = emc2::philox_key(walk.seed);
  Step prefix{-INFINITY, -INFINITY, -1};
  const auto drawn = [&](emc2::Stream stream, int64_t block) {
    return emc2::philox_rounds(emc2::philox_counter(row, stream, walk.step, static_cast<uint32_t>(block)), key);
  };
  for (int64_t p = 0; p < walk.schedule.count; ++p) {
    const auto at = drawn(emc2::kPositionStream, p / 2);
    const auto position =
        p % 2 ? emc2::scale_to_range(at.c2, at.c3, walk.keys) : emc2::scale_to_range(at.c0, at.c1, walk.keys);
    const auto u = drawn(emc2::kAcceptanceStream, p / 4);
    const uint32_t word = p % 4 == 0 ? u.c0 : p % 4 == 1 ? u.c1 : p % 4 == 2 ? u.c2 : u.c3;
    const float e = 24 * 0.6931471805599453f - logf(static_cast<float>(emc2::acceptance_numerator(word)));
    const float score = scores[row * walk.keys + static_cast<int64_t>(position)];
    prefix = emc2::compose(prefix, Step{score + fmaxf(e, 0.0f), score, static_cast<int64_t>(position)});
  }
  whole[row] = prefix;
}

// A warp composes the transitions of its lanes, neighbours first: the order is kept, since the operator does not
// commute.
__global__ void compose_warps(const Step* steps, Step* of_warps) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  Step mine = steps[at];
  for (int distance = 1; distance < 32; distance *= 2) {
    const Step then{__shfl_down_sync(~0u, mine.threshold, distance), __shfl_down_sync(~0u, mine.score, distance),
                    __shfl_down_sync(~0u, mine.position, distance)};
    mine = emc2::compose(mine, then);
  }
  if (threadIdx.x % 32 == 0) of_warps[at / 32] = mine;
}
