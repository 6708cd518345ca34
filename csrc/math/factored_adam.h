// factored_adam: Adam for a matrix whose gradient exists only as factors; one element, and the operands.
//
//   g = scale * sum_k left[k, i] * right[k, j]
//   m <- m + (1 - beta1) (g - m);  v <- beta2 v + (1 - beta2) g^2
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
#pragma once

#include <cmath>

#include "math/rounding.h"

namespace pymend {

// The constants of one step, rounded once from double.
struct AdamStep {
  float weight1, beta2, weight2;  // 1 - beta1, beta2, 1 - beta2
  float rate;                     // lr / (1 - beta1^t)
  float unbias;                   // 1 / sqrt(1 - beta2^t)
  float eps;
};

inline AdamStep adam_step(double lr, double beta1, double beta2, double eps, int64_t t) {
  const double count = static_cast<double>(t);
  return {static_cast<float>(1 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1 - beta2),
          static_cast<float>(lr / (1 - std::pow(beta1, count))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, count))),
          static_cast<float>(eps)};
}

PYMEND_INLINE void adam_element(const AdamStep& step, float gradient, float& param, float& exp_avg, float& exp_avg_sq) {
  exp_avg += step.weight1 * (gradient - exp_avg);
  exp_avg_sq = step.beta2 * exp_avg_sq + step.weight2 * gradient * gradient;
  // The built-in, because the standard library's is an inline function: see cpu/factored_adam_rows.cpp.
  param -= step.rate * exp_avg / (__builtin_sqrtf(exp_avg_sq) * step.unbias + step.eps);
}

struct FactoredAdam {
  float* param;  // [rows, cols], contiguous, like both moments
  float* exp_avg;
  float* exp_avg_sq;
  const float* left;   // [n, rows], contiguous
  const float* right;  // [n, cols], contiguous
  const float* scale;  // one value, the clip factor
  int64_t rows, cols, n;
  AdamStep step;
};

}  // namespace pymend
