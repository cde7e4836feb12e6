#include "launch.cuh"
#include "warp_draws.cuh"

namespace emc2 {
namespace {

constexpr int kThreads = 128;

// The view coins of items, whose numbers are the streams' chain ids: the top bit of word 0 of block 0.
__global__ void __launch_bounds__(kThreads) view_coin_kernel(StreamParams items, int64_t count, int64_t* views) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const auto counter = philox_counter(items.chain(i), kViewCoinStream, items.step_value(), 0);
  views[i] = philox_rounds(counter, philox_key(items.seed_value())).c0 >> 31;
}

}  // namespace

const char* load_view_coins(int device) { return load({kernel_pointer(view_coin_kernel)}, device); }

const char* launch_view_coins(const StreamParams& items, int64_t count, int64_t* views, LaunchTarget target) {
  return launch(view_coin_kernel, {(count + kThreads - 1) / kThreads, kThreads}, target, items, count, views);
}

}  // namespace emc2
