// e^x for x <= 0, branch-free, so that compilers vectorise the loops around it.
#pragma once

#include <cmath>

#include "math/rounding.h"

namespace pymend {

// Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, and 2^n through the exponent's bits. Within 2
// units in the last place; 0 where the result would be subnormal, and for -inf; NaN stays NaN.
PYMEND_INLINE float exp_down(float x) {
  constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const float shifted = x * 1.44269504f + TO_INTEGER;
  const float n = shifted - TO_INTEGER;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, n times the first is exact
  float p = 1.9875691500e-4f;                                    // Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = from_bits((to_bits(shifted) << 23) + 0x3F800000u);
  return x < -87.3f ? 0.0f : p * power;
}

PYMEND_INLINE double exp_down(double x) { return std::exp(x); }

}  // namespace pymend
