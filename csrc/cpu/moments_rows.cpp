// The inner loops of moments on a CPU: columns side by side in the lanes, rows one after the other.
//
// CMake compiles this file once per level, with PYMEND_LEVEL and that level's flags. It includes math/ only: an inline
// function of the standard library compiled with AVX-512 could be the copy that the linker keeps for everyone.
#include "cpu/moments_rows.h"

namespace pymend {
namespace PYMEND_LEVEL {
namespace {

struct Moments {
  double mean[SPAN];
  double m2[SPAN];
};

// Mean and squared deviations of the `kept` live rows of one segment: two passes, since a single one loses the
// deviations of a column whose mean is large.
template <typename T>
PYMEND_INLINE void moments_of(const Column<T>& x, const uint8_t* live, int64_t rows, int64_t kept, int width,
                              Moments& own) {
  own = {};
  for (int64_t r = 0; r < rows; ++r) {
    if (!live[r]) continue;
    const T* row = x.at + r * x.step;
#pragma omp simd
    for (int j = 0; j < width; ++j) own.mean[j] += row[j];
  }
#pragma omp simd
  for (int j = 0; j < width; ++j) own.mean[j] /= static_cast<double>(kept);
  for (int64_t r = 0; r < rows; ++r) {
    if (!live[r]) continue;
    const T* row = x.at + r * x.step;
#pragma omp simd
    for (int j = 0; j < width; ++j) {
      const double deviation = row[j] - own.mean[j];
      own.m2[j] += deviation * deviation;
    }
  }
}

PYMEND_INLINE void inverses_of(const Moments& moments, int64_t seen, int width, double* inverse) {
  const double k = static_cast<double>(seen);
#pragma omp simd
  for (int j = 0; j < width; ++j) inverse[j] = ColumnMoments{moments.mean[j], moments.m2[j]}.inverse(k);
}

template <typename T, typename O>
PYMEND_INLINE void normalise(const MomentsTask<T, O>& task, int64_t begin, int width) {
  Moments moments, own;
  double inverse[SPAN];
  for (int j = 0; j < width; ++j) {
    moments.mean[j] = task.mean[begin + j];
    moments.m2[j] = task.m2[begin + j];
  }
  int64_t seen = task.seen;
  inverses_of(moments, seen, width, inverse);
  for (int64_t s = 0; s < task.segment_count; ++s) {
    const Segment<T>& segment = task.segments[s];
    const Column<T> x(segment, task.a, task.b, begin);
    const uint8_t* live = task.live + segment.first;
    if (task.merge && task.kept[s] > 0) {
      moments_of(x, live, segment.rows, task.kept[s], width, own);
      const double k = static_cast<double>(seen), n = static_cast<double>(task.kept[s]);
#pragma omp simd
      for (int j = 0; j < width; ++j) {
        ColumnMoments column{moments.mean[j], moments.m2[j]};
        column.merge(k, n, own.mean[j], own.m2[j]);
        moments.mean[j] = column.mean;
        moments.m2[j] = column.m2;
      }
      seen += task.kept[s];
      inverses_of(moments, seen, width, inverse);
    }
    for (int64_t r = 0; r < segment.rows; ++r) {
      const T* row = x.at + r * x.step;
      O* z = task.z + (segment.first + r) * (task.a + task.b) + begin;
      if (!live[r]) {
        for (int j = 0; j < width; ++j) z[j] = 0;
        continue;
      }
#pragma omp simd
      for (int j = 0; j < width; ++j) z[j] = static_cast<O>((row[j] - moments.mean[j]) * inverse[j]);
    }
  }
  if (!task.merge) return;
  for (int j = 0; j < width; ++j) {
    task.mean[begin + j] = moments.mean[j];
    task.m2[begin + j] = moments.m2[j];
  }
}

}  // namespace

void normalise_columns(const MomentsTask<float, float>& task, int64_t begin, int width) {
  normalise(task, begin, width);
}
void normalise_columns(const MomentsTask<float, double>& task, int64_t begin, int width) {
  normalise(task, begin, width);
}
void normalise_columns(const MomentsTask<double, float>& task, int64_t begin, int width) {
  normalise(task, begin, width);
}
void normalise_columns(const MomentsTask<double, double>& task, int64_t begin, int width) {
  normalise(task, begin, width);
}

}  // namespace PYMEND_LEVEL
}  // namespace pymend
