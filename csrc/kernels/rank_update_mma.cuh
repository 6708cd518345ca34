// rank_update on tensor cores, for bfloat16 and float16 weights with more than FEW rows of factors.
//
// Formula    math/rank_update.h. Every factor is the sum of two bfloat16 (16 bits of mantissa), multiplied as hi hi +
//            hi lo + lo hi with float accumulation.
// Layout     pack_factors_kernel writes both factors once, split and in the order in which the lanes of a product hold
//            them, so that all blocks load them 16 bytes a lane, without shared memory and without splitting again. In
//            rank_update_mma_kernel a warp owns 32 x 64 elements, a block goes down a strip of such tiles, whose
//            columns' factors it finds in L1. Columns are dealt to the products so that a lane holds 8 neighbours:
//            weights are read and written 16 bytes a lane, and read one tile ahead, during the product before.
//            Up to HELD rows of factors, rank_update_strip_kernel keeps those of its columns in registers for the whole
//            strip, and so reads only those of its rows again; weights are read AHEAD turns of 16 rows before. Edges
//            would take more registers than there are, as would float16 and random bits: it is for bfloat16, rounded to
//            nearest, and for sides that are multiples of 32 and 64.
// Bytes      4 per element of W; 4 n (rows + columns) for the packed factors, written once; a strip reads 4 n (its rows
//            for each pair of warps, or for each, + its columns) from L2.
// Caller     Operands as in RankUpdate<T>, no two weights overlapping; `packed` has room for first[count] units; blockDim =
//            BLOCK; shared memory of RankUpdateMmaShared; `partial` holds one Kept per tile; pack_factors_kernel before
//            and fidelity_kernel afterwards, same stream; the first by launch(), the others may be launched early.
#pragma once

#include <cmath>

#include "device.h"
#include "math/rank_update.h"

namespace pymend {

// A unit of packed factors: 16 rows (or columns) of W by 16 rows of factors, [part][lane][4 words].
constexpr int UNIT = 16;
constexpr int PARTS = 2;                             // high and low
constexpr int UNIT_WORDS = PARTS * UNIT * UNIT / 2;  // a word has two neighbours along the rows of factors

struct PackedFactors {
  uint32_t* words;
  int64_t first[MAX_MATRICES + 1];  // units before those of each matrix, which are [row or column / 16][step]
  int64_t least_steps;              // of a matrix; those past its rows of factors are zeros

  PYMEND_INLINE int matrix_of(int64_t unit) const {
    int i = 0;
    while (unit >= first[i + 1]) ++i;
    return i;
  }
  PYMEND_INLINE int64_t steps_of(int64_t n) const {
    const int64_t steps = ceil_div(n, UNIT);
    return steps < least_steps ? least_steps : steps;
  }
};

// Whole tiles of a warp.
PYMEND_INLINE int64_t row_units(int64_t rows) { return ceil_div(rows, 32) * 32 / UNIT; }
PYMEND_INLINE int64_t col_units(int64_t cols) { return ceil_div(cols, 64) * 64 / UNIT; }

// Where each matrix of the list has its units; words is left to the caller.
template <typename T>
PackedFactors place_factors(const RankUpdateList<T>& list, int64_t least_steps) {
  PackedFactors packed{};
  packed.least_steps = least_steps;
  for (int i = 0; i < list.count; ++i) {
    const RankUpdate<T>& m = list.item[i];
    packed.first[i + 1] = packed.first[i] + (row_units(m.rows) + col_units(m.cols)) * packed.steps_of(m.n);
  }
  return packed;
}

// One warp per unit. With g = lane / 4, t = lane % 4 a lane packs, for rows of W, the words (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4) of [row][pair of k], as device.h's a; for columns two b, whose column g is that of lane g's
// place in the eight neighbours that each four lanes share.
template <typename T, int BLOCK>
__global__ void pack_factors_kernel(const __grid_constant__ RankUpdateList<T> list,
                                    const __grid_constant__ PackedFactors packed) {
  let_next_start();
  const int64_t unit = int64_t(blockIdx.x) * (BLOCK / WARP) + threadIdx.x / WARP;
  if (unit >= packed.first[list.count]) return;
  const int index = packed.matrix_of(unit), lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const RankUpdate<T>& m = list.item[index];
  const int64_t steps = packed.steps_of(m.n), step = (unit - packed.first[index]) % steps;
  const int64_t block = (unit - packed.first[index]) / steps, rows = row_units(m.rows);
  const bool of_rows = block < rows;
  const float* factor = of_rows ? m.row : m.col;
  const int64_t width = of_rows ? m.rows : m.cols;
  Four<uint32_t> high = {}, low = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = of_rows ? block * UNIT + i % 2 * 8 + g
                               : (block - rows) / 2 * 32 + g / 2 * 8 + ((block - rows) % 2 * 2 + i / 2) * 2 + g % 2;
    const int64_t k = step * UNIT + (of_rows ? i / 2 : i % 2) * 8 + 2 * t;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float x = k + side < m.n && at < width ? factor[(k + side) * width + at] : 0.0f;
      const Bf16 part = round_to<Bf16>(x);
      high.of[i] |= static_cast<uint32_t>(part.bits) << (16 * side);
      low.of[i] |= static_cast<uint32_t>(round_to<Bf16>(x - widen(part)).bits) << (16 * side);
    }
  }
  auto* to = reinterpret_cast<Four<uint32_t>*>(packed.words + unit * UNIT_WORDS) + lane;
  to[0] = high;
  to[WARP] = low;
}

