// editor_mlp and its backward on CUDA tensors.
#include "kernels/editor_mlp.cuh"

#include "cuda/launcher.h"
#include "glue/editor_mlp.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

struct Cuda {
  using Forward = OneOf<float, double, Bf16, Fp16>;

  template <typename T>
  static Tensor run(const std::optional<Tensor>& x, const EditorMlpArguments& of) {
    const auto m = gather_editor_mlp<T>(of);
    const T* x_ptr = gather_x<T>(x, of.p);
    const Launcher launch("editor_mlp", of.p);
    Tensor y = torch::stable::empty_like(of.p);
    auto* y_ptr = static_cast<T*>(y.mutable_data_ptr());
    launch(editor_mlp_kernel<T, BLOCK>, forward_blocks(m, BLOCK), BLOCK, 0, m, x_ptr, y_ptr);
    return y;
  }

  template <typename T>
  static EditorMlpResult run_backward(const Tensor& grad, const EditorMlpArguments& of) {
    const auto m = gather_editor_mlp<T>(of);
    const Launcher launch("editor_mlp_backward", of.p);
    const EditorMlpResult result = empty_editor_mlp_result(of);
    const auto gradients = gather_gradients<T>(grad, of.p, result);
    launch(editor_mlp_backward_kernel<T, BLOCK>, backward_blocks(m), BLOCK, sizeof(EditorMlpShared<T, BLOCK>), m,
           gradients);
    if (m.modes > 0) launch(editor_mlp_bias_kernel<T, BLOCK>, tiles_of(m.cols, BLOCK), BLOCK, 0, m, gradients);
    return result;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) {
  m.impl("editor_mlp", TORCH_BOX(&editor_mlp<Cuda>));
  m.impl("editor_mlp_backward", TORCH_BOX(&editor_mlp_backward<Cuda>));
}

}  // namespace pymend
