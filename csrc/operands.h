// Queries and keys as the kernels that read them themselves are given them.
#pragma once

#include <cstdint>

namespace emc2 {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Operands {
  const void* queries;  // (rows, dim)
  const void* keys;     // (keys, dim)
  int64_t query_stride, key_stride;
  int64_t dim;
  Dtype dtype;
};

}  // namespace emc2
