// rank_update on a GPU: W <- round(W - alpha * sum_k delta_k u_k^T), in place, for a list of matrices.
//
// Formula    math/rank_update.h; the update of a linear layer from the factors of its gradient (MEND, Mitchell et al.
//            2022, section 3). Two kernels: SIMT for few rows of factors and for wide weights, fp32 accumulation (fp64
//            for fp64); tensor cores for bfloat16 and float16 weights with more than FEW rows.
// Layout     SIMT: one block per tile of W, tiles of all matrices in one grid; the product of a tile as in
//            outer_tile.cuh. W is called for before the product, and read and written 4 elements at a time where its
//            rows allow.
//            Tensor cores: a warp owns 32 x 32 elements as 2 x 4 fragments. Factors are staged as bfloat16 pairs along
//            k, each value as the sum of two (16 bits of mantissa), and multiplied as hi hi + hi lo + lo hi. The sums
//            pass through shared memory, so that W is read along the row here too.
// Bytes      2 * sizeof(T) per element of W; per tile also 4 n (tile rows + tile columns) of factors, which stay in L2.
// Caller     Contiguous operands as in RankUpdate<T>, no two weights overlapping; blockDim = BLOCK; shared memory of the
//            kernel's Shared struct; `partial` holds one Kept per tile; fidelity_kernel afterwards, same stream.
#pragma once

#include <cmath>

#include "device.h"
#include "kernels/outer_tile.cuh"
#include "math/rank_update.h"

namespace pymend {

// Up to this many rows of factors SIMT is as fast as memory, and keeps all 24 bits of a float.
constexpr int64_t FEW = 8;
// 32 rows of factors a stage of the tensor-core kernel: most edits need one.
constexpr int DEPTH = 32;

template <typename T, int BLOCK>
struct RankUpdateShared {
  OuterTileShared<Acc<T>, BLOCK> factors;
  double scratch[BLOCK / WARP];
};

// Kept of a thread's few elements, in float: to make doubles of them all would take as long as a product of many rows.
// `wanted` is scaled by the power of two that brings the largest near 1, so that no square leaves the range of a float.
template <typename T>
struct ThreadKept {
  float along = 0, wanted = 0, scale, back;  // scale * back = 1

  __device__ __forceinline__ explicit ThreadKept(float largest) {
    const uint32_t exponent = to_bits(largest) >> 23;
    const uint32_t near = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;  // scale and back are normal numbers
    scale = from_bits((254 - near) << 23);
    back = from_bits(near << 23);
  }
  __device__ __forceinline__ void add(float applied_, float wanted_) {
    const float scaled = wanted_ * scale;
    along += applied_ * scaled;
    wanted += scaled * scaled;
  }
  __device__ __forceinline__ Kept kept() const {
    const double unit = back;
    return {along * unit, wanted * unit * unit};
  }
};
template <>
struct ThreadKept<double> {
  Kept sums;

  __device__ __forceinline__ explicit ThreadKept(double) {}
  __device__ __forceinline__ void add(double applied, double wanted) { sums.add(applied, wanted); }
  __device__ __forceinline__ Kept kept() const { return sums; }
};

// Updates the tile at (row0, col0) of a matrix; returns this thread's part of what was kept.
template <bool RANDOM, bool WHOLE, int BLOCK, typename T>
__device__ __forceinline__ Kept update_tile(const RankUpdate<T>& m, Acc<T> step, int64_t row0, int64_t col0,
                                            OuterTileShared<Acc<T>, BLOCK>& shared) {
  using Tile = OuterTile<Acc<T>, BLOCK>;
  constexpr int EACH = Tile::EACH, HALVES = Tile::HALVES;
  call_for_tile<Tile, BLOCK>(m.weight, m.rows, m.cols, row0, col0);
  Acc<T> sum[EACH][EACH] = {};
  outer_tile<BLOCK, WHOLE>(m.row, m.col, m.rows, m.cols, m.n, row0, col0, shared, sum);

  Acc<T> largest = 0;
#pragma unroll
  for (int r = 0; r < EACH; ++r) {
#pragma unroll
    for (int c = 0; c < EACH; ++c) largest = std::fmax(largest, std::fabs(sum[r][c]));
  }
  ThreadKept<Acc<T>> kept(largest * std::fabs(step));
  // Rows whose weights are on their way before the first is needed; random bits need registers too.
  constexpr int TOGETHER = RANDOM ? 1 : 2;
  int inside[HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) inside[half] = columns_inside(col0 + Tile::col(half), m.cols);
#pragma unroll
  for (int first = 0; first < EACH; first += TOGETHER) {
    const int64_t row = row0 + Tile::row(first / 4) + first % 4, at = row * m.cols + col0 + Tile::col(0);
    if (row < m.rows) {  // a branch also keeps the compiler from putting off the sums of `kept` until registers run out
      Four<T> weight[TOGETHER][HALVES];
#pragma unroll
      for (int i = 0; i < TOGETHER * HALVES; ++i) {
        const int r = i / HALVES, half = i % HALVES;
        const int64_t place = at + r * m.cols + half * Tile::APART;
        weight[r][half] = load_group<WHOLE>(m.weight + place, row + r < m.rows ? inside[half] : 0);
      }
#pragma unroll
      for (int i = 0; i < TOGETHER * HALVES; ++i) {
        const int r = i / HALVES, half = i % HALVES;
        const int64_t place = at + r * m.cols + half * Tile::APART;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const Acc<T> wanted = step * sum[first + r][4 * half + c];  // 0 outside of the matrix
          kept.add(update_element<RANDOM>(weight[r][half].of[c], wanted, m.seed, place + c), wanted);
        }
        store_group<WHOLE>(m.weight + place, row + r < m.rows ? inside[half] : 0, weight[r][half]);
      }
    }
  }
  return kept.kept();
}

