// Checks and gathers the operands of factored_adam: once, for CPU and CUDA.
#pragma once

#include "math/factored_adam.h"
#include "torch_glue.h"

namespace pymend {

// Shapes and dtypes as the schema in ops.cpp says; called before anything is written.
inline FactoredAdam gather_factored_adam(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                                         const Tensor& left, const Tensor& right, const Tensor& scale, double lr,
                                         double beta1, double beta2, double eps, int64_t step) {
  check_operand("param", param, ScalarType::Float, param, {-1, -1});
  const int64_t rows = param.size(0), cols = param.size(1);
  check_operand("exp_avg", exp_avg, ScalarType::Float, param, {rows, cols});
  check_operand("exp_avg_sq", exp_avg_sq, ScalarType::Float, param, {rows, cols});
  check_operand("left", left, ScalarType::Float, param, {-1, rows});
  const int64_t n = left.size(0);
  check_operand("right", right, ScalarType::Float, param, {n, cols});
  check_operand("scale", scale, ScalarType::Float, param, {});
  PYMEND_CHECK(step >= 1, "step is ", step, ", expected 1 or more");
  return {static_cast<float*>(param.mutable_data_ptr()),
          static_cast<float*>(exp_avg.mutable_data_ptr()),
          static_cast<float*>(exp_avg_sq.mutable_data_ptr()),
          static_cast<const float*>(left.const_data_ptr()),
          static_cast<const float*>(right.const_data_ptr()),
          static_cast<const float*>(scale.const_data_ptr()),
          rows,
          cols,
          n,
          adam_step(lr, beta1, beta2, eps, step)};
}

}  // namespace pymend
