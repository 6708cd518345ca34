// editor_mlp and its backward on CPU tensors of float32 and float64; the loops are in editor_mlp_rows.cpp.
//
// The forward pass is cut into rows, the backward pass into columns, each of which sums its rows in order: the result
// does not depend on the number of threads.
#include <algorithm>
#include <tuple>

#include "cpu/editor_mlp_rows.h"
#include "cpu/level.h"
#include "glue/editor_mlp.h"

namespace pymend {
namespace {

constexpr int64_t ROWS = 4;       // of one unit of the forward pass
constexpr int64_t COLUMNS = 256;  // of one unit of the backward pass: 1 KiB of each row in float

// body(begin, end) for the pieces of [0, count) of `size` elements, in parallel.
template <typename Body>
void in_pieces(int64_t count, int64_t size, const Body& body) {
  parallel_for(0, (count + size - 1) / size, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i * size, std::min((i + 1) * size, count));
  });
}

// A mode out of range would be a read outside of scale.
template <typename T>
EditorMlp<T> gather(const Tensor& p, const Tensor& bias, const std::optional<Tensor>& scale,
                    const std::optional<Tensor>& shift, const Tensor& mode) {
  const auto m = gather_editor_mlp<T>(p, bias, scale, shift, mode);
  for (int64_t row = 0; m.modes > 0 && row < m.rows; ++row) {
    PYMEND_CHECK(m.mode[row] >= 0 && m.mode[row] < m.modes, "mode[", row, "] is ", m.mode[row],
                 ", expected 0 to ", m.modes - 1);
  }
  return m;
}

template <typename T>
Tensor run(const std::optional<Tensor>& x, const Tensor& p, const Tensor& bias, const std::optional<Tensor>& scale,
           const std::optional<Tensor>& shift, const Tensor& mode) {
  static const auto rows = choose_level<EditorMlpRows<T>>(PYMEND_LEVELS(editor_mlp_rows));
  const auto m = gather<T>(p, bias, scale, shift, mode);
  if (x.has_value()) check_operand("x", *x, p.scalar_type(), p, {m.rows, m.cols});
  const auto* x_ptr = x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
  Tensor y = torch::stable::empty_like(p);
  auto* y_ptr = static_cast<T*>(y.mutable_data_ptr());
  in_pieces(m.rows, ROWS, [&](int64_t begin, int64_t end) { rows(m, x_ptr, y_ptr, begin, end); });
  return y;
}

template <typename T>
EditorMlpResult run_backward(const Tensor& grad, const Tensor& p, const Tensor& bias,
                             const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                             const Tensor& mode) {
  static const auto columns = choose_level<EditorMlpColumns<T>>(PYMEND_LEVELS(editor_mlp_columns));
  const auto m = gather<T>(p, bias, scale, shift, mode);
  const EditorMlpResult result = empty_editor_mlp_result(p, bias, scale);
  const auto gradients = gather_gradients<T>(grad, p, result);
  in_pieces(m.cols, COLUMNS, [&](int64_t begin, int64_t end) { columns(m, gradients, begin, end); });
  return result;
}

Tensor editor_mlp(std::optional<Tensor> x, Tensor p, Tensor bias, std::optional<Tensor> scale,
                  std::optional<Tensor> shift, Tensor mode) {
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

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) {
  m.impl("editor_mlp", TORCH_BOX(&editor_mlp));
  m.impl("editor_mlp_backward", TORCH_BOX(&editor_mlp_backward));
}

}  // namespace pymend