template <typename T, int BLOCK, bool RANDOM>
__global__ void __launch_bounds__(BLOCK, 2)
    rank_update_kernel(const __grid_constant__ RankUpdateList<T> list, const Acc<T>* alpha, Kept* partial) {
  using Tile = OuterTile<Acc<T>, BLOCK>;
  auto& shared = shared_memory<RankUpdateShared<T, BLOCK>>();
  const int64_t tile = blockIdx.x;
  const RankUpdate<T>& m = list.item[list.matrix_of(tile)];
  // No more tiles than a grid has blocks: divisions of 32 bits, which are much shorter, will do.
  const unsigned place = static_cast<unsigned>(tile - m.first_tile);
  const unsigned tiles_across = static_cast<unsigned>(Tile::across(m.cols));
  const int64_t row0 = static_cast<int64_t>(place / tiles_across) * Tile::ROWS;
  const int64_t col0 = static_cast<int64_t>(place % tiles_across) * Tile::COLS;
  const Acc<T> step = -alpha[m.index];

  Kept kept;
  if (m.n > 0) {  // without factors W is not even read
    if (groups_are_whole(m.row, m.rows) && groups_are_whole(m.col, m.cols) && groups_are_whole(m.weight, m.cols)) {
      kept = update_tile<RANDOM, true, BLOCK>(m, step, row0, col0, shared.factors);
    } else {
      kept = update_tile<RANDOM, false, BLOCK>(m, step, row0, col0, shared.factors);
    }
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) partial[tile] = kept;
}

// Tile of the tensor-core kernel: 32 x 32 elements for each warp, two warps side by side where there are two.
template <int BLOCK>
struct MmaTile {
  static constexpr int WARPS = BLOCK / WARP;
  static constexpr int COLS = WARPS == 1 ? 32 : 64;
  static constexpr int ROWS = WARPS * 32 * 32 / COLS;
};

// Words of two bfloat16 in a staged row of factors: 4 more than needed, so that a fragment's lanes meet 32 banks.
constexpr int PAIRS = DEPTH / 2 + 4;

template <int BLOCK>
struct RankUpdateMmaShared {
  using Tile = MmaTile<BLOCK>;
  struct Factors {
    uint32_t row[2][Tile::ROWS][PAIRS];  // [high or low part][row][pair of k]
    uint32_t col[2][Tile::COLS][PAIRS];
  };
  union {
    Factors factors;
    float sum[Tile::ROWS][Tile::COLS + 4];  // once the factors have been used up
  };
  double scratch[Tile::WARPS];
};

