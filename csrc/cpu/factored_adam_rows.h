// A block of one matrix, compiled once per level of x86-64.
#pragma once

#include "cpu/levels.h"
#include "math/factored_adam.h"

namespace pymend {

// Factors are packed into panels, [n][PANEL_ROWS] of left and [n][PANEL_COLS] of right, filled up with zeros: the
// product reads memory in order, and has no tails.
constexpr int PANEL_ROWS = 8;   // 8 x 3 vectors of sums and 3 of `right` fill the 32 registers of AVX-512
constexpr int PANEL_COLS = 48;  // 3 vectors of AVX-512, 6 of AVX2, 12 of SSE
constexpr int SPAN = 10;        // panels of columns worked on together: their sums, 15 KiB, stay in L1

// Rows [begin, end) and columns [col, col + SPAN * PANEL_COLS) of the parameter and its moments. `left` and `right`
// are the first panels of those rows and columns; begin is a multiple of PANEL_ROWS, col of PANEL_COLS.
using AdamBlock = void (*)(const FactoredAdam& f, const float* left, const float* right, int64_t begin, int64_t end,
                           int64_t col);

PYMEND_IN_EVERY_LEVEL(
    void adam_block(const FactoredAdam& f, const float* left, const float* right, int64_t begin, int64_t end,
                    int64_t col);)

}  // namespace pymend
