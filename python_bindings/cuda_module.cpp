// The CUDA kernels as Python sees them: addresses, sizes and a stream in, nothing computed here. An address of 0 is a
// null pointer. emc2_kernels/backends/cuda/mh.py is the only caller; torch's allocator keeps memory that a stream still
// uses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../csrc/cuda/launch.h"

namespace py = pybind11;

namespace {

template <class Element>
Element* at(uintptr_t address) {
  return reinterpret_cast<Element*>(address);
}

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("emc2_kernels: launching a CUDA kernel failed: ") + error);
}

void load(int device) {
  for (const auto load_some : {emc2::load_gathered, emc2::load_sweep, emc2::load_view_coins}) check(load_some(device));
}

void walk(
    // where; gathered: each row has proposals of its own
    bool gathered, int device, uintptr_t stream,
    // the operands
    uintptr_t queries, uintptr_t key_rows, int64_t query_stride, int64_t key_stride, int64_t dim, int dtype,
    uintptr_t positions, int64_t position_stride,
    // the walk
    int64_t rows, int64_t keys, int64_t total, int64_t first, int64_t count, int64_t burn_in, int64_t samples,
    uint64_t seed, uintptr_t seed_address, uint64_t step, uintptr_t step_address, float temperature,
    uintptr_t temperatures, int64_t temperature_stride, uintptr_t chain_ids, uintptr_t query_ids, uintptr_t key_ids,
    uintptr_t log_proposal,
    // of a step: incoming states and what it writes; all 0 for a transition
    uintptr_t state_key, uintptr_t state_score, uintptr_t labels, uintptr_t step_samples, uintptr_t step_key,
    uintptr_t step_score, uintptr_t step_threshold, uintptr_t accepted, uintptr_t lse,
    // of a transition; all 0 for a step
    uintptr_t threshold, uintptr_t score, uintptr_t position) {
  emc2::DeviceWalk walk = {};
  walk.walk.rows = rows;
  walk.walk.keys = keys;
  walk.walk.schedule = {total, first, count, burn_in, samples};
  walk.walk.temperature = temperature;
  walk.walk.temperatures = at<const float>(temperatures);
  walk.walk.chain_ids = at<const int64_t>(chain_ids);
  walk.walk.query_ids = at<const int64_t>(query_ids);
  walk.walk.key_ids = at<const int64_t>(key_ids);
  walk.walk.log_proposal = at<const float>(log_proposal);
  walk.seed = {seed, at<const int64_t>(seed_address)};
  walk.step = {step, at<const int64_t>(step_address)};
  walk.temperature_stride = temperature_stride;
  walk.states = {at<const int64_t>(state_key), at<const float>(state_score)};
  walk.step_output = {at<int32_t>(step_samples), at<int64_t>(step_key), at<float>(step_score),
                      at<float>(step_threshold), at<int32_t>(accepted), at<float>(lse),
                      at<const int64_t>(labels)};
  walk.transition = {at<float>(threshold), at<float>(score), at<int64_t>(position)};
  walk.operands = {at<const void>(queries),        at<const void>(key_rows), query_stride, key_stride, dim,
                   static_cast<emc2::Dtype>(dtype)};
  walk.positions = at<const int64_t>(positions);
  walk.position_stride = position_stride;
  const emc2::DeviceQueue queue{device, at<void>(stream)};
  check(gathered ? emc2::launch_gathered(walk, queue) : emc2::launch_sweep(walk, queue));
}

void view_coins(int device, uintptr_t stream, uintptr_t items, int64_t count, uint64_t seed, uintptr_t seed_address,
                uint64_t step, uintptr_t step_address, uintptr_t views) {
  check(emc2::launch_view_coins(at<const int64_t>(items), count, {seed, at<const int64_t>(seed_address)},
                                {step, at<const int64_t>(step_address)}, at<int64_t>(views),
                                {device, at<void>(stream)}));
}

}  // namespace

PYBIND11_MODULE(emc2_cuda, module) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;  // a launch waits where the stream's queue is full
  module.def("load", &load, ReleaseGil());
  module.def("walk", &walk, ReleaseGil());
  module.def("view_coins", &view_coins, ReleaseGil());
}
