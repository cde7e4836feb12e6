// The walk of a tile of scores in registers: of two rows and two of the tile's eight segments a thread, sixteen steps of
// each. A segment is a run of consecutive keys that is walked from the identity, tile after tile; the operator makes
// that right whatever comes before it (../transition.h), and sweep_epilogue.cuh composes the segments in order.
//
// Roofline. A step is 16 instructions of a thread: ten of its own (the scale, the draw's logarithm in four, a sum, a
// comparison, a maximum, two moves) and six of the generator, whose first two rounds are made once a row and once a
// column. An SM of compute capability 9.0 issues four warps a cycle and has half as many lanes for comparisons, logic
// and moves; so the schedulers bind, at 16 cycles for a warp's 32 steps.
#pragma once

#include "warp_walk.cuh"

namespace emc2 {

constexpr int kSegments = 8;  // of a tile, so that two neighbouring columns of a product's eight are a thread's
constexpr int kSteps = 16;    // of a segment in a tile
constexpr int kTileKeys = kSegments * kSteps;
constexpr int kThreadRows = 2, kThreadSegments = 2;
constexpr int kThreadScores = kThreadRows * kThreadSegments * kSteps;

// A thread's scores in the order that products of a warpgroup leave: neighbouring columns are neighbouring segments.
__device__ __forceinline__ constexpr int score_index(int step, int row, int segment) {
  return 4 * step + 2 * row + segment;
}

// ---- Draws. A row and a block of proposals meet in the third round only.

struct RowDraws {
  uint32_t c0, c2, c3;

  __device__ __forceinline__ RowDraws(PhiloxKey key, uint64_t chain) {
    const uint32_t tag = counter_tag(chain, kAcceptanceStream);
    const auto first = multiply_wide(kPhiloxMultiplier1, tag);
    const auto second = multiply_wide(kPhiloxMultiplier0, first.high ^ static_cast<uint32_t>(chain) ^ key.k0);
    const PhiloxKey next = round_key(key, 1);
    c0 = first.low ^ next.k0;
    c2 = second.high ^ next.k1;
    c3 = second.low;
  }
};

struct BlockDraws {
  uint32_t c0, c1, c2;

  __device__ __forceinline__ BlockDraws(PhiloxKey key, uint32_t step, uint32_t block) {
    const auto first = multiply_wide(kPhiloxMultiplier0, block);
    const auto second = multiply_wide(kPhiloxMultiplier1, first.high ^ step ^ key.k1);
    c0 = second.high;
    c1 = second.low;
    c2 = first.low;
  }
};

__device__ __forceinline__ PhiloxBlock<uint32_t> meet(const RowDraws& row, const BlockDraws& block, PhiloxKey key) {
  return philox_rounds(PhiloxBlock<uint32_t>{block.c0 ^ row.c0, block.c1, row.c2 ^ block.c2, row.c3}, key, 2);
}

// score + E, as warp_draws.cuh makes it but for one rounding. An E that the approximate logarithm leaves below 0 is
// clamped by a product that saturates, on a pipe with room: E / 32 ln 2 is at most 3/4, and the factor a power of two.
__device__ __forceinline__ float threshold_of(float score, uint32_t word) {
  const float u = __uint_as_float((word >> 9) + 0x3f800000u) - (1.0f - 0x1p-24f);
  float scaled;
#if defined(__CUDA_ARCH__)
  asm("{\n.reg .f32 log2_u;\n"
      "lg2.approx.ftz.f32 log2_u, %1;\n"
      "mul.sat.f32 %0, log2_u, 0fBD000000;\n}"  // -1/32
      : "=f"(scaled)
      : "f"(u));
#else
  scaled = fmaxf(std::log2(u) * -0.03125f, 0.0f);
#endif
  return fmaf(scaled, 32.0f * 0.6931471805599453f, score);
}

// ---- Steps.

struct SegmentWalk {
  float threshold = kMinusInfinity, score = kMinusInfinity;
  int32_t number = -1;  // of the step in the segment
  int32_t recent = -1;  // of the step in the tile: a constant for each, as `number` would not be

  // The compiler would choose by instructions of the pipe that has the comparison and the maximum to do. So that adding
  // nothing (-0, which leaves every number as it is) is a sum of the pipe with room.
  __device__ __forceinline__ void step(float threshold_, float score_, int32_t number_) {
#if defined(__CUDA_ARCH__)
    asm("{\n.reg .pred moves;\n"
        "setp.lt.f32 moves, %1, %3;\n"
        "max.f32 %0, %0, %3;\n"
        "@moves add.f32 %1, %4, 0f80000000;\n"
        "@moves mov.b32 %2, %5;\n}"
        : "+f"(threshold), "+f"(score), "+r"(recent)
        : "f"(threshold_), "f"(score_), "r"(number_));
#else
    const bool moves = score < threshold_;
    threshold = fmaxf(threshold, threshold_);
    score = moves ? score_ : score;
    recent = moves ? number_ : recent;
#endif
  }

  __device__ __forceinline__ int32_t number_at(int32_t tile) const {
    return recent >= 0 ? tile * kSteps + recent : number;
  }

  __device__ __forceinline__ void end_tile(int32_t tile) {
    number = number_at(tile);
    recent = -1;
  }
};

// A thread's four.
struct ThreadWalks {
  SegmentWalk of[kThreadRows][kThreadSegments];

  __device__ __forceinline__ bool has_infinite() const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int s = 0; s < kThreadSegments; ++s) found |= of[i][s].threshold == __builtin_inff();
    }
    return found;
  }

  __device__ __forceinline__ void end_tile(int32_t tile) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int s = 0; s < kThreadSegments; ++s) of[i][s].end_tile(tile);
    }
  }
};

