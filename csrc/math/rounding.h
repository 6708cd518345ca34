// Storage types of a weight, and the one rounding that each op ends with: to nearest, or at random.
//
// Host and device, no torch and no CUDA runtime, so that the CPU code, the CUDA kernels and their emulation
// round by the same lines. Branch-free, so that compilers vectorise the loops around it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PYMEND_INLINE __host__ __device__ __forceinline__
#else
#define PYMEND_INLINE inline __attribute__((always_inline))
#endif

namespace pymend {

struct Bf16 {
  uint16_t bits;  // sign, 8 exponent, 7 mantissa
};
struct Fp16 {
  uint16_t bits;  // sign, 5 exponent, 10 mantissa
};

// The type in which a weight of type T is updated: float, and double for double.
template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulateIn<T>::type;

PYMEND_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
PYMEND_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Exact: every value of T is one of Acc<T>.
PYMEND_INLINE double widen(double x) { return x; }
PYMEND_INLINE float widen(float x) { return x; }
PYMEND_INLINE float widen(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
PYMEND_INLINE float widen(Fp16 x) {
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t twice = word + word;  // without the sign
  const float normal = from_bits((twice >> 4) + (0xE0u << 23)) * from_bits(0x07800000u);
  const float subnormal = from_bits((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = to_bits(twice < (1u << 27) ? subnormal : normal);
  return from_bits((word & 0x80000000u) | magnitude);
}

// Round to nearest, ties to even; overflow gives infinity, NaN stays NaN.
template <typename T>
PYMEND_INLINE T round_to(Acc<T> x) {
  return x;
}
template <>
PYMEND_INLINE Bf16 round_to<Bf16>(float x) {
  const uint32_t word = to_bits(x);
  const uint32_t nearest = (word + 0x7FFFu + ((word >> 16) & 1u)) >> 16;
  const bool nan = (word & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? 0x7FC0u : nearest)};
}
template <>
PYMEND_INLINE Fp16 round_to<Fp16>(float x) {
  // Adding a power of two chosen from the exponent lets the float adder round the mantissa to 10 bits.
  const uint32_t word = to_bits(x);
  const uint32_t twice = word + word;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const float magnitude = from_bits(word & 0x7FFFFFFFu) * from_bits(0x77800000u) * from_bits(0x08800000u);
  const uint32_t base = to_bits(from_bits((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t nearest = ((base >> 13) & 0x7C00u) + (base & 0x0FFFu);
  const bool nan = twice > 0xFF000000u;
  return {static_cast<uint16_t>(((word & 0x80000000u) >> 16) | (nan ? 0x7E00u : nearest))};
}

// A bijection of 32 bits that mixes well (multipliers found by C. Wellons, hash-prospector).
PYMEND_INLINE uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 32 random bits of an element: they depend on the seed and its position alone, so any order of work gives the same.
PYMEND_INLINE uint32_t random_bits(uint64_t seed, uint64_t position) {
  const uint32_t low = static_cast<uint32_t>(position) + static_cast<uint32_t>(seed) * 0x9E3779B9u;
  const uint32_t high = static_cast<uint32_t>(position >> 32) + static_cast<uint32_t>(seed >> 32) * 0x9E3779B9u;
  return mix_bits(mix_bits(low) + high);
}

// Up or down at random, so that the expected value is x; `random` has 32 uniform bits.
template <typename T>
PYMEND_INLINE T round_randomly(Acc<T> x, uint32_t random);
template <>
PYMEND_INLINE Bf16 round_randomly<Bf16>(float x, uint32_t random) {
  const uint32_t word = to_bits(x);
  const bool nan = (word & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? 0x7FC0u : (word + (random >> 16)) >> 16)};
}
template <>
PYMEND_INLINE Fp16 round_randomly<Fp16>(float x, uint32_t random) {
  const uint32_t word = to_bits(x), magnitude = word & 0x7FFFFFFFu;
  const uint32_t rebiased = ((magnitude + (random >> 19)) >> 13) - (112u << 10);
  const uint32_t normal = rebiased > 0x7C00u ? 0x7C00u : rebiased;  // overflow, as infinity itself
  // Below 2^-14 steps are 2^-24 wide: count them.
  const float steps = from_bits(magnitude) * 16777216.0f;
  const uint32_t whole = static_cast<uint32_t>(steps < 1024.0f ? steps : 0.0f);
  const float rest = steps - static_cast<float>(whole);
  const uint32_t subnormal = whole + (static_cast<float>(random >> 8) * 0x1p-24f < rest);
  const uint32_t nearest = magnitude < 0x38800000u ? subnormal : normal;
  const bool nan = magnitude > 0x7F800000u;
  return {static_cast<uint16_t>(((word & 0x80000000u) >> 16) | (nan ? 0x7E00u : nearest))};
}

}  // namespace pymend
