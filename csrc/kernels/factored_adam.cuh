// factored_adam on a GPU: the product of two factors and Adam on the result, so that no gradient is ever stored.
//
// Formula    math/factored_adam.h; Adam (Kingma & Ba 2015) on G = scale * left^T right. Plain SIMT in fp32, for any
//            number of rows n.
// Layout     One block per tile of the parameter; a thread owns 4 x 4 elements of it, their rows and columns apart by
//            the number of threads down and across, and keeps the sums in registers. Both factors are staged in shared
//            memory DEPTH rows at a time; the parameter and its moments are read and written along the row.
// Bytes      24 per element; per tile also 4 n (rows + columns of the tile) of factors, which stay in L2.
// Caller     Contiguous operands as in FactoredAdam, none overlapping; blockDim = BLOCK, one block per tile; shared
//            memory of sizeof(FactoredAdamShared).
#pragma once

#include "device.h"
#include "math/factored_adam.h"

namespace pymend {

template <int BLOCK>
struct AdamTile {
  static constexpr int EACH = 4;  // rows and columns of a thread
  static constexpr int DOWN = BLOCK == 256 ? 16 : BLOCK == 64 ? 8 : 4, ACROSS = BLOCK / DOWN;  // threads
  static constexpr int ROWS = EACH * DOWN, COLS = EACH * ACROSS;                               // elements

  PYMEND_INLINE static int64_t across(int64_t cols) { return (cols + COLS - 1) / COLS; }
  PYMEND_INLINE static int64_t count(int64_t rows, int64_t cols) { return (rows + ROWS - 1) / ROWS * across(cols); }
};

template <int BLOCK>
struct FactoredAdamShared {
  static constexpr int DEPTH = 16;  // 8 KiB for 256 threads
  float left[DEPTH][AdamTile<BLOCK>::ROWS];
  float right[DEPTH][AdamTile<BLOCK>::COLS];
};

// Rows k0 to k0 + depth of columns [begin, begin + WIDTH) of a factor [n, size]; past the end: 0.
template <int BLOCK, int WIDTH>
__device__ __forceinline__ void stage(float (*shared)[WIDTH], const float* factor, int64_t k0, int depth, int64_t begin,
                                      int64_t size) {
  for (int i = threadIdx.x; i < depth * WIDTH; i += BLOCK) {
    const int64_t at = begin + i % WIDTH;
    shared[i / WIDTH][i % WIDTH] = at < size ? factor[(k0 + i / WIDTH) * size + at] : 0.0f;
  }
}

template <int BLOCK>
__global__ void factored_adam_kernel(const __grid_constant__ FactoredAdam f) {
  using Tile = AdamTile<BLOCK>;
  constexpr int EACH = Tile::EACH, DEPTH = FactoredAdamShared<BLOCK>::DEPTH;
  auto& shared = shared_memory<FactoredAdamShared<BLOCK>>();
  const int64_t tile = blockIdx.x;
  const int64_t row0 = tile / Tile::across(f.cols) * Tile::ROWS, col0 = tile % Tile::across(f.cols) * Tile::COLS;
  const int row = threadIdx.x / Tile::ACROSS, col = threadIdx.x % Tile::ACROSS;

  float sum[EACH][EACH] = {};
  for (int64_t k0 = 0; k0 < f.n; k0 += DEPTH) {
    const int depth = f.n - k0 < DEPTH ? static_cast<int>(f.n - k0) : DEPTH;
    __syncthreads();  // the previous stage has been read
    stage<BLOCK>(shared.left, f.left, k0, depth, row0, f.rows);
    stage<BLOCK>(shared.right, f.right, k0, depth, col0, f.cols);
    __syncthreads();
    for (int k = 0; k < depth; ++k) {
      float x[EACH];
#pragma unroll
      for (int c = 0; c < EACH; ++c) x[c] = shared.right[k][col + c * Tile::ACROSS];
#pragma unroll
      for (int r = 0; r < EACH; ++r) {
        const float y = shared.left[k][row + r * Tile::DOWN];
#pragma unroll
        for (int c = 0; c < EACH; ++c) sum[r][c] += y * x[c];
      }
    }
  }

  const float scale = *f.scale;
#pragma unroll
  for (int r = 0; r < EACH; ++r) {
#pragma unroll
    for (int c = 0; c < EACH; ++c) {
      const int64_t i = row0 + row + r * Tile::DOWN, j = col0 + col + c * Tile::ACROSS;
      if (i < f.rows && j < f.cols) {
        const int64_t at = i * f.cols + j;
        adam_element(f.step, scale * sum[r][c], f.param[at], f.exp_avg[at], f.exp_avg_sq[at]);
      }
    }
  }
}

}  // namespace pymend
