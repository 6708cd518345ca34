// editor_mlp and its backward on CPU tensors of float32 and float64; the loops are in editor_mlp_rows.cpp.
//
// The forward pass is cut into rows, the backward pass into columns, each of which sums its rows in order: the result
// does not depend on the number of threads.
#include <algorithm>

#include "cpu/editor_mlp_rows.h"
#include "cpu/level.h"
#include "glue/editor_mlp.h"
#include "math/ceil_div.h"

namespace pymend {
namespace {

constexpr int64_t ROWS = 4;       // of one unit of the forward pass
constexpr int64_t COLUMNS = 256;  // of one unit of the backward pass: 1 KiB of each row in float

// body(begin, end) for the pieces of [0, count) of `size` elements, in parallel.
template <typename Body>
void in_pieces(int64_t count, int64_t size, const Body& body) {
  parallel_for(0, ceil_div(count, size), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i * size, std::min((i + 1) * size, count));
  });
}

// A mode out of range would be a read outside of scale.
template <typename T>
EditorMlp<T> gather(const EditorMlpArguments& of) {
  const auto m = gather_editor_mlp<T>(of);
  for (int64_t row = 0; m.modes > 0 && row < m.rows; ++row) {
    PYMEND_CHECK(m.mode[row] >= 0 && m.mode[row] < m.modes, "mode[", row, "] is ", m.mode[row],
                 ", expected 0 to ", m.modes - 1);
  }
  return m;
}

struct Cpu {
  using Forward = OneOf<float, double>;

  template <typename T>
  static Tensor run(const std::optional<Tensor>& x, const EditorMlpArguments& of) {
    static const auto rows = choose_level<EditorMlpRows<T>>(PYMEND_LEVELS(editor_mlp_rows));
    const auto m = gather<T>(of);
    const T* x_ptr = gather_x<T>(x, of.p);
    Tensor y = torch::stable::empty_like(of.p);
    auto* y_ptr = static_cast<T*>(y.mutable_data_ptr());
    in_pieces(m.rows, ROWS, [&](int64_t begin, int64_t end) { rows(m, x_ptr, y_ptr, begin, end); });
    return y;
  }

  template <typename T>
  static EditorMlpResult run_backward(const Tensor& grad, const EditorMlpArguments& of) {
    static const auto columns = choose_level<EditorMlpColumns<T>>(PYMEND_LEVELS(editor_mlp_columns));
    const auto m = gather<T>(of);
    const EditorMlpResult result = empty_editor_mlp_result(of);
    const auto gradients = gather_gradients<T>(grad, of.p, result);
    in_pieces(m.cols, COLUMNS, [&](int64_t begin, int64_t end) { columns(m, gradients, begin, end); });
    return result;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) {
  m.impl("editor_mlp", TORCH_BOX(&editor_mlp<Cpu>));
  m.impl("editor_mlp_backward", TORCH_BOX(&editor_mlp_backward<Cpu>));
}

}  // namespace pymend
