// The CUDA kernels as Python sees them: structs of addresses and sizes, and a stream in, nothing computed here.
// emc2_kernels/backends/cuda is the only caller; torch's allocator keeps memory that a stream still uses.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../csrc/cuda/kernels.h"
#include "param_classes.h"

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
  for (const auto load_some :
       {emc2::load_gathered, emc2::load_sweep, emc2::load_matrix_sweep, emc2::load_view_coins}) {
    check(load_some(device));
  }
}

using Launch = const char* (*)(const emc2::Walk&, emc2::LaunchTarget);

template <Launch kLaunch>
void walk(int device, uintptr_t stream, const emc2::WalkParams& params, const emc2::Operands& operands,
          const emc2::StepInput& input, const emc2::StepOutput& step_output,
          const emc2::TransitionOutput& transition_output) {
  check(kLaunch({params, operands, input, step_output, transition_output}, {device, at<void>(stream)}));
}

void matrix_sweep(int device, uintptr_t stream, const emc2::WalkParams& params, const emc2::Operands& operands,
                  const emc2::StepInput& input, const emc2::StepOutput& step_output,
                  const emc2::TransitionOutput& transition_output, uintptr_t scratch, int64_t scratch_bytes) {
  check(emc2::launch_matrix_sweep({params, operands, input, step_output, transition_output}, at<void>(scratch),
                                  scratch_bytes, {device, at<void>(stream)}));
}

void view_coins(int device, uintptr_t stream, const emc2::StreamParams& streams, int64_t count, uintptr_t views) {
  check(emc2::launch_view_coins(streams, count, at<int64_t>(views), {device, at<void>(stream)}));
}

}  // namespace

PYBIND11_MODULE(emc2_cuda, module) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;  // a launch waits where the stream's queue is full
  emc2::add_walk_params(module);
  module.def("load", &load, ReleaseGil());
  module.def("walk_sweep", &walk<emc2::launch_sweep>, ReleaseGil());
  module.def("walk_gathered", &walk<emc2::launch_gathered>, ReleaseGil());
  module.def("walk_matrix_sweep", &matrix_sweep, ReleaseGil());
  module.def("matrix_sweep_scratch", &emc2::matrix_sweep_scratch);
  module.def("view_coins", &view_coins, ReleaseGil());
}
