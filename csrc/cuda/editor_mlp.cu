// editor_mlp and its backward on CUDA tensors: checks, launches on torch's current stream.
#include "kernels/editor_mlp.cuh"

#include <tuple>

#include "glue/editor_mlp.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

void check_grid(int64_t blocks, const Tensor& p) {
  PYMEND_CHECK(blocks <= INT32_MAX, "p has shape ", shape_of(p), ", which makes more tiles than a grid has blocks: ",
               blocks);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  PYMEND_CHECK(error == cudaSuccess, "editor_mlp could not be launched: ", cudaGetErrorString(error));
}

template <typename T>
Tensor run(const std::optional<Tensor>& x, const Tensor& p, const Tensor& bias, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& shift, const Tensor& mode) {
  const auto m = gather_editor_mlp<T>(p, bias, scale, shift, mode);
  if (x.has_value()) check_operand("x", *x, p.scalar_type(), p, {m.rows, m.cols});
  const auto* x_ptr = x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
  const DeviceGuard guard(p.get_device_index());
  const auto stream = static_cast<Stream>(current_stream(p.get_device_index()));
  Tensor y = torch::stable::empty_like(p);
  auto* y_ptr = static_cast<T*>(y.mutable_data_ptr());
  const int64_t blocks = forward_blocks(m, BLOCK);
  check_grid(blocks, p);
  if (blocks > 0) launch(editor_mlp_kernel<T, BLOCK>, blocks, BLOCK, 0, stream, m, x_ptr, y_ptr);
  check_launch();
  return y;
}

template <typename T>
EditorMlpResult run_backward(const Tensor& grad, const Tensor& p, const Tensor& bias,
                             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                             const Tensor& mode) {
  const auto m = gather_editor_mlp<T>(p, bias, scale, shift, mode);
  const DeviceGuard guard(p.get_device_index());
  const auto stream = static_cast<Stream>(current_stream(p.get_device_index()));
  const EditorMlpResult result = empty_editor_mlp_result(p, bias, scale);
  const auto gradients = gather_gradients<T>(grad, p, result);
  const int64_t blocks = backward_blocks(m);
  check_grid(blocks, p);
  if (blocks > 0) {
    launch(editor_mlp_backward_kernel<T, BLOCK>, blocks, BLOCK, sizeof(EditorMlpShared<T, BLOCK>), stream, m,
           gradients);
    if (m.modes > 0) {
      launch(editor_mlp_bias_kernel<T, BLOCK>, tiles_of(m.cols, BLOCK), BLOCK, 0, stream, m, gradients);
    }
  }
  check_launch();
  return result;
}

Tensor editor_mlp(std::optional<Tensor> x, Tensor p, Tensor bias, std::optional<Tensor> scale,
                  std::optional<Tensor> shift, Tensor mode) {
  if (p.scalar_type() == ScalarType::BFloat16) return run<Bf16>(x, p, bias, scale, shift, mode);
  if (p.scalar_type() == ScalarType::Half) return run<Fp16>(x, p, bias, scale, shift, mode);
  check_editor_mlp_dtype(p);
  return p.scalar_type() == ScalarType::Double ? run<double>(x, p, bias, scale, shift, mode)
                                               : run<float>(x, p, bias, scale, shift, mode);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> editor_mlp_backward(Tensor grad, Tensor p, Tensor bias,
                                                               std::optional<Tensor> scale,
                                                               std::optional<Tensor> shift, Tensor mode) {
  check_editor_mlp_dtype(p);
  const auto result = p.scalar_type() == ScalarType::Double ? run_backward<double>(grad, p, bias, scale, shift, mode)
                                                            : run_backward<float>(grad, p, bias, scale, shift, mode);
  return {result.p, result.bias, result.scale, result.shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) {
  m.impl("editor_mlp", TORCH_BOX(&editor_mlp));
  m.impl("editor_mlp_backward", TORCH_BOX(&editor_mlp_backward));
}

}  // namespace pymend
