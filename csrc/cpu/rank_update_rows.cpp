// The inner loops of rank_update on a CPU: widen, multiply-add in float, round once.
//
// CMake compiles this file once per level, with PYMEND_LEVEL and that level's flags. It includes math/ only: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for everyone.
#include "cpu/rank_update_rows.h"

namespace pymend {
namespace PYMEND_LEVEL {
namespace {

constexpr int ROWS = 4;    // rows computed together: each load of `col` is used four times
constexpr int SPAN = 256;  // columns computed together: the sums, 4 KiB, stay in L1
#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats of a vector register
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PAIR = 2;  // vectors side by side: 8 chains of multiply-adds hide their latency
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// Copies `row` of rows [begin, end) to packed [n, TILE]: in place, a column of it falls into one set of the L1 cache if
// m.rows is a multiple of 1024. Past the end the last row again, computed and not used.
template <typename T>
PYMEND_INLINE void pack(const RankUpdate<T>& m, int64_t begin, int64_t end, float* packed) {
  for (int64_t k = 0; k < m.n; ++k) {
    const float* row = m.row + k * m.rows;
    for (int r = 0; r < TILE; ++r) packed[k * TILE + r] = row[begin + r < end ? begin + r : end - 1];
  }
}

// sum[r][j] = sum_k row[k, r] * col[k, col0 + j] for j in [j0, j0 + WIDE * LANES); `row` is packed.
template <int WIDE, typename T>
PYMEND_INLINE void product_lanes(const RankUpdate<T>& m, const float* row, int64_t col0, int j0, float (*sum)[SPAN]) {
  Lanes total[ROWS][WIDE] = {};
  const float* col = m.col + col0 + j0;
  for (int64_t k = 0; k < m.n; ++k, row += TILE, col += m.cols) {
    for (int r = 0; r < ROWS; ++r) {
      for (int w = 0; w < WIDE; ++w) total[r][w] += row[r] * *reinterpret_cast<const Lanes*>(col + w * LANES);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int w = 0; w < WIDE; ++w) *reinterpret_cast<Lanes*>(sum[r] + j0 + w * LANES) = total[r][w];
  }
}

template <typename T>
PYMEND_INLINE void product(const RankUpdate<T>& m, const float* row, int64_t col0, int width, float (*sum)[SPAN]) {
  int j = 0;
  for (; j + PAIR * LANES <= width; j += PAIR * LANES) product_lanes<PAIR>(m, row, col0, j, sum);
  for (; j + LANES <= width; j += LANES) product_lanes<1>(m, row, col0, j, sum);
  for (; j < width; ++j) {
    for (int r = 0; r < ROWS; ++r) {
      float total = 0;
      for (int64_t k = 0; k < m.n; ++k) total += row[k * TILE + r] * m.col[k * m.cols + col0 + j];
      sum[r][j] = total;
    }
  }
}

template <bool RANDOM, typename T>
PYMEND_INLINE Kept round_row(T* weight, const float* sum, RowsStep how, int width, uint64_t seed, int64_t position) {
  float along = 0, wanted2 = 0;  // of at most SPAN terms: as good as double, and twice as fast
  const float scaled_step = how.step * how.scale;
#pragma omp simd reduction(+ : along, wanted2)
  for (int j = 0; j < width; ++j) {
    const float scaled = scaled_step * sum[j];
    along += update_element<RANDOM>(weight[j], how.step * sum[j], seed, position + j) * scaled;
    wanted2 += scaled * scaled;
  }
  return {along * static_cast<double>(how.scale), wanted2};
}

// Calls for the weights that follow the product, so that they come from memory while it is formed.
template <typename T>
PYMEND_INLINE void fetch(const T* weight, int width) {
  constexpr int LINE = 64 / sizeof(T);
  for (int j = 0; j < width; j += LINE) __builtin_prefetch(weight + j, 1);
}

template <bool RANDOM, typename T>
PYMEND_INLINE Kept update(const RankUpdate<T>& m, RowsStep how, int64_t begin, int64_t end, float* packed) {
  Kept kept;
  float sum[ROWS][SPAN];
  pack(m, begin, end, packed);
  for (int64_t col = 0; col < m.cols; col += SPAN) {
    const int width = static_cast<int>(m.cols - col < SPAN ? m.cols - col : SPAN);
    for (int64_t row = begin; row < end; row += ROWS) {
      for (int r = 0; r < ROWS && row + r < end; ++r) fetch(m.weight + (row + r) * m.cols + col, width);
      product(m, packed + (row - begin), col, width, sum);
      for (int r = 0; r < ROWS && row + r < end; ++r) {
        const int64_t position = (row + r) * m.cols + col;
        kept.add(round_row<RANDOM>(m.weight + position, sum[r], how, width, m.seed, position));
      }
    }
  }
  return kept;
}

PYMEND_INLINE float largest(const float* x, int64_t count) {
  float result = 0;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < count; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    result = result > size ? result : size;
  }
  return result;
}

template <typename T>
PYMEND_INLINE float bound(const RankUpdate<T>& m) {
  float sum = 0;
  for (int64_t k = 0; k < m.n; ++k) sum += largest(m.row + k * m.rows, m.rows) * largest(m.col + k * m.cols, m.cols);
  return sum;
}

}  // namespace

template <typename T>
Kept update_rows(const RankUpdate<T>& m, RowsStep how, int64_t begin, int64_t end, float* packed) {
  if constexpr (sizeof(T) == 2) {
    if (how.random) return update<true>(m, how, begin, end, packed);
  }
  return update<false>(m, how, begin, end, packed);
}

template <typename T>
float largest_change(const RankUpdate<T>& m) {
  return bound(m);
}

#define PYMEND_DEFINE(T)                                                                     \
  template Kept update_rows(const RankUpdate<T>&, RowsStep, int64_t, int64_t, float*);       \
  template float largest_change(const RankUpdate<T>&);
PYMEND_DEFINE(float)
PYMEND_DEFINE(Bf16)
PYMEND_DEFINE(Fp16)
#undef PYMEND_DEFINE

}  // namespace PYMEND_LEVEL
}  // namespace pymend
