// One chain in each lane: GCC's vector extensions, lowered to whatever the target has (AVX-512, AVX2, SSE, NEON).
//
// Two operations are spelled with intrinsics where the target has the exact instruction and GCC does not find it: the
// widening multiply that Philox is made of, and which lanes are set. Everything else is portable C++.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../philox.h"

namespace emc2 {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr const char* kInstructionSet = "AVX512";
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr const char* kInstructionSet = "AVX2";
#else
constexpr int kLanes = 4;  // a register: GCC takes comparisons and choices of wider vectors apart, lane by lane
#if defined(__aarch64__)
constexpr const char* kInstructionSet = "NEON";
#else
constexpr const char* kInstructionSet = "DEFAULT";  // torch's word for it
#endif
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint64_t Wides __attribute__((vector_size(4 * kLanes)));  // half as many lanes

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Vector, class Element>
EMC2_HD Vector load(const Element* from) {
  static_assert(sizeof(Element) == sizeof(Vector) / kLanes, "one element a lane");
  Vector lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <class Vector, class Element>
EMC2_HD void store(Element* to, Vector lanes) {
  static_assert(sizeof(Element) == sizeof(Vector) / kLanes, "one element a lane");
  std::memcpy(to, &lanes, sizeof lanes);
}

// Less zero, and not zero plus it, which for -0 is an addition.
EMC2_HD Floats all_floats(float value) { return value - Floats{}; }
EMC2_HD Ints all_ints(int32_t value) { return Ints{} + value; }

// Bit i: whether lane i of a comparison's result is set.
EMC2_HD uint32_t lane_bits(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#elif defined(__aarch64__)
  return vaddvq_u32(vandq_u32((uint32x4_t)mask, (uint32x4_t){1, 2, 4, 8}));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (mask[lane] & 1u) << lane;
  return bits;
#endif
}

EMC2_HD bool any(Ints mask) { return lane_bits(mask) != 0; }

// A vector of 32-bit words kept as its even and its odd lanes, each in the low half of a 64-bit lane. The high halves
// hold rubbish: the widening multiply ignores them, so Philox needs no shuffle between its rounds.
struct SplitWords {
  Wides even, odd;
};

EMC2_HD SplitWords split(Words words) {
  const Wides wides = (Wides)words;
  return {wides, wides >> 32};
}

EMC2_HD Words join(SplitWords words) { return (Words)((words.even & 0xffffffffu) | (words.odd << 32)); }

EMC2_HD SplitWords operator^(SplitWords a, SplitWords b) { return {a.even ^ b.even, a.odd ^ b.odd}; }
EMC2_HD SplitWords operator^(SplitWords a, uint32_t b) { return {a.even ^ b, a.odd ^ b}; }

EMC2_HD Wides multiply_low_halves(Wides words, uint32_t multiplier) {
#if defined(__AVX512F__)
  // The masked form is the same instruction; GCC 12 warns of an uninitialised operand inside the plain one.
  return (Wides)_mm512_maskz_mul_epu32(0xff, (__m512i)words, _mm512_set1_epi64(multiplier));
#elif defined(__AVX2__)
  return (Wides)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(multiplier));
#elif defined(__SSE2__)
  return (Wides)_mm_mul_epu32((__m128i)words, _mm_set1_epi64x(multiplier));
#elif defined(__aarch64__)
  return (Wides)vmull_n_u32(vmovn_u64((uint64x2_t)words), multiplier);  // no multiply has 64-bit lanes
#else
  return (words & 0xffffffffu) * static_cast<uint64_t>(multiplier);
#endif
}

EMC2_HD WideProduct<SplitWords> multiply_wide(uint32_t multiplier, SplitWords words) {
  const Wides even = multiply_low_halves(words.even, multiplier);
  const Wides odd = multiply_low_halves(words.odd, multiplier);
  return {{even >> 32, odd >> 32}, {even, odd}};
}

// E = -log u of the contract. log(odd * 2^-24) = (exponent - 24) log 2 + log1p(f), f = mantissa - 1 in [sqrt(1/2) - 1,
// sqrt(2) - 1). Within 1.25 ulp and never negative, or a threshold could lie below its score: tests/cpp checks all 2^23
// inputs.
EMC2_HD Floats exponential(Words word) {
  const Floats x = __builtin_convertvector((Ints)acceptance_numerator(word), Floats);
  const Ints bits = (Ints)x;
  const Ints exponent = (bits - 0x3f3504f3) >> 23;
  const Floats f = (Floats)(bits - (exponent << 23)) - 1.0f;
  Floats p = all_floats(0.08734750747680664f);
  p = p * f - 0.14307482540607452f;
  p = p * f + 0.14917989075183868f;
  p = p * f - 0.165705144405365f;
  p = p * f + 0.19962070882320404f;
  p = p * f - 0.25001755356788635f;
  p = p * f + 0.33333951234817505f;
  p = p * f - 0.49999991059303284f;
  const Floats log1p = p * (f * f) + f;
  return __builtin_convertvector(24 - exponent, Floats) * 0.6931471805599453f - log1p;
}

// exp(x) for x <= 0, relative error 1.2e-7; what underflows is 0 (-inf included).
EMC2_HD Floats exp_nonpositive(Floats x) {
  const Ints underflows = x < -87.0f;
  const Floats y = underflows ? all_floats(0.0f) : x;
  const Floats magic =
      all_floats(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low bits
  const Floats shifted = y * 1.4426950408889634f + magic;
  const Floats n = shifted - magic;
  const Floats r = (y - n * 0.693359375f) + n * 2.12194440054690583e-4f;  // log 2 in two parts
  Floats p = all_floats(0.0013836907455697656f);
  p = p * r + 0.008374816738069057f;
  p = p * r + 0.04166822507977486f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats scaled = (Floats)((Words)p + (((Words)shifted - (Words)magic) << 23));
  return underflows ? all_floats(0.0f) : scaled;
}

}  // namespace emc2
