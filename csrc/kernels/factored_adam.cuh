// factored_adam on a GPU: the product of two factors and Adam on the result, so that no gradient is ever stored.
//
// Formula    math/factored_adam.h; Adam (Kingma & Ba 2015) on G = scale * left^T right. Plain SIMT in fp32, for any
//            number of rows n.
// Layout     One block per tile of the parameter, its product as in outer_tile.cuh; the parameter and its moments are
//            called for before the product, and read and written 16 bytes at a time where their rows allow.
// Bytes      24 per element; per tile also 4 n (rows + columns of the tile) of factors, which stay in L2.
// Caller     Contiguous operands as in FactoredAdam, none overlapping; blockDim = BLOCK, one block per tile; shared
//            memory of sizeof(OuterTileShared<float, BLOCK>).
#pragma once

#include "device.h"
#include "kernels/outer_tile.cuh"
#include "math/factored_adam.h"

namespace pymend {

template <int BLOCK, bool WHOLE>
__device__ __forceinline__ void factored_adam_tile(const FactoredAdam& f, OuterTileShared<float, BLOCK>& shared) {
  using Tile = OuterTile<float, BLOCK>;
  constexpr int EACH = Tile::EACH, HALVES = Tile::HALVES;
  const unsigned tiles_across = static_cast<unsigned>(Tile::across(f.cols));  // no more than a grid has blocks
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / tiles_across) * Tile::ROWS;
  const int64_t col0 = static_cast<int64_t>(blockIdx.x % tiles_across) * Tile::COLS;
  call_for_tile<Tile, BLOCK>(f.param, f.rows, f.cols, row0, col0);
  call_for_tile<Tile, BLOCK>(f.exp_avg, f.rows, f.cols, row0, col0);
  call_for_tile<Tile, BLOCK>(f.exp_avg_sq, f.rows, f.cols, row0, col0);

  float sum[EACH][EACH] = {};
  outer_tile<BLOCK, WHOLE>(f.left, f.right, f.rows, f.cols, f.n, row0, col0, shared, sum);

  const float scale = *f.scale;
  int inside[HALVES];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) inside[half] = columns_inside(col0 + Tile::col(half), f.cols);
#pragma unroll
  for (int r = 0; r < EACH; ++r) {
    const int64_t row = row0 + Tile::row(r / 4) + r % 4, at = row * f.cols + col0 + Tile::col(0);
    if (row < f.rows) {
      Four<float> param[HALVES], exp_avg[HALVES], exp_avg_sq[HALVES];  // all on their way before the first is needed
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int64_t place = at + half * Tile::APART;
        param[half] = load_group<WHOLE>(f.param + place, inside[half]);
        exp_avg[half] = load_group<WHOLE>(f.exp_avg + place, inside[half]);
        exp_avg_sq[half] = load_group<WHOLE>(f.exp_avg_sq + place, inside[half]);
      }
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          adam_element(f.step, scale * sum[r][4 * half + i], param[half].of[i], exp_avg[half].of[i],
                       exp_avg_sq[half].of[i]);
        }
        const int64_t place = at + half * Tile::APART;
        store_group<WHOLE>(f.param + place, inside[half], param[half]);
        store_group<WHOLE>(f.exp_avg + place, inside[half], exp_avg[half]);
        store_group<WHOLE>(f.exp_avg_sq + place, inside[half], exp_avg_sq[half]);
      }
    }
  }
}

template <int BLOCK>
__global__ void __launch_bounds__(BLOCK, 2) factored_adam_kernel(const __grid_constant__ FactoredAdam f) {
  auto& shared = shared_memory<OuterTileShared<float, BLOCK>>();
  if (groups_are_whole(f.left, f.rows) && groups_are_whole(f.right, f.cols) && groups_are_whole(f.param, f.cols) &&
      groups_are_whole(f.exp_avg, f.cols) && groups_are_whole(f.exp_avg_sq, f.cols)) {
    factored_adam_tile<BLOCK, true>(f, shared);
  } else {
    factored_adam_tile<BLOCK, false>(f, shared);
  }
}

}  // namespace pymend
