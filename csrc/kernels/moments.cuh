// moments on a GPU: rows (u, delta) are merged into the running moments segment after segment, and normalised.
//
// Formula    math/moments.h (MEND, Mitchell et al. 2022, section 3.2), in double.
// Layout     live_rows_kernel: one block per row. moments_kernel: one thread per column walks the segments in order; it
//            reads a segment three times, from L1 or L2 after the first. Neighbouring threads read neighbouring columns.
//            Where nothing is merged, rows do not depend on each other: a thread takes ROWS_APART of its column, and
//            looks up their segment, since to walk through all of them would take longer than the rows.
//            A launch takes 120 segments; a further launch goes on with the moments that the last one wrote.
// Bytes      R (a + b) (2 sizeof(T) + sizeof(O)) for R rows, the second reading by and large from L2; 32 (a + b).
// Caller     Operands as in Segment<T>; blockDim = BLOCK; shared memory of LiveRowsShared for live_rows_kernel; `live`
//            holds a byte per row of z, `before` one number; live_rows_kernel first, both on one stream.
#pragma once

#include "device.h"
#include "math/moments.h"

namespace pymend {

// Passed to a kernel by value: 120 segments of 32 bytes stay below the 4 KiB of kernel arguments, and a by-value list
// needs no copy to the device, so no synchronisation, and a launch can be captured in a graph.
constexpr int MAX_SEGMENTS = 120;
constexpr int ROWS_APART = 8;

template <typename T>
struct SegmentList {  // of one segment at least
  Segment<T> item[MAX_SEGMENTS];
  int count = 0;
  int64_t a = 0, b = 0;

  // The last segment that does not begin after `row` of z, which has rows if any does.
  PYMEND_INLINE int segment_of(int64_t row) const {
    int found = 0;
    for (int step = 64; step > 0; step /= 2) {
      if (found + step < count && item[found + step].first <= row) found += step;
    }
    return found;
  }

  PYMEND_INLINE int64_t first() const { return item[0].first; }
  PYMEND_INLINE int64_t end() const { return item[count - 1].first + item[count - 1].rows; }
  // Grids of the two kernels: at least one block, which also copies count.
  int64_t row_blocks() const { return end() > first() ? end() - first() : 1; }
  PYMEND_INLINE int64_t across(int block) const { return (a + b + block - 1) / block; }
  int64_t column_blocks(int block, bool merge) const {
    return across(block) * (merge ? 1 : (end() - first()) / ROWS_APART + 1);
  }
};

// Of each warp, whether it met an element that is not zero, in u and in delta.
template <int BLOCK>
struct LiveRowsShared {
  int any[2][BLOCK / WARP];
};

// Whether this thread's share of row [0, width), or that of another lane, holds an element that is not zero.
template <int BLOCK, typename T>
__device__ __forceinline__ int warp_any_nonzero(const T* row, int64_t width) {
  int any = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < width; i += BLOCK) any |= row[i] != 0;
  for (int lane = WARP / 2; lane > 0; lane /= 2) any |= __shfl_xor_sync(ALL_LANES, any, lane);
  return any;
}

// live[row of z]: neither u nor delta is zero throughout. Also copies count, which moments_kernel reads in all its
// blocks and writes in one.
template <typename T, int BLOCK>
__global__ void live_rows_kernel(const __grid_constant__ SegmentList<T> list, const int64_t* count, int64_t* before,
                                 uint8_t* live) {
  auto& shared = shared_memory<LiveRowsShared<BLOCK>>();
  if (blockIdx.x == 0 && threadIdx.x == 0) *before = *count;
  const int64_t row = list.first() + blockIdx.x;
  if (row >= list.end()) return;  // the whole block
  const Segment<T>& segment = list.item[list.segment_of(row)];
  const int u = warp_any_nonzero<BLOCK>(segment.u + (row - segment.first) * list.a, list.a);
  const int delta = warp_any_nonzero<BLOCK>(segment.delta + (row - segment.first) * list.b, list.b);
  if (threadIdx.x % WARP == 0) {
    shared.any[0][threadIdx.x / WARP] = u;
    shared.any[1][threadIdx.x / WARP] = delta;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int any[2] = {};
  for (int warp = 0; warp < BLOCK / WARP; ++warp) {
    any[0] |= shared.any[0][warp];
    any[1] |= shared.any[1][warp];
  }
  live[row] = any[0] && any[1];
}

template <typename T, typename O, int BLOCK>
__global__ void moments_kernel(const __grid_constant__ SegmentList<T> list, const uint8_t* live, const int64_t* before,
                               double* mean, double* m2, int64_t* count, bool merge, O* z) {
  const int64_t across = list.across(BLOCK), columns = list.a + list.b;
  const int64_t column = blockIdx.x % across * BLOCK + threadIdx.x;
  if (column >= columns) return;
  // The rows of z that this thread writes.
  const int64_t begin = merge ? list.first() : list.first() + blockIdx.x / across * ROWS_APART;
  const int64_t end = merge ? list.end() : begin + ROWS_APART;
  ColumnMoments moments{mean[column], m2[column]};
  int64_t seen = *before;
  double inverse = moments.inverse(static_cast<double>(seen));
  for (int s = merge ? 0 : list.segment_of(begin); s < list.count && list.item[s].first < end; ++s) {
    const Segment<T>& segment = list.item[s];
    const Column<T> x(segment, list.a, list.b, column);
    const uint8_t* alive = live + segment.first;
    if (merge) {
      // Selected, not skipped: loads of several rows can be under way at once.
      double sum = 0, squares = 0;
      int64_t kept = 0;
#pragma unroll 4
      for (int64_t r = 0; r < segment.rows; ++r) {
        const double value = x.at[r * x.step];
        sum += alive[r] ? value : 0.0;
        kept += alive[r];
      }
      if (kept > 0) {
        const double own = sum / static_cast<double>(kept);
#pragma unroll 4
        for (int64_t r = 0; r < segment.rows; ++r) {
          const double deviation = x.at[r * x.step] - own;
          squares += alive[r] ? deviation * deviation : 0.0;
        }
        moments.merge(static_cast<double>(seen), static_cast<double>(kept), own, squares);
        seen += kept;
        inverse = moments.inverse(static_cast<double>(seen));
      }
    }
    const int64_t stop = end - segment.first < segment.rows ? end - segment.first : segment.rows;
#pragma unroll 4
    for (int64_t r = begin > segment.first ? begin - segment.first : 0; r < stop; ++r) {
      const double value = (x.at[r * x.step] - moments.mean) * inverse;
      z[(segment.first + r) * columns + column] = static_cast<O>(alive[r] ? value : 0.0);
    }
  }
  if (!merge) return;
  mean[column] = moments.mean;
  m2[column] = moments.m2;
  if (column == 0) *count = seen;
}

}  // namespace pymend
