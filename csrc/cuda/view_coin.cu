#include "draws.cuh"
#include "launch.cuh"

namespace emc2 {
namespace {

constexpr int kThreads = 128;

// The view coin of an item: the top bit of word 0 of block 0, chain = item.
__global__ void __launch_bounds__(kThreads)
    view_coin_kernel(const int64_t* items, int64_t count, DeviceNumber seed, DeviceNumber step, int64_t* views) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const auto counter =
      philox_counter(static_cast<uint64_t>(items[i]), kViewCoinStream, static_cast<uint32_t>(value_of(step)), 0);
  views[i] = philox_rounds(counter, philox_key(value_of(seed))).c0 >> 31;
}

}  // namespace

const char* load_view_coins(int device) { return load({pointer_to(view_coin_kernel)}, device); }

const char* launch_view_coins(const int64_t* items, int64_t count, DeviceNumber seed, DeviceNumber step, int64_t* views,
                              DeviceQueue queue) {
  return launch(view_coin_kernel, (count + kThreads - 1) / kThreads, kThreads, queue, items, count, seed, step, views);
}

}  // namespace emc2