// Tile of a block: 32 x 64 elements for each warp, two warps side by side where there are two.
template <int BLOCK>
struct MmaTile {
  static constexpr int WARPS = BLOCK / WARP;
  static constexpr int ACROSS = WARPS == 1 ? 1 : 2;
  static constexpr int COLS = 64 * ACROSS;
  static constexpr int ROWS = 32 * WARPS / ACROSS;
};

template <int BLOCK>
struct RankUpdateMmaShared {
  double scratch[BLOCK / WARP];
};

// Eight neighbours of a row of W as words of two; only the first `inside` are W's, the others zeros. `whole`: all rows of
// W are cut at 16 bytes.
template <typename T>
__device__ __forceinline__ Four<uint32_t> load_eight(const T* from, int inside, bool whole) {
  Four<uint32_t> words = {};
  if (inside <= 0) return words;
  if (whole) return load_once(from);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < inside) words.of[i / 2] |= static_cast<uint32_t>(from[i].bits) << (16 * (i % 2));
  }
  return words;
}

template <typename T>
__device__ __forceinline__ T element(const Four<uint32_t>& words, int i) {
  return {static_cast<uint16_t>(words.of[i / 2] >> (16 * (i % 2)))};
}

// Adds `wanted` to eight neighbours and writes them back. `position`: of the first in its matrix.
template <bool RANDOM, typename T>
__device__ __forceinline__ void update_eight(T* to, int inside, bool whole, const Four<uint32_t>& before,
                                             const float (&wanted)[8], uint64_t seed, int64_t position,
                                             ThreadKept<float>& kept) {
  if (inside <= 0) return;
  Four<uint32_t> words = {};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float old[2] = {widen(element<T>(before, i)), widen(element<T>(before, i + 1))};
    const float sum[2] = {old[0] + wanted[i], old[1] + wanted[i + 1]};
    if constexpr (RANDOM) {
      words.of[i / 2] = round_randomly<T>(sum[0], random_bits(seed, position + i)).bits |
                        static_cast<uint32_t>(round_randomly<T>(sum[1], random_bits(seed, position + i + 1)).bits) << 16;
    } else {
      words.of[i / 2] = round_pair<T>(sum[0], sum[1]);
    }
    // Past the edge there are zeros, and none is wanted.
    kept.add(widen(element<T>(words, i)) - old[0], wanted[i]);
    kept.add(widen(element<T>(words, i + 1)) - old[1], wanted[i + 1]);
  }
  if (whole) return store_once(to, words);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < inside) to[i] = element<T>(words, i);
  }
}

// All three parts of a product of two sums; the smallest first.
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const Four<uint32_t> (&a)[PARTS],
                                               const Four<uint32_t> (&b)[PARTS], int half) {
  const uint32_t high[2] = {b[0].of[half * 2], b[0].of[half * 2 + 1]};
  const uint32_t low[2] = {b[1].of[half * 2], b[1].of[half * 2 + 1]};
  mma_bf16(sum, a[0].of, low);
  mma_bf16(sum, a[1].of, high);
  mma_bf16(sum, a[0].of, high);
}

