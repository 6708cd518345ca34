// moments: running mean and squared deviations per column, and the rows that are normalised with them.
//
// Chan, Golub, LeVeque: of two sets of k and n rows with means p and q and squared deviations P and Q, the union has
//   mean = p + (q - p) n / (k + n),   m2 = P + Q + (q - p)^2 k n / (k + n)
// All in double, whatever the rows are: the moments run over a whole training.
#pragma once

#include <cmath>

#include "math/rounding.h"

namespace pymend {

constexpr double EPSILON = 1e-7;   // added to the standard deviation, not under the root
constexpr double CONSTANT = 1e-6;  // relative spread below which a column counts as constant

// Of one column.
struct ColumnMoments {
  double mean = 0, m2 = 0;

  // Takes in n rows (n > 0) of their own moments; k rows are in already.
  PYMEND_INLINE void merge(double k, double n, double other_mean, double other_m2) {
    const double difference = other_mean - mean;
    m2 += other_m2 + difference * difference * (k * n / (k + n));
    mean += difference * (n / (k + n));
  }

  // 1 / (sigma + EPSILON) after k rows; 0 for a constant column.
  PYMEND_INLINE double inverse(double k) const {
    const double spread = CONSTANT * mean;
    const double sigma = sqrt(m2 / (k > 1 ? k - 1 : 1.0));
    return m2 <= k * (spread * spread) ? 0.0 : 1 / (sigma + EPSILON);
  }
};

// The rows of one weight in one episode.
template <typename T>
struct Segment {
  const T* u;      // [rows, a], contiguous
  const T* delta;  // [rows, b], contiguous
  int64_t rows;
  int64_t first;  // row of z
};

// A column of the joined rows (u, delta) in one segment.
template <typename T>
struct Column {
  const T* at;  // its element in the first row
  int64_t step;

  PYMEND_INLINE Column(const Segment<T>& segment, int64_t a, int64_t b, int64_t column)
      : at(column < a ? segment.u + column : segment.delta + (column - a)), step(column < a ? a : b) {}
};

}  // namespace pymend
