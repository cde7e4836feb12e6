// The generator and the transition operator are written once and compiled by g++ and nvcc alike.
#pragma once

#if defined(__CUDACC__)
#define EMC2_HD __host__ __device__ __forceinline__
#define EMC2_UNROLL _Pragma("unroll")
#else
#define EMC2_HD inline __attribute__((always_inline))
#define EMC2_UNROLL _Pragma("GCC unroll 16")
#endif
