// token_losses on CUDA tensors: checks, launches on torch's current stream.
#include "kernels/token_losses.cuh"

#include "glue/token_losses.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

template <typename... Parameters, typename Operands>
void launch_on(const Tensor& logits, void (*kernel)(Parameters...), int64_t grid, size_t shared,
               const Operands& operands) {
  PYMEND_CHECK(grid <= INT32_MAX, "logits of shape ", shape_of(logits), " take more blocks than a grid has: ", grid);
  if (grid == 0) return;
  const DeviceGuard guard(logits.get_device_index());
  launch(kernel, grid, BLOCK, shared, static_cast<Stream>(current_stream(logits.get_device_index())), operands);
  const cudaError_t error = cudaGetLastError();
  PYMEND_CHECK(error == cudaSuccess, "token_losses could not be launched: ", cudaGetErrorString(error));
}

template <typename T>
TokenLossesResult run(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& base) {
  auto m = gather_token_losses<T>(logits, target, base);
  auto result = make_token_losses(m, logits);
  launch_on(logits, m.base ? token_losses_kernel<T, BLOCK, true> : token_losses_kernel<T, BLOCK, false>, m.rows,
            sizeof(TokenLossesShared<T, BLOCK>), m);
  return result;
}

template <typename T>
Tensor run_backward(const MaybeTensor& grad_nll, const MaybeTensor& grad_kl, const Tensor& logits,
                    const MaybeTensor& target, const MaybeTensor& base, const Tensor& stats) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  const auto m = gather_gradient<T>(grad_nll, grad_kl, logits, target, base, stats, grad);
  const auto kernel =
      m.grad_kl ? token_losses_backward_kernel<T, BLOCK, true> : token_losses_backward_kernel<T, BLOCK, false>;
  launch_on(logits, kernel, m.losses.rows * gradient_tiles<BLOCK>(m.losses.vocabulary), 0, m);
  return grad;
}

TokenLossesResult token_losses(Tensor logits, MaybeTensor target, MaybeTensor base) {
  return dispatch(logits, [&](auto kind) { return run<decltype(kind)>(logits, target, base); });
}

Tensor token_losses_backward(MaybeTensor grad_nll, MaybeTensor grad_kl, Tensor logits, MaybeTensor target,
                             MaybeTensor base, Tensor stats) {
  return dispatch(logits, [&](auto kind) {
    return run_backward<decltype(kind)>(grad_nll, grad_kl, logits, target, base, stats);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) {
  m.impl("token_losses", TORCH_BOX(&token_losses));
  m.impl("token_losses_backward", TORCH_BOX(&token_losses_backward));
}

}  // namespace pymend