template <typename T, int BLOCK, bool RANDOM>
__global__ void __launch_bounds__(BLOCK, (RANDOM ? 256 : 384) / BLOCK)
    rank_update_mma_kernel(const __grid_constant__ RankUpdateList<T> list,
                           const __grid_constant__ PackedFactors packed, const float* alpha, int strip, Kept* partial) {
  using Tile = MmaTile<BLOCK>;
  auto& shared = shared_memory<RankUpdateMmaShared<BLOCK>>();
  const int64_t tile = blockIdx.x;
  const int index = list.matrix_of(tile);
  const RankUpdate<T>& m = list.item[index];
  const int64_t tiles_across = ceil_div(m.cols, Tile::COLS);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t row = (tile - m.first_tile) / tiles_across * (Tile::ROWS * strip) + warp / Tile::ACROSS * 32;
  const int64_t col = (tile - m.first_tile) % tiles_across * Tile::COLS + warp % Tile::ACROSS * 64;
  // Of this lane in the products: rows g and g + 8 of 16, eight columns of each 32.
  const int g = lane / 4, along = lane % 4 * 8;
  const bool whole = m.cols % 8 == 0 && reinterpret_cast<uintptr_t>(m.weight) % 16 == 0;
  const int64_t steps = packed.steps_of(m.n), place = (row + g) * m.cols + col + along;
  const auto* factors = reinterpret_cast<const Four<uint32_t>*>(packed.words + packed.first[index] * UNIT_WORDS) + lane;
  const auto* of_rows = factors + row / UNIT * steps * PARTS * WARP;
  const auto* of_cols = factors + (row_units(m.rows) + col / UNIT) * steps * PARTS * WARP;
  const float step = -alpha[m.index];
  // W's rows and columns from this lane's first on.
  int64_t down = m.rows - row - g;
  let_next_start();
  const int right = static_cast<int>(m.cols - col < 64 ? m.cols - col : 64) - along;

  Kept kept;
  if (col < m.cols) {
    T* weight = m.weight + place;
    Four<uint32_t> before[8];  // [16 rows][8 rows][32 columns]
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      before[i] = load_eight(weight + i / 2 * 8 * m.cols + i % 2 * 32, i / 2 * 8 < down ? right - i % 2 * 32 : 0, whole);
    }
    await_former();  // for the factors, not for the weights
    for (int turn = 0; turn < strip && down > -g; ++turn) {
      float sum[2][8][4] = {};  // [16 rows][8 columns][what a lane holds of a product]
      for (int64_t s = 0; s < steps; ++s) {
        Four<uint32_t> a[2][PARTS];
#pragma unroll
        for (int i = 0; i < 2 * PARTS; ++i) {
          a[i / PARTS][i % PARTS] = of_rows[((i / PARTS * steps + s) * PARTS + i % PARTS) * WARP];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Four<uint32_t> b[PARTS];
#pragma unroll
          for (int part = 0; part < PARTS; ++part) b[part] = of_cols[((j * steps + s) * PARTS + part) * WARP];
#pragma unroll
          for (int i = 0; i < 4; ++i) multiply_parts(sum[i / 2][2 * j + i % 2], a[i / 2], b, i % 2);
        }
      }

      float largest = 0;
#pragma unroll
      for (int i = 0; i < 64; ++i) largest = fmaxf(largest, fabsf(sum[i / 32][i / 4 % 8][i % 4]));
      ThreadKept<float> own(fabsf(step) * largest);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float wanted[8];  // two from each of four products
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          wanted[e] = step * sum[i / 4][i % 2 * 4 + e / 2][i / 2 % 2 * 2 + e % 2];
        }
        T* at = weight + i / 2 * 8 * m.cols + i % 2 * 32;
        const int inside = right - i % 2 * 32;
        update_eight<RANDOM>(at, i / 2 * 8 < down ? inside : 0, whole, before[i], wanted, m.seed, at - m.weight, own);
        if (turn + 1 < strip) {
          before[i] = load_eight(at + Tile::ROWS * m.cols, Tile::ROWS + i / 2 * 8 < down ? inside : 0, whole);
        }
      }
      kept.add(own.kept());
      weight += Tile::ROWS * m.cols;
      of_rows += Tile::ROWS / UNIT * steps * PARTS * WARP;
      down -= Tile::ROWS;
    }
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) partial[tile] = kept;
}

// Strips of few rows of factors: warps lie side by side, and a turn takes 16 rows.
constexpr int HELD_STEPS = 2, HELD = HELD_STEPS * UNIT;
constexpr int AHEAD = 2;  // turns

template <int BLOCK>
constexpr int STRIP_COLS = 64 * (BLOCK / WARP);

