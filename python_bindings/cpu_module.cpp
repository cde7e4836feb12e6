// The CPU core as Python sees it: structs of addresses and sizes in, nothing computed here. emc2_kernels/backends/cpu
// is the only caller; it keeps the tensors behind the addresses alive.
#include <pybind11/pybind11.h>

#include "../csrc/cpu/gathered.h"
#include "../csrc/cpu/gumbel.h"
#include "../csrc/cpu/isir.h"
#include "../csrc/cpu/lse.h"
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

void walk_sweep(const emc2::WalkParams& walk, const emc2::Operands& operands, const emc2::StepInput& input,
                const emc2::StepOutput& step_output, const emc2::TransitionOutput& transition_output) {
  emc2::walk_sweep({walk, operands, input, step_output, transition_output});
}

void walk_gathered(const emc2::WalkParams& walk, const emc2::Operands& operands, const emc2::StepInput& input,
                   const emc2::StepOutput& step_output, const emc2::TransitionOutput& transition_output) {
  emc2::walk_gathered({walk, operands, input, step_output, transition_output});
}

template <class Params, auto kRun>
auto with_operands(const Params& params, const emc2::Operands& operands) {
  Params whole = params;
  whole.operands = operands;
  return kRun(whole);
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
  emc2::ParamClass<emc2::IsirParams>::add(
      module, "IsirParams",
      {EMC2_SCORE_FIELDS(IsirParams), EMC2_STREAM_FIELDS(IsirParams), EMC2_FIELD(IsirParams, num_carried),
       EMC2_FIELD(IsirParams, carried_key), EMC2_FIELD(IsirParams, carried_score), EMC2_FIELD(IsirParams, key_labels),
       EMC2_FIELD(IsirParams, first_key), EMC2_FIELD(IsirParams, position), EMC2_FIELD(IsirParams, key),
       EMC2_FIELD(IsirParams, score), EMC2_FIELD(IsirParams, lse), EMC2_FIELD(IsirParams, value),
       EMC2_FIELD(IsirParams, num_threads)});
  emc2::ParamClass<emc2::LseParams>::add(
      module, "LseParams",
      {EMC2_SCORE_FIELDS(LseParams), EMC2_FIELD(LseParams, lse), EMC2_FIELD(LseParams, num_threads)});
  emc2::ParamClass<emc2::LseGradientParams>::add(
      module, "LseGradientParams",
      {EMC2_SCORE_FIELDS(LseGradientParams), EMC2_FIELD(LseGradientParams, grad), EMC2_FIELD(LseGradientParams, lse),
       EMC2_FIELD(LseGradientParams, symmetric), EMC2_FIELD(LseGradientParams, d_queries),
       EMC2_FIELD(LseGradientParams, d_keys), EMC2_FIELD(LseGradientParams, d_temperatures),
       EMC2_FIELD(LseGradientParams, num_threads)});
  module.def("walk_sweep", &walk_sweep, ReleaseGil());
  module.def("walk_gathered", &walk_gathered, ReleaseGil());
  module.def("sample_gumbel", &with_operands<emc2::GumbelParams, emc2::sample_gumbel>, ReleaseGil());
  module.def("isir_step", &with_operands<emc2::IsirParams, emc2::isir_step>, ReleaseGil());
  module.def("contrastive_lse", &with_operands<emc2::LseParams, emc2::contrastive_lse>, ReleaseGil());
  module.def("contrastive_lse_backward", &with_operands<emc2::LseGradientParams, emc2::contrastive_lse_backward>,
             ReleaseGil());
  module.def("view_coins", &view_coins, ReleaseGil());
  module.def("philox_words", &philox_words, ReleaseGil());
}
