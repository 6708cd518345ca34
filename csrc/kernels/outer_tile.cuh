// A tile of left^T right in the registers of a block: what rank_update subtracts from its matrices.
//
// Formula    sum[i, j] = sum_k left[k, i] * right[k, j]: one multiply-add for each k, upwards from 0, so that an
//            element has the same bits whatever the block. Plain SIMT in T, for any number of rows n.
// Layout     One block per tile. A thread keeps EACH x EACH sums: HALVES groups of 4 rows times HALVES groups of 4
//            columns. A group is 16 bytes of float, and a quarter of a warp reads 8 neighbouring groups of `right` and
//            one of `left`: no bank conflicts, and 4 reads from shared memory for 64 multiply-adds.
//            Factors are staged in shared memory DEPTH rows at a time, read 4 elements at a time where their rows
//            allow. Two stages take turns: while one is multiplied the next is on its way to registers, and one barrier
//            a stage is enough.
// Bytes      sizeof(T) * n * (ROWS + COLS) of factors per tile; tiles beside each other read the same ones from L2.
// Caller     Contiguous factors [n, rows] and [n, cols]; blockDim = BLOCK; all threads of the block; WHOLE only where
//            groups_are_whole() says so of every operand.
#pragma once

#include "device.h"
#include "math/ceil_div.h"

namespace pymend {

template <typename T, int BLOCK>
struct OuterTile {
  static constexpr int HALVES = sizeof(T) == 8 ? 1 : 2;  // 64 sums of double would take all 128 registers
  static constexpr int EACH = 4 * HALVES;                // rows and columns of a thread
  static constexpr int ACROSS = BLOCK < 128 ? 8 : 16, DOWN = BLOCK / ACROSS;  // threads
  static constexpr int ROWS = EACH * DOWN, COLS = EACH * ACROSS;              // elements
  static constexpr int APART = 4 * ACROSS;   // columns from one group of a thread to the next
  static constexpr int DEPTH = 16 / HALVES;  // rows of factors a stage

  static PYMEND_INLINE int64_t across(int64_t cols) { return ceil_div(cols, COLS); }
  static PYMEND_INLINE int64_t count(int64_t rows, int64_t cols) { return ceil_div(rows, ROWS) * across(cols); }

  // First row, first column in the tile of this thread's groups; a warp is 4 threads down and 8 across.
  static __device__ __forceinline__ int row(int group) {
    const int down = threadIdx.x / (WARP * ACROSS / 8) * 4 + threadIdx.x % WARP / 8;
    return 4 * (group * DOWN + down);
  }
  static __device__ __forceinline__ int col(int group) {
    const int along = threadIdx.x / WARP % (ACROSS / 8) * 8 + threadIdx.x % 8;
    return 4 * (group * ACROSS + along);
  }
};

// 16 KiB of float for 256 threads, 32 KiB of double.
template <typename T, int BLOCK>
struct OuterTileShared {
  using Tile = OuterTile<T, BLOCK>;
  alignas(16) T left[2][Tile::DEPTH][Tile::ROWS];
  alignas(16) T right[2][Tile::DEPTH][Tile::COLS];
};

// Whether every row of a matrix, cut into groups of 4 from its start on, is made of whole and aligned groups.
template <typename T>
__device__ __forceinline__ bool groups_are_whole(const T* matrix, int64_t width) {
  return width % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % alignof(Four<T>) == 0;
}

// How many of the 4 columns from `col` on a row of `width` has.
__device__ __forceinline__ int columns_inside(int64_t col, int64_t width) {
  return width - col >= 4 ? 4 : width - col > 0 ? static_cast<int>(width - col) : 0;
}

// A group of which `inside` elements exist, 0 or 4 if WHOLE; for the others 0.
template <bool WHOLE, typename T>
__device__ __forceinline__ Four<T> load_group(const T* from, int inside) {
  Four<T> x = {};
  if constexpr (WHOLE) {
    if (inside > 0) x = *reinterpret_cast<const Four<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < inside) x.of[i] = from[i];
    }
  }
  return x;
}

template <bool WHOLE, typename T>
__device__ __forceinline__ void store_group(T* to, int inside, const Four<T>& x) {
  if constexpr (WHOLE) {
    if (inside > 0) *reinterpret_cast<Four<T>*>(to) = x;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < inside) to[i] = x.of[i];
    }
  }
}

