// The native core as Python sees it: addresses and sizes in, nothing computed here. An address of 0 is a null pointer.
// emc2_kernels/backends/cpu/mh.py is the only caller; it keeps the tensors behind the addresses alive.
#include <pybind11/pybind11.h>

#include "../csrc/cpu/draws.h"
#include "../csrc/cpu/gathered.h"
#include "../csrc/cpu/gumbel.h"
#include "../csrc/cpu/lanes.h"
#include "../csrc/cpu/sweep.h"

namespace py = pybind11;

namespace {

template <class Element>
Element* at(uintptr_t address) {
  return reinterpret_cast<Element*>(address);
}

emc2::Recorder make_recorder(
    // the walk
    int64_t rows, int64_t keys, int64_t total, int64_t first, int64_t count, int64_t burn_in, int64_t samples,
    uint64_t seed, uint32_t step, float temperature, uintptr_t temperatures, uintptr_t chain_ids, uintptr_t query_ids,
    uintptr_t key_ids, uintptr_t log_proposal, int threads,
    // of a step: incoming states and what it writes; all 0 for a transition
    uintptr_t state_key, uintptr_t state_score, uintptr_t labels, uintptr_t step_samples, uintptr_t step_key,
    uintptr_t step_score, uintptr_t step_threshold, uintptr_t accepted, uintptr_t lse,
    // of a transition; all 0 for a step
    uintptr_t threshold, uintptr_t score, uintptr_t position) {
  return {{rows,
           keys,
           {total, first, count, burn_in, samples},
           seed,
           step,
           temperature,
           at<const float>(temperatures),
           at<const int64_t>(chain_ids),
           at<const int64_t>(query_ids),
           at<const int64_t>(key_ids),
           at<const float>(log_proposal),
           threads},
          {at<const int64_t>(state_key), at<const float>(state_score)},
          {at<int32_t>(step_samples), at<int64_t>(step_key), at<float>(step_score), at<float>(step_threshold),
           at<int32_t>(accepted), at<float>(lse), at<const int64_t>(labels)},
          {at<float>(threshold), at<float>(score), at<int64_t>(position)}};
}

emc2::Operands operands(uintptr_t queries, uintptr_t keys, int64_t query_stride, int64_t key_stride, int64_t dim,
                        int dtype) {
  return {at<const void>(queries),        at<const void>(keys), query_stride, key_stride, dim,
          static_cast<emc2::Dtype>(dtype)};
}

void walk_tile(emc2::Sweep& sweep, uintptr_t dots, int64_t stride, int64_t row_begin, int64_t row_end,
               int64_t key_begin, int64_t key_end) {
  sweep.walk({at<const float>(dots), stride, row_begin, row_end, key_begin, key_end});
}

void small_sweep(const emc2::Recorder& recorder, uintptr_t queries, uintptr_t keys, int64_t query_stride,
                 int64_t key_stride, int64_t dim, int dtype) {
  emc2::Sweep sweep(recorder);
  sweep.walk_small(operands(queries, keys, query_stride, key_stride, dim, dtype));
}

void walk_gathered(const emc2::Recorder& recorder, uintptr_t queries, uintptr_t keys, int64_t query_stride,
                   int64_t key_stride, int64_t dim, int dtype, uintptr_t positions, int64_t position_stride) {
  emc2::walk_gathered(recorder, operands(queries, keys, query_stride, key_stride, dim, dtype),
                      {at<const int64_t>(positions), position_stride});
}

emc2::GumbelSampler make_gumbel_sampler(int64_t rows, int64_t keys, int64_t samples, uint64_t seed, uint32_t step,
                                        float temperature, uintptr_t temperatures, uintptr_t chain_ids,
                                        uintptr_t query_ids, uintptr_t key_ids, int threads, uintptr_t positions) {
  return emc2::GumbelSampler({rows, keys, samples, seed, step, temperature, at<const float>(temperatures),
                              at<const int64_t>(chain_ids), at<const int64_t>(query_ids), at<const int64_t>(key_ids),
                              threads, at<int64_t>(positions)});
}

void scan_tile(emc2::GumbelSampler& sampler, uintptr_t dots, int64_t stride, int64_t row_begin, int64_t row_end,
               int64_t key_begin, int64_t key_end) {
  sampler.scan({at<const float>(dots), stride, row_begin, row_end, key_begin, key_end});
}

void view_coins(uintptr_t items, int64_t count, uint64_t seed, uint32_t step, uintptr_t views) {
  emc2::view_coins(at<const int64_t>(items), count, seed, step, at<int64_t>(views));
}

void philox_words(uintptr_t counters, int64_t count, uint64_t seed, uintptr_t words) {
  emc2::philox_words(at<const uint32_t>(counters), count, seed, at<uint32_t>(words));
}

}  // namespace

PYBIND11_MODULE(emc2_native, module) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  module.attr("instruction_set") = emc2::kInstructionSet;
  py::class_<emc2::Recorder>(module, "Recorder").def(py::init(&make_recorder));
  py::class_<emc2::Sweep>(module, "Sweep")
      .def(py::init<const emc2::Recorder&>(), ReleaseGil())
      .def("walk", &walk_tile, ReleaseGil());
  py::class_<emc2::GumbelSampler>(module, "GumbelSampler")
      .def(py::init(&make_gumbel_sampler))
      .def("scan", &scan_tile, ReleaseGil());
  module.def("small_sweep", &small_sweep, ReleaseGil());
  module.def("walk_gathered", &walk_gathered, ReleaseGil());
  module.def("view_coins", &view_coins, ReleaseGil());
  module.def("philox_words", &philox_words, ReleaseGil());
}
