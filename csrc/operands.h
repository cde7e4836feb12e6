// Queries and keys as the kernels that read them themselves are given them.
#pragma once

#include <cstdint>

namespace emc2 {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Half-precision elements, as bits: each kernel widens them in its own way.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// `call` with a value of the dtype's element type; what it returns.
template <class Call>
auto with_element(Dtype dtype, Call call) {
  switch (dtype) {
    case Dtype::kBfloat16:
      return call(Bfloat16{});
    case Dtype::kFloat16:
      return call(Float16{});
    case Dtype::kFloat32:
      break;
  }
  return call(float{});
}

struct Operands {
  const void* queries;  // (rows, dim)
  const void* keys;     // (keys, dim)
  int64_t query_stride, key_stride;
  int64_t dim;
  Dtype dtype;
};

}  // namespace emc2
