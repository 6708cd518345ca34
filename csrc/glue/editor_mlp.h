// Checks and gathers the operands of editor_mlp and its backward: once, for CPU and CUDA.
#pragma once

#include <optional>

#include "math/editor_mlp.h"
#include "torch_glue.h"

namespace pymend {

// Shapes and dtypes as the schemas in ops.cpp say.
template <typename T>
EditorMlp<T> gather_editor_mlp(const Tensor& p, const Tensor& bias, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& shift, const Tensor& mode) {
  const ScalarType dtype = p.scalar_type();
  check_operand("p", p, dtype, p, {-1, -1});
  const int64_t rows = p.size(0), cols = p.size(1);
  check_operand("bias", bias, dtype, p, {cols});
  check_operand("mode", mode, ScalarType::Long, p, {rows});
  PYMEND_CHECK(scale.has_value() == shift.has_value(), "one of scale and shift is missing; give both or neither");
  EditorMlp<T> m{static_cast<const T*>(p.const_data_ptr()), static_cast<const T*>(bias.const_data_ptr()), nullptr,
                 nullptr, nullptr, rows, cols, 0};
  if (scale.has_value()) {
    check_operand("scale", *scale, dtype, p, {-1, cols});
    m.modes = scale->size(0);
    check_operand("shift", *shift, dtype, p, {m.modes, cols});
    PYMEND_CHECK(rows == 0 || m.modes > 0, "scale has no row, and p has ", rows);
    m.scale = static_cast<const T*>(scale->const_data_ptr());
    m.shift = static_cast<const T*>(shift->const_data_ptr());
    m.mode = static_cast<const int64_t*>(mode.const_data_ptr());
  }
  return m;
}

// What a call of the backward op gives back.
struct EditorMlpResult {
  Tensor p, bias, scale, shift;
};

inline EditorMlpResult empty_editor_mlp_result(const Tensor& p, const Tensor& bias,
                                               const std::optional<Tensor>& scale) {
  const std::vector<int64_t> none = {0, p.size(1)};
  const auto per_mode = [&] {
    return scale.has_value() ? torch::stable::empty_like(*scale) : torch::stable::new_empty(p, none);
  };
  return {torch::stable::empty_like(p), torch::stable::empty_like(bias), per_mode(), per_mode()};
}

template <typename T>
EditorMlpGradients<T> gather_gradients(const Tensor& grad, const Tensor& p, const EditorMlpResult& result) {
  check_operand("grad", grad, p.scalar_type(), p, {p.size(0), p.size(1)});
  return {static_cast<const T*>(grad.const_data_ptr()), static_cast<T*>(result.p.mutable_data_ptr()),
          static_cast<T*>(result.bias.mutable_data_ptr()), static_cast<T*>(result.scale.mutable_data_ptr()),
          static_cast<T*>(result.shift.mutable_data_ptr())};
}

inline void check_editor_mlp_dtype(const Tensor& p) {
  const ScalarType dtype = p.scalar_type();
  PYMEND_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "p has dtype ", name_of(dtype),
               ", expected Float or Double");
}

}  // namespace pymend
