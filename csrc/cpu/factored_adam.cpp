// factored_adam on CPU tensors of float32; the loops are in factored_adam_rows.cpp.
//
// Blocks of the matrix are a fixed partition and an element's terms are added in order, so the result does not depend
// on the number of threads.
#include <algorithm>

#include "cpu/factored_adam_rows.h"
#include "cpu/level.h"
#include "math/ceil_div.h"
#include "torch_glue.h"

namespace pymend {
namespace {

constexpr int64_t BLOCK_ROWS = 8 * PANEL_ROWS;  // of one unit of work

// Shapes and dtypes as the schema in ops.cpp says; called before anything is written.
FactoredAdam gather(const Tensor& param, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& left,
                    const Tensor& right, const Tensor& scale, AdamStep step) {
  check_operand("param", param, ScalarType::Float, param, {-1, -1});
  const int64_t rows = param.size(0), cols = param.size(1);
  check_operand("exp_avg", exp_avg, ScalarType::Float, param, {rows, cols});
  check_operand("exp_avg_sq", exp_avg_sq, ScalarType::Float, param, {rows, cols});
  check_operand("left", left, ScalarType::Float, param, {-1, rows});
  const int64_t n = left.size(0);
  check_operand("right", right, ScalarType::Float, param, {n, cols});
  check_operand("scale", scale, ScalarType::Float, param, {});
  return {static_cast<float*>(param.mutable_data_ptr()),
          static_cast<float*>(exp_avg.mutable_data_ptr()),
          static_cast<float*>(exp_avg_sq.mutable_data_ptr()),
          static_cast<const float*>(left.const_data_ptr()),
          static_cast<const float*>(right.const_data_ptr()),
          static_cast<const float*>(scale.const_data_ptr()),
          rows,
          cols,
          n,
          step};
}

// from [n, size] -> [panels][n][panel], the last one filled up with zeros
Tensor pack(const Tensor& from, int64_t panel) {
  const int64_t n = from.size(0), size = from.size(1), panels = ceil_div(size, panel);
  Tensor packed = torch::stable::new_empty(from, {panels, n, panel});
  const auto* source = static_cast<const float*>(from.const_data_ptr());
  auto* target = static_cast<float*>(packed.mutable_data_ptr());
  parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t width = std::min(panel, size - p * panel);
      for (int64_t k = 0; k < n; ++k) {
        float* to = target + (p * n + k) * panel;
        std::copy_n(source + k * size + p * panel, width, to);
        std::fill(to + width, to + panel, 0.0f);
      }
    }
  });
  return packed;
}

void factored_adam(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor left, Tensor right, Tensor scale, double lr,
                   double beta1, double beta2, double eps, int64_t step) {
  static const auto adam_block = choose_level<AdamBlock>(PYMEND_LEVELS(adam_block));
  PYMEND_CHECK(step >= 1, "step is ", step, ", expected 1 or more");
  const FactoredAdam f =
      gather(param, exp_avg, exp_avg_sq, left, right, scale, adam_step(lr, beta1, beta2, eps, step));
  const Tensor packed_left = pack(left, PANEL_ROWS), packed_right = pack(right, PANEL_COLS);
  const auto* left_ptr = static_cast<const float*>(packed_left.const_data_ptr());
  const auto* right_ptr = static_cast<const float*>(packed_right.const_data_ptr());
  const int64_t down = ceil_div(f.rows, BLOCK_ROWS);
  const int64_t across = ceil_div(f.cols, SPAN * PANEL_COLS);
  // Down the rows first: the panels of `right` are the larger part, and stay in L2.
  parallel_for(0, down * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % down * BLOCK_ROWS, col = i / down * SPAN * PANEL_COLS;
      adam_block(f, left_ptr + begin * f.n, right_ptr + col * f.n, begin, std::min(begin + BLOCK_ROWS, f.rows), col);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) { m.impl("factored_adam", TORCH_BOX(&factored_adam)); }

}  // namespace pymend
