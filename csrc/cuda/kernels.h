// The CUDA kernels as plain C++ sees them: one call puts a walk on a stream.
//
// Nothing here waits for the device. Pointers are to its memory unless they are named otherwise.
#pragma once

#include <cstdint>

#include "../params.h"

namespace emc2 {

// The schedule in numbers that a warp advances batch by batch, so that it need not divide. With progress(p) = (p -
// burn_in) * num_samples, sample floor(progress(p) / kept) is the next one at proposal p, and it is due after p if
// remainder + num_samples >= kept. All zeros in a walk of no proposals.
struct SampleClock {
  int64_t kept;                        // proposals after burn-in
  int64_t end;                         // one past the shard's last proposal; 0 where it has none
  int64_t before_shard, by_end;        // samples taken before the shard's first proposal, and by its last one
  int64_t first, first_remainder;      // floor(progress / kept) and what is left over, at the first batch's lane 0
  int64_t advance, advance_remainder;  // of both, from batch to batch
};

// Each kernel's argument.
struct TimedWalk : Walk {
  SampleClock clock;
};

struct LaunchTarget {
  int device;
  void* stream;  // a cudaStream_t
};

// Each returns null, or what went wrong. Loading makes a device ready for every later launch, also inside a graph's
// capture. A launch returns before its kernel has run.
const char* load_gathered(int device);
const char* load_sweep(int device);
const char* load_view_coins(int device);
const char* load_matrix_sweep(int device);
const char* launch_gathered(const Walk& walk, LaunchTarget target);
const char* launch_sweep(const Walk& walk, LaunchTarget target);
const char* launch_view_coins(const StreamParams& items, int64_t count, int64_t* views, LaunchTarget target);

// A large sweep on the matrix units of compute capability 9.0, and how many bytes of scratch memory it needs.
const char* launch_matrix_sweep(const Walk& walk, void* scratch, int64_t scratch_bytes, LaunchTarget target);
int64_t matrix_sweep_scratch(int64_t rows, int64_t keys, int64_t samples, int device);

}  // namespace emc2
