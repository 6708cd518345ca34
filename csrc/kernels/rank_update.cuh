// rank_update on a GPU: W <- round(W - alpha * sum_k delta_k u_k^T), in place, for a list of matrices.
//
// Formula    math/rank_update.h; the update of a linear layer from the factors of its gradient (MEND, Mitchell et al.
//            2022, section 3). fp32 multiply-adds (fp64 for fp64), for few rows of factors and for wide weights;
//            rank_update_mma.cuh has bfloat16 and float16 weights with more than FEW rows.
// Layout     One block per tile of W, tiles of all matrices in one grid; the product of a tile as in outer_tile.cuh. W is
//            called for before the product, and read and written 4 elements at a time where its rows allow.
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

template <typename T, int BLOCK>
struct RankUpdateShared {
  OuterTileShared<Acc<T>, BLOCK> factors;
  double scratch[BLOCK / WARP];
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
  let_next_start();

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

template <int BLOCK>
struct FidelityShared {
  double scratch[BLOCK / WARP];
};

// One block per matrix adds up the tiles' sums in a fixed order: no atomics, the same bits on every run.
template <typename T, int BLOCK>
__global__ void fidelity_kernel(const __grid_constant__ RankUpdateList<T> list, const Kept* partial, Acc<T>* fidelity) {
  auto& shared = shared_memory<FidelityShared<BLOCK>>();
  const int index = blockIdx.x;
  await_former();
  Kept kept;
  for (int64_t tile = list.item[index].first_tile + threadIdx.x; tile < list.end_tile(index); tile += BLOCK) {
    kept.add(partial[tile]);
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) fidelity[list.item[index].index] = static_cast<Acc<T>>(kept.fidelity());
}

}  // namespace pymend
