// The generator and the transition operator are written once and compiled by g++ and nvcc alike.
#pragma once

#if defined(__CUDACC__)
#define EMC2_HD __host__ __device__ __forceinline__
#else
#define EMC2_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define EMC2_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define EMC2_UNROLL  // nvcc's pass for the host, which knows neither pragma
#else
#define EMC2_UNROLL _Pragma("GCC unroll 16")
#endif
