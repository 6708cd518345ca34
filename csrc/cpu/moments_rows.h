// Columns of the joined rows, compiled once per level of x86-64: a wheel assumes none, the level is chosen at run time.
#pragma once

#include "math/moments.h"

namespace pymend {

constexpr int SPAN = 64;  // columns of one unit of work: a segment of 20 rows, read three times, stays in L1

template <typename T, typename O>
struct MomentsTask {
  const Segment<T>* segments;
  int64_t segment_count;
  const uint8_t* live;  // per row of z
  const int64_t* kept;  // live rows of each segment
  int64_t a, b;
  double* mean;  // [a + b]
  double* m2;
  int64_t seen;  // rows in the moments before the first segment
  bool merge;
  O* z;  // [rows, a + b]
};

// Merges and normalises columns [begin, begin + width), all of u or all of delta; width is SPAN at most.
template <typename T, typename O>
using NormaliseColumns = void (*)(const MomentsTask<T, O>& task, int64_t begin, int width);

#define PYMEND_DECLARE_LEVEL(level)                                                             \
  namespace level {                                                                             \
  void normalise_columns(const MomentsTask<float, float>& task, int64_t begin, int width);      \
  void normalise_columns(const MomentsTask<float, double>& task, int64_t begin, int width);     \
  void normalise_columns(const MomentsTask<double, float>& task, int64_t begin, int width);     \
  void normalise_columns(const MomentsTask<double, double>& task, int64_t begin, int width);    \
  }
PYMEND_DECLARE_LEVEL(base)
PYMEND_DECLARE_LEVEL(avx2)
PYMEND_DECLARE_LEVEL(avx512)
#undef PYMEND_DECLARE_LEVEL

}  // namespace pymend
