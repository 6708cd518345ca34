// The inner loops of factored_adam on a CPU: a product with all of its terms summed in registers, then Adam in place.
//
// CMake compiles this file once per level, with PYMEND_LEVEL and that level's flags. It includes math/ only: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for everyone.
#include "cpu/factored_adam_rows.h"

namespace pymend {
namespace PYMEND_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // floats of a vector register; rows whose sums are held in registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4;
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int WIDE = 3;  // vectors side by side: each load of `left` is used three times, of `right` ROWS times
constexpr int WIDTH = SPAN * PANEL_COLS;
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// sum[r][j] = sum_k left[k][r] * right[k][j] for ROWS rows and WIDE * LANES columns
PYMEND_INLINE void product_lanes(const float* left, const float* right, int64_t n, float (*sum)[WIDTH], int col) {
  Lanes total[ROWS][WIDE] = {};
  for (int64_t k = 0; k < n; ++k, left += PANEL_ROWS, right += PANEL_COLS) {
    Lanes b[WIDE];
    for (int w = 0; w < WIDE; ++w) b[w] = *reinterpret_cast<const Lanes*>(right + w * LANES);
    for (int r = 0; r < ROWS; ++r) {
      for (int w = 0; w < WIDE; ++w) total[r][w] += left[r] * b[w];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int w = 0; w < WIDE; ++w) *reinterpret_cast<Lanes*>(sum[r] + col + w * LANES) = total[r][w];
  }
}

PYMEND_INLINE void adam_row(const FactoredAdam& f, int64_t at, const float* sum, int width) {
  const AdamStep step = f.step;
  const float scale = *f.scale;
  float* param = f.param + at;
  float* exp_avg = f.exp_avg + at;
  float* exp_avg_sq = f.exp_avg_sq + at;
#pragma omp simd
  for (int j = 0; j < width; ++j) adam_element(step, scale * sum[j], param[j], exp_avg[j], exp_avg_sq[j]);
}

}  // namespace

void adam_block(const FactoredAdam& f, const float* left, const float* right, int64_t begin, int64_t end, int64_t col) {
  const int width = static_cast<int>(f.cols - col < WIDTH ? f.cols - col : WIDTH);
  float sum[PANEL_ROWS][WIDTH];
  for (int64_t row = begin; row < end; row += PANEL_ROWS, left += f.n * PANEL_ROWS) {
    const int rows = static_cast<int>(end - row < PANEL_ROWS ? end - row : PANEL_ROWS);
    for (int j = 0; j < width; j += PANEL_COLS) {
      const float* panel = right + f.n * j;
      for (int r = 0; r < PANEL_ROWS; r += ROWS) {
        for (int c = 0; c < PANEL_COLS; c += WIDE * LANES) {
          product_lanes(left + r, panel + c, f.n, sum + r, j + c);
        }
      }
    }
    for (int r = 0; r < rows; ++r) adam_row(f, (row + r) * f.cols + col, sum[r], width);
  }
}

}  // namespace PYMEND_LEVEL
}  // namespace pymend
