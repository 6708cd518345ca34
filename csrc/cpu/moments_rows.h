// Columns of the joined rows, compiled once per level of x86-64.
#pragma once

#include "cpu/levels.h"
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

PYMEND_IN_EVERY_LEVEL(
    template <typename T, typename O>
    void normalise_columns(const MomentsTask<T, O>& task, int64_t begin, int width);)

}  // namespace pymend
