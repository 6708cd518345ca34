// editor_stream: both layers of the editor's network for few rows. Operands of its one launch, and how sums are cut.
//
//   a = x V^T,   p = a U^T,   y = x + max(scale[mode] * (p + bias) + shift[mode], 0),   twice
//
// A sum over the width of a weight is cut into slices; each slice gives a partial sum, and these are added in order.
// Slices depend on the number of rows alone, so the result does not depend on blocks or threads.
#pragma once

#include "math/ceil_div.h"
#include "math/editor_mlp.h"

namespace pymend {

constexpr int STREAM_LAYERS = 2;
constexpr int MOST_STREAM_ROWS = 64;
// Floats of activations that a block stages, 128 KiB: one block for each SM from sm_80 (163 KiB) on, and slices so long
// that the partial sums are small beside the weights.
constexpr int STAGED = 32768;

// A kernel is compiled for a number of rows; fewer are filled up with zeros.
PYMEND_INLINE constexpr int stream_step(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

// Matrices are contiguous. Without modes scale, shift and mode are null.
template <typename W>
struct EditorStreamLayer {
  const W* v;      // [r, d]
  const W* u;      // [d, r]
  const W* bias;   // [d]
  const W* scale;  // [modes, d]
  const W* shift;  // [modes, d]
};

template <typename W>
struct EditorStream {
  EditorStreamLayer<W> layer[STREAM_LAYERS];
  const float* x;       // [rows, d]
  const int64_t* mode;  // [rows], the line of scale and shift of each row
  float* y;             // [rows, d]
  float* partial;       // [partial_floats()], scratch like the next three
  float* a;             // [rows, r]
  float* between;       // [rows, d], what the first layer gives
  unsigned* arrived;    // [1], 0
  int64_t rows, d, r, modes;
  bool residual;
  bool aligned;  // every row of v and of u begins at a multiple of 16 bytes
};

// Partial sums of the wider of the two products: [slices, rows, columns].
PYMEND_INLINE int64_t partial_floats(int64_t rows, int64_t d, int64_t r) {
  const int64_t slice = STAGED / stream_step(rows);
  const int64_t down = ceil_div(d, slice) * r, up = ceil_div(r, slice) * d;
  return rows * (down > up ? down : up);
}

}  // namespace pymend
