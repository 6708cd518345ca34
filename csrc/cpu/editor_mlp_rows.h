// Rows and columns of one call, compiled once per level of x86-64: a wheel assumes none, the level is chosen at run
// time.
#pragma once

#include "math/editor_mlp.h"

namespace pymend {

// y = x + max(pre, 0) in rows [begin, end); x may be null: y = max(pre, 0).
template <typename T>
using EditorMlpRows = void (*)(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end);

// All gradients in columns [begin, end), rows in order.
template <typename T>
using EditorMlpColumns = void (*)(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end);

#define PYMEND_DECLARE_LEVEL_OF(level, T)                                                                      \
  namespace level {                                                                                            \
  void editor_mlp_rows(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end);                   \
  void editor_mlp_columns(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end); \
  }
#define PYMEND_DECLARE_LEVEL(level)      \
  PYMEND_DECLARE_LEVEL_OF(level, float)  \
  PYMEND_DECLARE_LEVEL_OF(level, double)
PYMEND_DECLARE_LEVEL(base)
PYMEND_DECLARE_LEVEL(avx2)
PYMEND_DECLARE_LEVEL(avx512)
#undef PYMEND_DECLARE_LEVEL
#undef PYMEND_DECLARE_LEVEL_OF

}  // namespace pymend
