// Rows of one matrix, compiled once per level of x86-64.
#pragma once

#include "cpu/levels.h"
#include "math/rank_update.h"

namespace pymend {

// How a matrix is updated, but for its operands: W += step * sum_k row_k col_k^T.
struct RowsStep {
  float step;
  float scale;  // a power of two that brings the largest change near 1: squares of tiny ones leave a float's range
  bool random;
};

constexpr int TILE = 16;  // rows of one unit of work: a multiple of the four that are computed together

// Updates rows [begin, end) of a weight, at most TILE. What was kept is counted in units of 1 / scale.
// `packed` is room for [n, TILE].
template <typename T>
using UpdateRows = Kept (*)(const RankUpdate<T>& matrix, RowsStep how, int64_t begin, int64_t end, float* packed);

// A bound of |sum_k row_k col_k^T|.
template <typename T>
using LargestChange = float (*)(const RankUpdate<T>& matrix);

PYMEND_IN_EVERY_LEVEL(
    template <typename T>
    Kept update_rows(const RankUpdate<T>& matrix, RowsStep how, int64_t begin, int64_t end, float* packed);
    template <typename T>
    float largest_change(const RankUpdate<T>& matrix);)

}  // namespace pymend