// A thread's share of DEPTH rows of a factor [n, width], on the way to WIDTH columns of shared memory.
template <typename T, int BLOCK, int DEPTH, int WIDTH>
struct Staged {
  static constexpr int ACROSS = WIDTH / 4, STEP = BLOCK / ACROSS, COUNT = DEPTH / STEP;
  static_assert(STEP * ACROSS == BLOCK && COUNT * STEP == DEPTH, "every thread has the same share of each stage");
  const T* from;  // its first element of the next stage
  int64_t below;  // rows from there to the end of the factor
  int inside;     // how many of its 4 columns the factor has
  Four<T> held[COUNT];

  __device__ __forceinline__ Staged(const T* factor, int64_t n, int64_t width, int64_t begin) {
    const int k = threadIdx.x / ACROSS;
    const int64_t col = begin + threadIdx.x % ACROSS * 4;
    from = factor + k * width + col;
    below = n - k;
    inside = columns_inside(col, width);
  }

  // Zeros come from outside of the factor.
  template <bool WHOLE>
  __device__ __forceinline__ void fetch(int64_t width) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      held[i] = load_group<WHOLE>(from + i * STEP * width, i * STEP < below ? inside : 0);
    }
    from += DEPTH * width;
    below -= DEPTH;
  }

  __device__ __forceinline__ void put(T (&shared)[DEPTH][WIDTH]) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      *reinterpret_cast<Four<T>*>(&shared[threadIdx.x / ACROSS + i * STEP][threadIdx.x % ACROSS * 4]) = held[i];
    }
  }
};

// Calls for a tile of a matrix, so that it comes from memory to L2 while the factors are multiplied.
template <typename Tile, int BLOCK, typename T>
__device__ __forceinline__ void call_for_tile(const T* matrix, int64_t rows, int64_t cols, int64_t row0, int64_t col0) {
  constexpr int SECTOR = 32 / sizeof(T), ACROSS = Tile::COLS / SECTOR;
#pragma unroll
  for (int i = threadIdx.x; i < Tile::ROWS * ACROSS; i += BLOCK) {
    const int64_t row = row0 + i / ACROSS, col = col0 + i % ACROSS * SECTOR;
    if (row < rows && col < cols) call_for_sector(matrix + row * cols + col);
  }
}

// sum[r][c]: of row row(r / 4) + r % 4 and column col(c / 4) + c % 4 of the tile at (row0, col0). Outside of the matrix
// sums are 0.
template <int BLOCK, bool WHOLE, typename T, int EACH>
__device__ __forceinline__ void outer_tile(const T* left, const T* right, int64_t rows, int64_t cols, int64_t n,
                                           int64_t row0, int64_t col0, OuterTileShared<T, BLOCK>& shared,
                                           T (&sum)[EACH][EACH]) {
  using Tile = OuterTile<T, BLOCK>;
  constexpr int DEPTH = Tile::DEPTH, HALVES = Tile::HALVES;
  Staged<T, BLOCK, DEPTH, Tile::ROWS> next_left(left, n, rows, row0);
  Staged<T, BLOCK, DEPTH, Tile::COLS> next_right(right, n, cols, col0);
  next_left.template fetch<WHOLE>(rows);
  next_right.template fetch<WHOLE>(cols);
  next_left.put(shared.left[0]);
  next_right.put(shared.right[0]);
  __syncthreads();
  int stage = 0;
  for (int64_t k0 = 0; k0 < n; k0 += DEPTH) {
    // Unconditional, zeros after the last stage: under a condition the compiler moves the loads down to their use.
    next_left.template fetch<WHOLE>(rows);
    next_right.template fetch<WHOLE>(cols);
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {  // rows past n are 0, and add nothing
      Four<T> y[HALVES], x[HALVES];
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        y[half] = *reinterpret_cast<const Four<T>*>(&shared.left[stage][k][Tile::row(half)]);
        x[half] = *reinterpret_cast<const Four<T>*>(&shared.right[stage][k][Tile::col(half)]);
      }
#pragma unroll
      for (int r = 0; r < EACH; ++r) {
#pragma unroll
        for (int c = 0; c < EACH; ++c) sum[r][c] += y[r / 4].of[r % 4] * x[c / 4].of[c % 4];
      }
    }
    stage ^= 1;  // which everybody had read before the last barrier
    next_left.put(shared.left[stage]);
    next_right.put(shared.right[stage]);
    __syncthreads();
  }
}

}  // namespace pymend
