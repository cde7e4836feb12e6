// The CPU core as Python sees it: structs of addresses and sizes in, nothing computed here. emc2_kernels/backends/cpu
// is the only caller; it keeps the tensors behind the addresses alive.
#include <pybind11/pybind11.h>

#include "../csrc/cpu/gathered.h"
#include "../csrc/cpu/gumbel.h"
#include "../csrc/cpu/philox_arrays.h"
#include "../csrc/cpu/simd.h"
#include "../csrc/cpu/sweep.h"
#include "param_classes.h"

namespace py = pybind11;

namespace {

template <class Element>
Element* at(uintptr_t address) {
  return reinterpret_cast<Element*>(address);
}

emc2::Tile tile(uintptr_t dots, int64_t stride, int64_t row_begin, int64_t row_end, int64_t key_begin,
                int64_t key_end) {
  return {at<const float>(dots), stride, row_begin, row_end, key_begin, key_end};
}

emc2::Sweep* make_sweep(const emc2::WalkParams& walk, const emc2::StepInput& input, const emc2::StepOutput& step_output,
                        const emc2::TransitionOutput& transition_output) {
  return new emc2::Sweep({walk, {}, input, step_output, transition_output});
}

void walk_small_sweep(const emc2::WalkParams& walk, const emc2::Operands& operands, const emc2::StepInput& input,
                      const emc2::StepOutput& step_output, const emc2::TransitionOutput& transition_output) {
  emc2::Sweep({walk, operands, input, step_output, transition_output}).walk_small();
}

void walk_gathered(const emc2::WalkParams& walk, const emc2::Operands& operands, const emc2::StepInput& input,
                   const emc2::StepOutput& step_output, const emc2::TransitionOutput& transition_output) {
  emc2::walk_gathered({walk, operands, input, step_output, transition_output});
}

void walk_tile(emc2::Sweep& sweep, uintptr_t dots, int64_t stride, int64_t row_begin, int64_t row_end,
               int64_t key_begin, int64_t key_end) {
  sweep.walk(tile(dots, stride, row_begin, row_end, key_begin, key_end));
}

void scan_tile(emc2::GumbelSampler& sampler, uintptr_t dots, int64_t stride, int64_t row_begin, int64_t row_end,
               int64_t key_begin, int64_t key_end) {
  sampler.scan(tile(dots, stride, row_begin, row_end, key_begin, key_end));
}

void view_coins(const emc2::StreamParams& streams, int64_t count, uintptr_t views) {
  emc2::view_coins(streams, count, at<int64_t>(views));
}

void philox_words(uintptr_t counters, int64_t count, uint64_t seed, uintptr_t words) {
  emc2::philox_words(at<const uint32_t>(counters), count, seed, at<uint32_t>(words));
}

}  // namespace

PYBIND11_MODULE(emc2_cpu, module) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  module.attr("instruction_set") = emc2::kInstructionSet;
  emc2::add_walk_params(module);
  emc2::ParamClass<emc2::GumbelParams>::add(
      module, "GumbelParams",
      {EMC2_SCORE_FIELDS(GumbelParams), EMC2_STREAM_FIELDS(GumbelParams), EMC2_FIELD(GumbelParams, num_samples),
       EMC2_FIELD(GumbelParams, positions), EMC2_FIELD(GumbelParams, num_threads)});
  py::class_<emc2::Sweep>(module, "Sweep").def(py::init(&make_sweep)).def("walk", &walk_tile, ReleaseGil());
  py::class_<emc2::GumbelSampler>(module, "GumbelSampler")
      .def(py::init<const emc2::GumbelParams&>())
      .def("scan", &scan_tile, ReleaseGil());
  module.def("walk_small_sweep", &walk_small_sweep, ReleaseGil());
  module.def("walk_gathered", &walk_gathered, ReleaseGil());
  module.def("view_coins", &view_coins, ReleaseGil());
  module.def("philox_words", &philox_words, ReleaseGil());
}
