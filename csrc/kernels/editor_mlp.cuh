// editor_mlp on a GPU: a layer of the editor's network after its products, and the backward of that part.
//
// Formula    math/editor_mlp.h (MEND, Mitchell et al. 2022, Eq. 3). Forward, bfloat16 and float16 are taken in fp32 and
//            rounded once.
// Layout     Forward: one block per tile of EPILOGUE_ROWS x BLOCK elements; a thread owns one column and reads its bias
//            once. Backward: one block per mode and WARP columns; a lane owns a column, and the warps take the rows in
//            turn and pass over those of other modes. Each row has one mode, so grad_p is written once, and the sums
//            over a mode's rows never leave the block. A small kernel adds the modes up to the gradient of the bias.
// Bytes      Forward 3 sizeof(T) per element (2 without x), backward 3 sizeof(T); modes are read once per block, from L2.
// Caller     Operands as in EditorMlp<T>, every mode[row] in [0, modes); blockDim = BLOCK; shared memory of
//            sizeof(EditorMlpShared) for the backward kernel; with modes, editor_mlp_bias_kernel afterwards on the same stream.
#pragma once

#include "device.h"
#include "math/editor_mlp.h"

namespace pymend {

constexpr int EPILOGUE_ROWS = 4;  // loads in flight for each thread

PYMEND_INLINE int64_t tiles_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Without modes 1 and 0, which leave z as it is.
template <typename T>
PYMEND_INLINE Acc<T> scale_of(const EditorMlp<T>& m, int64_t mode, int64_t col) {
  return m.modes > 0 ? widen(m.scale[mode * m.cols + col]) : Acc<T>(1);
}
template <typename T>
PYMEND_INLINE Acc<T> shift_of(const EditorMlp<T>& m, int64_t mode, int64_t col) {
  return m.modes > 0 ? widen(m.shift[mode * m.cols + col]) : Acc<T>(0);
}

// x may be null: y = max(pre, 0).
template <typename T, int BLOCK>
__global__ void editor_mlp_kernel(const __grid_constant__ EditorMlp<T> m, const T* x, T* y) {
  const int64_t tiles_across = tiles_of(m.cols, BLOCK);
  const int64_t row0 = blockIdx.x / tiles_across * EPILOGUE_ROWS;
  const int64_t col = blockIdx.x % tiles_across * BLOCK + threadIdx.x;
  if (col >= m.cols) return;
  const Acc<T> bias = widen(m.bias[col]);
#pragma unroll
  for (int r = 0; r < EPILOGUE_ROWS; ++r) {
    const int64_t row = row0 + r, at = row * m.cols + col;
    if (row < m.rows) {
      const int64_t mode = m.modes > 0 ? m.mode[row] : 0;
      const Acc<T> pre = under_max(widen(m.p[at]) + bias, scale_of(m, mode, col), shift_of(m, mode, col));
      y[at] = round_to<T>(x ? widen(x[at]) + rectify(pre) : rectify(pre));
    }
  }
}

// Sums of each warp, by column.
template <typename T, int BLOCK>
struct EditorMlpShared {
  T shift[BLOCK / WARP][WARP];
  T scale[BLOCK / WARP][WARP];
};

template <typename T, int BLOCK>
__global__ void editor_mlp_backward_kernel(const __grid_constant__ EditorMlp<T> m,
                                           const __grid_constant__ EditorMlpGradients<T> grad) {
  constexpr int WARPS = BLOCK / WARP;
  auto& shared = shared_memory<EditorMlpShared<T, BLOCK>>();
  const int64_t tiles_across = tiles_of(m.cols, WARP);
  const int64_t mode = blockIdx.x / tiles_across;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int64_t col = blockIdx.x % tiles_across * WARP + lane;
  const bool inside = col < m.cols;  // lanes past the edge compute nothing but meet the barrier

  T of_shift = 0, of_scale = 0;
  if (inside) {
    const T bias = m.bias[col], scale = scale_of(m, mode, col), shift = shift_of(m, mode, col);
    for (int64_t row = warp; row < m.rows; row += WARPS) {
      if (m.modes > 0 && m.mode[row] != mode) continue;
      const int64_t at = row * m.cols + col;
      const T z = m.p[at] + bias;
      const T g = passed(under_max(z, scale, shift), grad.y[at]);
      grad.p[at] = g * scale;
      of_shift += g;
      of_scale += g * z;
    }
  }
  shared.shift[warp][lane] = of_shift;
  shared.scale[warp][lane] = of_scale;
  __syncthreads();
  if (warp == 0 && inside) {
    for (int other = 1; other < WARPS; ++other) {
      of_shift += shared.shift[other][lane];
      of_scale += shared.scale[other][lane];
    }
    if (m.modes > 0) {
      grad.shift[mode * m.cols + col] = of_shift;
      grad.scale[mode * m.cols + col] = of_scale;
    } else {
      grad.bias[col] = of_shift;
    }
  }
}

// grad_bias = sum over modes of scale * grad_shift: the sum of grad_p over all rows.
template <typename T, int BLOCK>
__global__ void editor_mlp_bias_kernel(const __grid_constant__ EditorMlp<T> m,
                                       const __grid_constant__ EditorMlpGradients<T> grad) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
  if (col >= m.cols) return;
  T sum = 0;
  for (int64_t mode = 0; mode < m.modes; ++mode) sum += m.scale[mode * m.cols + col] * grad.shift[mode * m.cols + col];
  grad.bias[col] = sum;
}

// The blocks of each kernel's grid.
template <typename T>
int64_t forward_blocks(const EditorMlp<T>& m, int block) {
  return tiles_of(m.rows, EPILOGUE_ROWS) * tiles_of(m.cols, block);
}
template <typename T>
int64_t backward_blocks(const EditorMlp<T>& m) {
  return (m.modes > 0 ? m.modes : 1) * tiles_of(m.cols, WARP);
}

}  // namespace pymend
