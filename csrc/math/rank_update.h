// rank_update: one element, the operands of one matrix, and the list of tiles that all matrices are cut into.
//
//   W[i, j] <- round(W[i, j] + wanted),   wanted = -alpha * sum_k row[k, i] * col[k, j]
//
// `row` and `col` are delta and u for a Linear weight (out x in), u and delta for a Conv1D weight (in x out): the
// layout is settled when the operands are gathered, and no code below knows of it.
#pragma once

#include "math/ceil_div.h"
#include "math/rounding.h"

namespace pymend {

// How much of a wanted change survived the rounding: fidelity = <applied, wanted> / |wanted|^2.
// In double, because the squares of a small update leave the range of a float.
struct Kept {
  double along = 0;   // <applied, wanted>
  double wanted = 0;  // |wanted|^2

  PYMEND_INLINE void add(double applied_, double wanted_) {
    along += applied_ * wanted_;
    wanted += wanted_ * wanted_;
  }
  PYMEND_INLINE void add(const Kept& other) {
    along += other.along;
    wanted += other.wanted;
  }
  // Nothing wanted, nothing lost: 1.
  PYMEND_INLINE double fidelity() const { return wanted > 0 ? along / wanted : 1.0; }
};

// Kept of a few elements, in float: on a GPU, to make doubles of all would take as long as a product of many rows.
// `wanted` is scaled by the power of two that brings the largest near 1, so that no square leaves the range of a float.
template <typename T>
struct ThreadKept {
  float along = 0, wanted = 0, scale, back;  // scale * back = 1

  PYMEND_INLINE explicit ThreadKept(float largest) {
    const uint32_t exponent = to_bits(largest) >> 23;
    const uint32_t near = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;  // scale and back are normal numbers
    scale = from_bits((254 - near) << 23);
    back = from_bits(near << 23);
  }
  PYMEND_INLINE void add(float applied_, float wanted_) {
    const float scaled = wanted_ * scale;
    along += applied_ * scaled;
    wanted += scaled * scaled;
  }
  PYMEND_INLINE Kept kept() const {
    const double unit = back;
    return {along * unit, wanted * unit * unit};
  }
};
template <>
struct ThreadKept<double> {
  Kept sums;

  PYMEND_INLINE explicit ThreadKept(double) {}
  PYMEND_INLINE void add(double applied, double wanted) { sums.add(applied, wanted); }
  PYMEND_INLINE Kept kept() const { return sums; }
};

// Adds `wanted` to the weight at `position` of its matrix with one rounding; returns what was really added.
template <bool RANDOM, typename T>
PYMEND_INLINE Acc<T> update_element(T& weight, Acc<T> wanted, uint64_t seed, int64_t position) {
  const Acc<T> before = widen(weight);
  if constexpr (RANDOM) {
    weight = round_randomly<T>(before + wanted, random_bits(seed, static_cast<uint64_t>(position)));
  } else {
    weight = round_to<T>(before + wanted);
  }
  return widen(weight) - before;
}

template <typename T>
struct RankUpdate {
  T* weight;          // [rows, cols], contiguous
  const Acc<T>* row;  // [n, rows], contiguous
  const Acc<T>* col;  // [n, cols], contiguous
  int64_t rows, cols, n;
  int64_t index;       // in the caller's list: of its alpha and its fidelity
  int64_t first_tile;  // of this matrix in the list
  uint64_t seed;       // of a random rounding
};

// Passed to a kernel by value: 32 matrices of 72 bytes stay below the 4 KiB of kernel arguments, and a by-value list
// needs no copy to the device, so a launch can be captured in a graph.
constexpr int MAX_MATRICES = 32;

template <typename T>
struct RankUpdateList {
  RankUpdate<T> item[MAX_MATRICES];
  int count = 0;
  int64_t tiles = 0;

  PYMEND_INLINE int64_t end_tile(int i) const { return i + 1 < count ? item[i + 1].first_tile : tiles; }

  // The matrix that a tile belongs to. A matrix without elements has no tile and is passed over.
  PYMEND_INLINE int matrix_of(int64_t tile) const {
    int i = 0;
    while (tile >= end_tile(i)) ++i;
    return i;
  }
};

// Appends a matrix cut into tiles of tile_rows x tile_cols. The caller keeps count below MAX_MATRICES.
template <typename T>
void append(RankUpdateList<T>& list, RankUpdate<T> matrix, int64_t tile_rows, int64_t tile_cols) {
  matrix.first_tile = list.tiles;
  list.tiles += ceil_div(matrix.rows, tile_rows) * ceil_div(matrix.cols, tile_cols);
  list.item[list.count++] = matrix;
}

}  // namespace pymend
