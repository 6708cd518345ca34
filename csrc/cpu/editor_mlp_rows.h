// Rows and columns of one call, compiled once per level of x86-64.
#pragma once

#include "cpu/levels.h"
#include "math/editor_mlp.h"

namespace pymend {

// y = x + max(pre, 0) in rows [begin, end); x may be null: y = max(pre, 0).
template <typename T>
using EditorMlpRows = void (*)(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end);

// All gradients in columns [begin, end), rows in order.
template <typename T>
using EditorMlpColumns = void (*)(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end);

PYMEND_IN_EVERY_LEVEL(
    template <typename T>
    void editor_mlp_rows(const EditorMlp<T>& m, const T* x, T* y, int64_t begin, int64_t end);
    template <typename T>
    void editor_mlp_columns(const EditorMlp<T>& m, const EditorMlpGradients<T>& grad, int64_t begin, int64_t end);)

}  // namespace pymend
