// Values that come by address are looked at once, before anything is read by them and before anything is written: a
// position past the keys would read foreign memory, a schedule without samples would divide by zero. What is refused
// here is said again, with its place, by emc2_kernels/backends/params.py.
#pragma once

#include <cmath>
#include <stdexcept>

#include "../params.h"

namespace emc2 {

constexpr int64_t kChains = int64_t{1} << 40;                             // the counter has 40 bits for them
constexpr float kMinTemperature = 0x1p-120f, kMaxTemperature = 0x1p100f;  // as in emc2_kernels/checks.py
constexpr int64_t kMaxProposals = int64_t{1} << 33;                       // 32 bits for blocks of two positions

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// No branch inside, so that the compiler makes vectors of it.
template <class Element, class Test>
bool all_of(const Element* values, int64_t count, Test test) {
  int fails = 0;
  for (int64_t i = 0; i < count; ++i) fails |= !test(values[i]);
  return !fails;
}

// Null: nothing to look at.
inline void require_within(const int64_t* values, int64_t count, int64_t end, const char* what) {
  const auto inside = [end](int64_t value) { return static_cast<uint64_t>(value) < static_cast<uint64_t>(end); };
  require(!values || all_of(values, count, inside), what);
}

// One temperature for all rows is looked at in Python.
inline void require_scores(const ScoreParams& scores) {
  bool legal = true;
  for (int64_t row = 0; row < scores.num_rows && scores.temperatures; ++row) {
    const float value = scores.row_temperature(row);
    legal &= value >= kMinTemperature && value <= kMaxTemperature;
  }
  require(legal, "temperature: a value that float32 cannot divide by");
  const auto legal_weight = [](float value) { return value > -INFINITY; };  // not NaN either
  require(!scores.log_proposal || all_of(scores.log_proposal, scores.num_keys, legal_weight),
          "log_proposal: a value that is NaN or -inf");
}

inline void require_schedule(const Schedule& schedule) {
  const int64_t total = schedule.total_proposals, first = schedule.first_proposal, count = schedule.num_proposals;
  const bool whole = first >= 0 && count >= 0 && total <= kMaxProposals && first <= total && count <= total - first;
  const int64_t kept = total - schedule.burn_in;
  const bool sampled =
      schedule.num_samples >= 1 && schedule.burn_in >= 0 && (total == 0 || (kept > 0 && schedule.num_samples <= kept));
  require(whole && sampled, "a walk whose burn-in, samples and proposals do not fit each other");
}

inline void require_walk(const WalkParams& walk) {
  require_schedule(walk);
  require_within(walk.chain_ids, walk.num_rows, kChains, "chain_ids: a value outside [0, 2^40)");
  require_scores(walk);
  const auto finite = [](float value) { return value < INFINITY; };
  require(!walk.log_proposal || all_of(walk.log_proposal, walk.num_keys, finite), "log_proposal: a value not finite");
}

}  // namespace emc2
