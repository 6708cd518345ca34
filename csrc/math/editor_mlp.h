// editor_mlp: one element of a layer of the editor's network, once its matrix products are done, and its backward.
//
//   z = p + bias,   pre = scale[mode] * z + shift[mode],   y = x + max(pre, 0)
//
// Without scale and shift pre = z. The derivative of max(pre, 0) at 0 is 1: at the identity start pre is 0 everywhere.
// The backward pass recomputes pre, so files of editor_mlp are compiled without contraction to multiply-adds.
#pragma once

#include "math/rounding.h"

namespace pymend {

// Matrices are contiguous. Without modes scale, shift and mode are null.
template <typename T>
struct EditorMlp {
  const T* p;            // [rows, cols]
  const T* bias;         // [cols]
  const T* scale;        // [modes, cols]
  const T* shift;        // [modes, cols]
  const int64_t* mode;   // [rows], the line of scale and shift of each row
  int64_t rows, cols, modes;
};

template <typename T>
struct EditorMlpGradients {
  const T* y;  // [rows, cols], given; the others are wanted
  T* p;        // [rows, cols]
  T* bias;     // [cols]
  T* scale;    // [modes, cols]
  T* shift;    // [modes, cols]
};

template <typename T>
PYMEND_INLINE T under_max(T z, T scale, T shift) {
  return scale * z + shift;
}

// max(pre, 0); NaN stays NaN.
template <typename T>
PYMEND_INLINE T rectify(T pre) {
  return pre < 0 ? T(0) : pre;
}

// The gradient of pre for that of max(pre, 0).
template <typename T>
PYMEND_INLINE T passed(T pre, T grad) {
  return pre >= 0 ? grad : T(0);
}

}  // namespace pymend
