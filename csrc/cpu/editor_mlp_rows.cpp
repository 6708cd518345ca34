// The inner loops of editor_mlp on a CPU, along a row.
//
// CMake compiles this file once per level, with PYMEND_LEVEL and that level's flags. It includes math/ only: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for everyone.
#include "cpu/editor_mlp_rows.h"

namespace pymend {
namespace PYMEND_LEVEL {
namespace {

template <bool MODES, bool RESIDUAL, typename T>
PYMEND_INLINE void forward(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * m.cols, of_mode = MODES ? m.mode[row] * m.cols : 0;
#pragma omp simd
    for (int64_t j = 0; j < m.cols; ++j) {
      T pre = m.p[at + j] + m.bias[j];
      if (MODES) pre = under_max(pre, m.scale[of_mode + j], m.shift[of_mode + j]);
      y[at + j] = RESIDUAL ? x[at + j] + rectify(pre) : rectify(pre);
    }
  }
}

// The sums over rows are kept where they are wanted: a block of columns of all modes stays in the cache.
template <bool MODES, typename T>
PYMEND_INLINE void backward(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) grad.bias[j] = 0;
  for (int64_t mode = 0; mode < m.modes; ++mode) {
    for (int64_t j = begin; j < end; ++j) grad.scale[mode * m.cols + j] = grad.shift[mode * m.cols + j] = 0;
  }
  for (int64_t row = 0; row < m.rows; ++row) {
    const int64_t at = row * m.cols, of_mode = MODES ? m.mode[row] * m.cols : 0;
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      const T z = m.p[at + j] + m.bias[j];
      if (MODES) {
        const T g = passed(under_max(z, m.scale[of_mode + j], m.shift[of_mode + j]), grad.y[at + j]);
        const T grad_p = g * m.scale[of_mode + j];
        grad.p[at + j] = grad_p;
        grad.bias[j] += grad_p;
        grad.scale[of_mode + j] += g * z;
        grad.shift[of_mode + j] += g;
      } else {
        const T g = passed(z, grad.y[at + j]);
        grad.p[at + j] = g;
        grad.bias[j] += g;
      }
    }
  }
}

}  // namespace

template <typename T>
void editor_mlp_rows(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end) {
  if (m.modes > 0 && x) return forward<true, true>(m, x, y, begin, end);
  if (m.modes > 0) return forward<true, false>(m, x, y, begin, end);
  if (x) return forward<false, true>(m, x, y, begin, end);
  return forward<false, false>(m, x, y, begin, end);
}

template <typename T>
void editor_mlp_columns(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end) {
  if (m.modes > 0) return backward<true>(m, grad, begin, end);
  return backward<false>(m, grad, begin, end);
}

#define PYMEND_DEFINE(T)                                                                             \
  template void editor_mlp_rows(const EditorMlp<T>&, const T*, T*, int64_t, int64_t);                \
  template void editor_mlp_columns(const EditorMlp<T>&, const EditorMlpGradients<T>&, int64_t, int64_t);
PYMEND_DEFINE(double)
PYMEND_DEFINE(float)
#undef PYMEND_DEFINE

}  // namespace PYMEND_LEVEL
}  // namespace pymend
