// The CUDA kernels as plain C++ sees them: what a walk is told, and one call that puts it on a stream.
//
// Nothing here waits for the device. Pointers are to its memory unless they are named otherwise.
#pragma once

#include <cstdint>

#include "../operands.h"
#include "../mh_params.h"

namespace emc2 {

// A number that the host knows, or that lies in device memory (so that a replayed graph reads another one each time).
struct DeviceNumber {
  uint64_t value;
  const int64_t* address;  // null: `value`
};

// The schedule in numbers that a warp advances batch by batch, so that it need not divide. With progress(p) = (p -
// burn_in) * samples, sample floor(progress(p) / kept) is the next one at proposal p, and it is due after p if
// remainder + samples >= kept. All zeros in a walk of no proposals.
struct SampleClock {
  int64_t kept;                        // proposals after burn-in
  int64_t end;                         // one past the shard's last proposal; 0 where it has none
  int64_t before_shard, by_end;        // samples taken before the shard's first proposal, and by its last one
  int64_t first, first_remainder;      // floor(progress / kept) and what is left over, at the first batch's lane 0
  int64_t advance, advance_remainder;  // of both, from batch to batch
};

// One walk and where its results go; each kernel's argument.
struct DeviceWalk {
  Walk walk;  // its seed and step are not looked at: these are
  DeviceNumber seed, step;
  int64_t temperature_stride;  // of walk.temperatures; 0: one for all rows
  States states;
  StepOutput step_output;       // null pointers where prefixes are wanted
  TransitionOutput transition;  // null pointers where states are given
  Operands operands;
  const int64_t* positions;  // (rows, schedule.count) with unit last stride; null: drawn, or a sweep
  int64_t position_stride;
  SampleClock clock;  // filled in by the launch
};

struct DeviceQueue {
  int device;
  void* stream;  // a cudaStream_t
};

// Each returns null, or what went wrong. Loading makes a device ready for every later launch, also inside a graph's
// capture. A launch returns before its kernel has run.
const char* load_gathered(int device);
const char* load_sweep(int device);
const char* load_view_coins(int device);
const char* launch_gathered(const DeviceWalk& walk, DeviceQueue queue);
const char* launch_sweep(const DeviceWalk& walk, DeviceQueue queue);
const char* launch_view_coins(const int64_t* items, int64_t count, DeviceNumber seed, DeviceNumber step, int64_t* views,
                              DeviceQueue queue);

}  // namespace emc2
