// Checks and gathers the operands of editor_mlp and its backward: once, for CPU and CUDA.
#pragma once

#include <tuple>

#include "math/editor_mlp.h"
#include "torch_glue.h"

namespace pymend {

// What forward and backward are given besides x or the gradient of y.
struct EditorMlpArguments {
  const Tensor& p;
  const Tensor& bias;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& shift;
  const Tensor& mode;
};

// Shapes and dtypes as the schemas in ops.cpp say.
template <typename T>
EditorMlp<T> gather_editor_mlp(const EditorMlpArguments& of) {
  const auto& [p, bias, scale, shift, mode] = of;
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

inline EditorMlpResult empty_editor_mlp_result(const EditorMlpArguments& of) {
  const std::vector<int64_t> none = {0, of.p.size(1)};
  const auto per_mode = [&] {
    return of.scale.has_value() ? torch::stable::empty_like(*of.scale) : torch::stable::new_empty(of.p, none);
  };
  return {torch::stable::empty_like(of.p), torch::stable::empty_like(of.bias), per_mode(), per_mode()};
}

template <typename T>
EditorMlpGradients<T> gather_gradients(const Tensor& grad, const Tensor& p, const EditorMlpResult& result) {
  check_operand("grad", grad, p.scalar_type(), p, {p.size(0), p.size(1)});
  return {static_cast<const T*>(grad.const_data_ptr()), static_cast<T*>(result.p.mutable_data_ptr()),
          static_cast<T*>(result.bias.mutable_data_ptr()), static_cast<T*>(result.scale.mutable_data_ptr()),
          static_cast<T*>(result.shift.mutable_data_ptr())};
}

// x [R, d] as the kernels take it, or null.
template <typename T>
const T* gather_x(const std::optional<Tensor>& x, const Tensor& p) {
  if (!x.has_value()) return nullptr;
  check_operand("x", *x, p.scalar_type(), p, {p.size(0), p.size(1)});
  return static_cast<const T*>(x->const_data_ptr());
}

// The ops on a device, whose code is Device::run<T> and Device::run_backward<T>.
template <typename Device>
Tensor editor_mlp(std::optional<Tensor> x, Tensor p, Tensor bias, std::optional<Tensor> scale,
                  std::optional<Tensor> shift, Tensor mode) {
  const EditorMlpArguments of{p, bias, scale, shift, mode};
  return by_dtype(typename Device::Forward(), "p has dtype", p.scalar_type(),
                  [&](auto kind) { return Device::template run<decltype(kind)>(x, of); });
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> editor_mlp_backward(Tensor grad, Tensor p, Tensor bias,
                                                               std::optional<Tensor> scale,
                                                               std::optional<Tensor> shift, Tensor mode) {
  const EditorMlpArguments of{p, bias, scale, shift, mode};
  const auto result = by_dtype(OneOf<float, double>(), "p has dtype", p.scalar_type(), [&](auto kind) {
    return Device::template run_backward<decltype(kind)>(grad, of);
  });
  return {result.p, result.bias, result.scale, result.shift};
}

}  // namespace pymend
