// rank_update on a GPU: W <- round(W - alpha * sum_k delta_k u_k^T), in place, for a list of matrices.
//
// Formula    math/rank_update.h; the update of a linear layer from the factors of its gradient (MEND, Mitchell et al.
//            2022, section 3). fp32 multiply-adds (fp64 for fp64), for few rows of factors and for wide weights;
//            rank_update_mma.cuh has bfloat16 and float16 weights with more than FEW rows.
// Layout     One block per tile of TILE_ROWS x BLOCK elements, tiles of all matrices in one grid. A thread owns one
//            column of its tile and keeps TILE_ROWS sums in registers; `row` is staged in shared memory DEPTH rows at a
//            time and read by broadcast, `col` and W are read along the row, coalesced.
// Bytes      2 * sizeof(T) per element of W; per tile also 4 n (tile rows + tile columns) of factors, which stay in L2.
// Caller     Contiguous operands as in RankUpdate<T>, no two weights overlapping; blockDim = BLOCK; shared memory of the
//            kernel's Shared struct; `partial` holds one Kept per tile; fidelity_kernel afterwards, same stream.
#pragma once

#include "device.h"
#include "math/rank_update.h"

namespace pymend {

// Up to this many rows of factors SIMT is as fast as memory, and keeps all 24 bits of a float.
constexpr int64_t FEW = 8;
// 16 sums, their epilogue and the addresses fit in 64 registers for float on sm_80 to sm_100: no spill.
constexpr int TILE_ROWS = 16;
// 32 rows of factors: 2 KiB of shared memory, and most edits need one pass.
constexpr int DEPTH = 32;

template <typename T, int BLOCK>
struct RankUpdateShared {
  Acc<T> row[DEPTH][TILE_ROWS];
  double scratch[BLOCK / WARP];
};

template <typename T, int BLOCK, bool RANDOM>
__global__ void rank_update_kernel(const __grid_constant__ RankUpdateList<T> list, const Acc<T>* alpha, Kept* partial) {
  auto& shared = shared_memory<RankUpdateShared<T, BLOCK>>();
  const int64_t tile = blockIdx.x;
  const int index = list.matrix_of(tile);
  const RankUpdate<T>& m = list.item[index];
  const int64_t tiles_across = ceil_div(m.cols, BLOCK);
  const int64_t row0 = (tile - m.first_tile) / tiles_across * TILE_ROWS;
  const int64_t col = (tile - m.first_tile) % tiles_across * BLOCK + threadIdx.x;
  const bool inside = col < m.cols;  // threads past the edge compute nothing but meet every barrier

  Acc<T> sum[TILE_ROWS] = {};
  for (int64_t k0 = 0; k0 < m.n; k0 += DEPTH) {
    const int depth = m.n - k0 < DEPTH ? static_cast<int>(m.n - k0) : DEPTH;
    __syncthreads();  // the previous stage has been read
    for (int i = threadIdx.x; i < depth * TILE_ROWS; i += BLOCK) {
      const int64_t row = row0 + i % TILE_ROWS;
      shared.row[i / TILE_ROWS][i % TILE_ROWS] = row < m.rows ? m.row[(k0 + i / TILE_ROWS) * m.rows + row] : Acc<T>(0);
    }
    __syncthreads();
    if (inside) {
      for (int k = 0; k < depth; ++k) {
        const Acc<T> x = m.col[(k0 + k) * m.cols + col];
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r) sum[r] += shared.row[k][r] * x;
      }
    }
  }

  Kept kept;
  const Acc<T> step = -alpha[m.index];
  if (inside && m.n > 0) {
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
      if (row0 + r < m.rows) {
        const Acc<T> wanted = step * sum[r];
        const int64_t at = (row0 + r) * m.cols + col;
        kept.add(update_element<RANDOM>(m.weight[at], wanted, m.seed, at), wanted);
      }
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