// The thread's rows, the same from tile to tile.
struct ThreadRows {
  PhiloxKey key;
  uint32_t step;
  RowDraws draws[kThreadRows];
  float scale[kThreadRows];
  int64_t row[kThreadRows];

  // Rows past the last one are copies of it, and nothing of them is kept.
  __device__ __forceinline__ static int64_t existing(const Walk& walk, int64_t row) {
    return row < walk.num_rows ? row : walk.num_rows - 1;
  }

  __device__ __forceinline__ ThreadRows(const Walk& walk, int64_t first, int64_t second)
      : key(philox_key(walk.seed_value())),
        step(walk.step_value()),
        draws{{key, walk.chain(existing(walk, first))}, {key, walk.chain(existing(walk, second))}},
        scale{1.0f / walk.row_temperature(existing(walk, first)), 1.0f / walk.row_temperature(existing(walk, second))},
        row{first, second} {}
};

// ---- Samples. A tile that holds a sample point records what its segments leave there.

struct SampleTicks {
  int64_t proposal, sample, remainder;

  // `proposal`: of the whole walk, the tile's first one of a segment.
  __device__ __forceinline__ SampleTicks(const Schedule& schedule, int64_t proposal_) : proposal(proposal_) {
    const int64_t kept = schedule.total_proposals - schedule.burn_in;
    sample = schedule.count_samples(proposal);
    const int64_t after_burn_in = proposal > schedule.burn_in ? proposal - schedule.burn_in : 0;
    remainder = after_burn_in * schedule.num_samples - sample * kept;
  }

  // The sample that is taken after the next proposal, or -1.
  __device__ __forceinline__ int64_t tick(const Schedule& schedule) {
    const int64_t kept = schedule.total_proposals - schedule.burn_in;
    if (proposal++ < schedule.burn_in) return -1;
    remainder += schedule.num_samples;
    if (remainder < kept) return -1;
    remainder -= kept;
    return sample++;
  }
};

// The first tile from `tile` on in which any of eight segments has a sample point; `tiles` where none has. `first`:
// proposal of the whole walk at which the first of them starts. The same in all lanes.
__device__ __forceinline__ int32_t next_sampled_tile(const Schedule& schedule, int64_t first, int32_t tile,
                                                     int32_t tiles) {
  const int64_t begin = first + lane_id() % kSegments * static_cast<int64_t>(tiles) * kSteps;
  const int64_t sample = schedule.count_samples(begin + static_cast<int64_t>(tile) * kSteps);
  const int64_t point = sample < schedule.num_samples ? schedule.sample_point(sample) : INT64_MAX;
  const int64_t found = (point - begin) / kSteps;
  int32_t next = found < tiles ? static_cast<int32_t>(found) : tiles;
  for (int distance = 1; distance < kSegments; distance *= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, next, distance);
    next = other < next ? other : next;
  }
  return next;
}

// ---- Keys that a row may not propose.

// Which ids a warp's sixteen rows have, approximately: a set of 1,024 bits, a word a lane. Of a tile's 128 keys two are
// taken for members that are none, and looked at more closely.
class IdFilter {
 public:
  // Lane l has rows l / 4 and l / 4 + 8.
  __device__ __forceinline__ IdFilter(const int64_t (&ids)[kThreadRows]) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      for (int source = 0; source < kWarp; source += 4) {
        const uint32_t place = hash(__shfl_sync(kAllLanes, ids[i], source));
        if (static_cast<int>(place / 32) == lane_id()) word_ |= 1u << place % 32;
      }
    }
  }

  // Whether one of the lanes' ids is one of the warp's rows'. The same in all lanes.
  __device__ __forceinline__ bool any_member(int64_t id, const int64_t (&ids)[kThreadRows]) const {
    const uint32_t place = hash(id);
    const uint32_t word = __shfl_sync(kAllLanes, word_, static_cast<int>(place / 32));
    unsigned perhaps = __ballot_sync(kAllLanes, word >> place % 32 & 1);
    bool found = false;
    while (perhaps != 0) {
      const int64_t candidate = __shfl_sync(kAllLanes, id, __ffs(static_cast<int>(perhaps)) - 1);
      found |= candidate == ids[0] || candidate == ids[1];
      perhaps &= perhaps - 1;
    }
    return __any_sync(kAllLanes, found);
  }

 private:
  __device__ __forceinline__ static uint32_t hash(int64_t id) {
    const uint64_t bits = static_cast<uint64_t>(id);
    return (static_cast<uint32_t>(bits) + static_cast<uint32_t>(bits >> 32) * 0x85EBCA6Bu) * 0x9E3779B1u >> 22;
  }

  uint32_t word_ = 0;
};

// Takes the keys with the rows' ids out. `key_ids`: of the thread's two segments, from the tile's first step on.
__device__ __forceinline__ void exclude_ids(float (&scores)[kThreadScores], const int64_t* const (&key_ids)[kThreadSegments],
                                            const int64_t (&ids)[kThreadRows]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int segment = 0; segment < kThreadSegments; ++segment) {
      const int64_t id = __ldg(key_ids[segment] + step);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        float& score = scores[score_index(step, i, segment)];
        score = id == ids[i] ? kMinusInfinity : score;
      }
    }
  }
}

// Takes scores that are not finite out.
__device__ __forceinline__ void exclude_infinite(float (&scores)[kThreadScores]) {
#pragma unroll
  for (float& score : scores) score = fabsf(score) < __builtin_inff() ? score : kMinusInfinity;
}

}  // namespace emc2