// Whether a strip can take a matrix.
template <typename T>
bool fits_strip(const RankUpdate<T>& m, bool random) {
  const bool whole = m.rows % (AHEAD * UNIT) == 0 && m.cols % 64 == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(m.weight) % 16 == 0;
  return std::is_same<T, Bf16>::value && !random && m.n <= HELD && whole && aligned;
}

// This lane's weights of a turn, [8 rows][32 columns].
__device__ __forceinline__ void load_turn(Four<uint32_t> (&to)[4], const Bf16* from, int64_t cols) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = load_once(from + i / 2 * 8 * cols + i % 2 * 32);
}

// `turns`: of a strip, a multiple of AHEAD. Only for matrices that fits_strip() takes.
template <int BLOCK>
__global__ void __launch_bounds__(BLOCK, 384 / BLOCK)
    rank_update_strip_kernel(const __grid_constant__ RankUpdateList<Bf16> list,
                             const __grid_constant__ PackedFactors packed, const float* alpha, int turns,
                             Kept* partial) {
  auto& shared = shared_memory<RankUpdateMmaShared<BLOCK>>();
  const int64_t tile = blockIdx.x;
  const int index = list.matrix_of(tile);
  const RankUpdate<Bf16>& m = list.item[index];
  const int64_t tiles_across = ceil_div(m.cols, STRIP_COLS<BLOCK>);
  const int lane = threadIdx.x % WARP;
  const int64_t row = (tile - m.first_tile) / tiles_across * (UNIT * turns);
  const int64_t col = (tile - m.first_tile) % tiles_across * STRIP_COLS<BLOCK> + threadIdx.x / WARP * 64;
  constexpr int STEPS = HELD_STEPS;
  const auto* factors = reinterpret_cast<const Four<uint32_t>*>(packed.words + packed.first[index] * UNIT_WORDS) + lane;
  const auto* of_rows = factors + row / UNIT * STEPS * PARTS * WARP;
  const auto* of_cols = factors + (row_units(m.rows) + col / UNIT) * STEPS * PARTS * WARP;
  const float step = -alpha[m.index];
  // Of this lane in the products: rows g and g + 8 of 16, eight columns of each 32.
  Bf16* weight = m.weight + (row + lane / 4) * m.cols + col + lane % 4 * 8;
  const int last = static_cast<int>(m.rows - row < UNIT * turns ? (m.rows - row) / UNIT : turns);
  let_next_start();

  Kept kept;
  if (col < m.cols) {
    Four<uint32_t> before[AHEAD][4], a[STEPS][PARTS], b[STEPS][4][PARTS];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) load_turn(before[k], weight + k * UNIT * m.cols, m.cols);
    await_former();  // for the factors, not for the weights
#pragma unroll
    for (int i = 0; i < STEPS * PARTS; ++i) {
      a[i / PARTS][i % PARTS] = of_rows[i * WARP];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[i / PARTS][j][i % PARTS] = of_cols[(j * STEPS * PARTS + i) * WARP];
    }
    for (int turn = 0; turn < last; turn += AHEAD) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        float sum[8][4] = {};  // [8 columns][what a lane holds of a product]
#pragma unroll
        for (int i = 0; i < STEPS * 8; ++i) multiply_parts(sum[i % 8], a[i / 8], b[i / 8][i % 8 / 2], i % 2);
        of_rows += STEPS * PARTS * WARP;
        if (turn + k + 1 < last) {  // factors of the next turn
#pragma unroll
          for (int i = 0; i < STEPS * PARTS; ++i) a[i / PARTS][i % PARTS] = of_rows[i * WARP];
        }

        float largest = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(sum[i / 4][i % 4]));
        ThreadKept<float> own(fabsf(step) * largest);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float wanted[8];  // two from each of four products
#pragma unroll
          for (int e = 0; e < 8; ++e) wanted[e] = step * sum[i % 2 * 4 + e / 2][i / 2 * 2 + e % 2];
          Bf16* at = weight + i / 2 * 8 * m.cols + i % 2 * 32;
          update_eight<false>(at, 8, true, before[k][i], wanted, m.seed, at - m.weight, own);
        }
        kept.add(own.kept());
        if (turn + AHEAD < last) load_turn(before[k], weight + AHEAD * UNIT * m.cols, m.cols);
        weight += UNIT * m.cols;
      }
    }
  }
  kept.along = block_sum<BLOCK>(kept.along, shared.scratch);
  kept.wanted = block_sum<BLOCK>(kept.wanted, shared.scratch);
  if (threadIdx.x == 0) partial[tile] = kept;
}

}  // namespace pymend
