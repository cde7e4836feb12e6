// Checks that are counted, and random numbers that are the same everywhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>

inline int failures = 0;

// A broken loop of 2^23 checks would print as many lines: the first few say it all.
#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition) && ++failures <= 20) {                              \
      std::printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                          \
      std::printf("\n");                                                 \
    }                                                                    \
  } while (false)

// Its sequence is fixed by the standard, unlike that of the distributions.
inline std::mt19937_64 random_bits(20240427);

inline int64_t random_below(int64_t end) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(end)); }
