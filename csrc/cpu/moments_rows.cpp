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

constexpr int LANES = 8;   // doubles side by side: one register of AVX-512, two of AVX2
constexpr int BUNDLE = 2;  // of them: chains of additions that hide each other's latency
typedef double Lanes __attribute__((vector_size(LANES * sizeof(double)), aligned(sizeof(double)), may_alias));
template <typename T>
struct Wide {
  typedef T Type __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// Into `to`: how a vector is returned depends on the instruction set.
template <typename T>
PYMEND_INLINE void load(const T* from, Lanes& to) {
  to = __builtin_convertvector(*reinterpret_cast<const typename Wide<T>::Type*>(from), Lanes);
}

// Sums of columns [j, j + BUNDLE * LANES) over the live rows, all of them in registers.
template <typename T>
PYMEND_INLINE void bundle_moments(const Column<T>& x, const uint8_t* live, int64_t rows, double kept, int j,
                                  Moments& own) {
  Lanes mean[BUNDLE] = {}, m2[BUNDLE] = {}, value;
  for (int64_t r = 0; r < rows; ++r) {
    if (!live[r]) continue;
    for (int i = 0; i < BUNDLE; ++i) {
      load(x.at + r * x.step + j + i * LANES, value);
      mean[i] += value;
    }
  }
  for (int i = 0; i < BUNDLE; ++i) mean[i] /= kept;
  for (int64_t r = 0; r < rows; ++r) {
    if (!live[r]) continue;
    for (int i = 0; i < BUNDLE; ++i) {
      load(x.at + r * x.step + j + i * LANES, value);
      value -= mean[i];
      m2[i] += value * value;
    }
  }
  for (int i = 0; i < BUNDLE; ++i) {
    *reinterpret_cast<Lanes*>(own.mean + j + i * LANES) = mean[i];
    *reinterpret_cast<Lanes*>(own.m2 + j + i * LANES) = m2[i];
  }
}

// Mean and squared deviations of the `kept` live rows of one segment: two passes, since a single one loses the
// deviations of a column whose mean is large.
template <typename T>
PYMEND_INLINE void moments_of(const Column<T>& x, const uint8_t* live, int64_t rows, int64_t kept, int width,
                              Moments& own) {
  const double n = static_cast<double>(kept);
  int j = 0;
  for (; j + BUNDLE * LANES <= width; j += BUNDLE * LANES) bundle_moments(x, live, rows, n, j, own);
  for (; j < width; ++j) {
    double mean = 0, m2 = 0;
    for (int64_t r = 0; r < rows; ++r) mean += live[r] ? static_cast<double>(x.at[r * x.step + j]) : 0.0;
    mean /= n;
    for (int64_t r = 0; r < rows; ++r) {
      const double deviation = live[r] ? x.at[r * x.step + j] - mean : 0.0;
      m2 += deviation * deviation;
    }
    own.mean[j] = mean;
    own.m2[j] = m2;
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

template <typename T, typename O>
void normalise_columns(const MomentsTask<T, O>& task, int64_t begin, int width) {
  normalise(task, begin, width);
}
template void normalise_columns(const MomentsTask<float, float>&, int64_t, int);
template void normalise_columns(const MomentsTask<float, double>&, int64_t, int);
template void normalise_columns(const MomentsTask<double, float>&, int64_t, int);
template void normalise_columns(const MomentsTask<double, double>&, int64_t, int);

}  // namespace PYMEND_LEVEL
}  // namespace pymend
