// token_losses on CUDA tensors.
#include "kernels/token_losses.cuh"

#include "cuda/launcher.h"
#include "glue/token_losses.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

struct Cuda {
  template <typename T>
  static TokenLossesResult run(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& base) {
    auto m = gather_token_losses<T>(logits, target, base);
    auto result = make_token_losses(m, logits);
    const auto kernel = m.base ? token_losses_kernel<T, BLOCK, true> : token_losses_kernel<T, BLOCK, false>;
    Launcher("token_losses", logits)(kernel, m.rows, BLOCK, sizeof(TokenLossesShared<T, BLOCK>), m);
    return result;
  }

  template <typename T>
  static void run_backward(const TokenLossesGradient<T>& m, const Tensor& logits) {
    const auto kernel =
        m.grad_kl ? token_losses_backward_kernel<T, BLOCK, true> : token_losses_backward_kernel<T, BLOCK, false>;
    const int64_t tiles = m.losses.rows * gradient_tiles<BLOCK>(m.losses.vocabulary);
    Launcher("token_losses_backward", logits)(kernel, tiles, BLOCK, 0, m);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) {
  m.impl("token_losses", TORCH_BOX(&token_losses<Cuda>));
  m.impl("token_losses_backward", TORCH_BOX(&token_losses_backward<Cuda>));
}

}  // namespace pymend