// Stages columns [first, first + COUNT) of DEPTH rows of a factor [n, width], from row k0 on, zeros outside.
template <int BLOCK, int COUNT>
__device__ __forceinline__ void stage_pairs(const float* factor, int64_t n, int64_t width, int64_t k0, int64_t first,
                                            uint32_t (&staged)[2][COUNT][PAIRS]) {
  for (int i = threadIdx.x; i < COUNT * DEPTH / 2; i += BLOCK) {
    const int pair = i / COUNT, at = i % COUNT;
    uint32_t high = 0, low = 0;
    for (int side = 0; side < 2; ++side) {
      const int64_t k = k0 + 2 * pair + side;
      const float x = k < n && first + at < width ? factor[k * width + first + at] : 0.0f;
      const Bf16 part = round_to<Bf16>(x);
      high |= static_cast<uint32_t>(part.bits) << (16 * side);
      low |= static_cast<uint32_t>(round_to<Bf16>(x - widen(part)).bits) << (16 * side);
    }
    staged[0][at][pair] = high;
    staged[1][at][pair] = low;
  }
}

template <typename T, int BLOCK, bool RANDOM>
__global__ void rank_update_mma_kernel(const __grid_constant__ RankUpdateList<T> list, const float* alpha,
                                       Kept* partial) {
  using Tile = MmaTile<BLOCK>;
  auto& shared = shared_memory<RankUpdateMmaShared<BLOCK>>();
  const int64_t tile = blockIdx.x;
  const RankUpdate<T>& m = list.item[list.matrix_of(tile)];
  const int64_t tiles_across = ceil_div(m.cols, Tile::COLS);
  const int64_t row0 = (tile - m.first_tile) / tiles_across * Tile::ROWS;
  const int64_t col0 = (tile - m.first_tile) % tiles_across * Tile::COLS;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const int warp_row = warp / (Tile::COLS / 32) * 32, warp_col = warp % (Tile::COLS / 32) * 32;

  float sum[2][4][4] = {};
  for (int64_t k0 = 0; k0 < m.n; k0 += DEPTH) {
    __syncthreads();  // the previous stage has been read
    stage_pairs<BLOCK, Tile::ROWS>(m.row, m.n, m.rows, k0, row0, shared.factors.row);
    stage_pairs<BLOCK, Tile::COLS>(m.col, m.n, m.cols, k0, col0, shared.factors.col);
    __syncthreads();
#pragma unroll
    for (int word = 0; word < DEPTH / 2; word += 8) {
      uint32_t a[2][2][4], b[2][4][2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          a[part][i / 4][i % 4] = shared.factors.row[part][warp_row + i / 4 * 16 + i % 2 * 8 + g][word + i % 4 / 2 * 4 + t];
          b[part][i / 2][i % 2] = shared.factors.col[part][warp_col + i / 2 * 8 + g][word + i % 2 * 4 + t];
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        mma_bf16(sum[i / 4][i % 4], a[0][i / 4], b[1][i % 4]);
        mma_bf16(sum[i / 4][i % 4], a[1][i / 4], b[0][i % 4]);
        mma_bf16(sum[i / 4][i % 4], a[0][i / 4], b[0][i % 4]);
      }
    }
  }
  __syncthreads();  // the last factors have been read
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = warp_row + i / 16 * 16 + i % 4 / 2 * 8 + g, col = warp_col + i / 4 % 4 * 8 + 2 * t + i % 2;
    shared.sum[row][col] = sum[i / 16][i / 4 % 4][i % 4];
  }
  __syncthreads();

  Kept kept;
  const float step = -alpha[m.index];
  for (int i = threadIdx.x; i < Tile::ROWS * Tile::COLS; i += BLOCK) {
    const int64_t row = row0 + i / Tile::COLS, col = col0 + i % Tile::COLS;
    if (row < m.rows && col < m.cols) {
      const float wanted = step * shared.sum[i / Tile::COLS][i % Tile::COLS];
      const int64_t at = row * m.cols + col;
      kept.add(update_element<RANDOM>(m.weight[at], wanted, m.seed, at), wanted);
    }
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) partial[tile] = kept;
}

template <int BLOCK>
struct FidelityShared {
  double scratch[BLOCK / WARP];
};

// One block per matrix adds up the tiles' sums in a fixed order: no atomics, the same bits on every run.
template <typename T, int BLOCK>
__global__ void fidelity_kernel(const __grid_constant__ RankUpdateList<T> list, const Kept* partial, Acc<T>* fidelity) {
  auto& shared = shared_memory<FidelityShared<BLOCK>>();
  const int index = blockIdx.x;
  Kept kept;
  for (int64_t tile = list.item[index].first_tile + threadIdx.x; tile < list.end_tile(index); tile += BLOCK) {
    kept.add(partial[tile]);
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) fidelity[list.item[index].index] = static_cast<Acc<T>>(kept.fidelity());
}

}  // namespace pymend
