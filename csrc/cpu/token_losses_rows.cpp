// The inner loops of token_losses on a CPU: a span of a row is read from memory once, and from L1 after that.
//
// CMake compiles this file once per level, with PYMEND_LEVEL and that level's flags. It includes math/ only, and of the
// standard library it uses functions that are not inline, as rank_update_rows.cpp explains.
#include "cpu/token_losses_rows.h"

namespace pymend {
namespace PYMEND_LEVEL {
namespace {

constexpr int SPAN = 2048;  // elements: two rows of floats and their bfloat16 originals stay in an L1 of 32 KiB
// Elements whose terms are added in float before a double takes over. Logits of 16 bits have few distinct values, and the
// roundings of a sum of equal terms do not average out: over a span, one by one as in a build that does not vectorise, 40
// of them showed in a loss; over 256 elements no more than in torch.
constexpr int CHUNK = 256;

// The span as numbers to compute with: itself, or its widened copy.
PYMEND_INLINE const double* widened(const double* x, int, double*) { return x; }
PYMEND_INLINE const float* widened(const float* x, int, float*) { return x; }
template <typename T>
PYMEND_INLINE const float* widened(const T* x, int width, float* copy) {
  for (int j = 0; j < width; ++j) copy[j] = widen(x[j]);
  return copy;
}

// Maximum of a span, and its index if it is above `running`: only then does anyone ask.
template <typename A>
PYMEND_INLINE Softmax<A> look(const A* x, int width, int64_t begin, double running) {
  Softmax<A> result;
  A max = result.max;
  int nan = 0;
#pragma omp simd reduction(max : max) reduction(| : nan)
  for (int j = 0; j < width; ++j) {
    max = x[j] > max ? x[j] : max;
    nan |= x[j] != x[j];
  }
  result.max = nan ? static_cast<A>(NAN) : max;
  result.best = begin;
  if (!above(static_cast<double>(result.max), running)) return result;
  int j = 0;
  while (nan ? x[j] == x[j] : x[j] != max) ++j;
  result.best = begin + j;
  return result;
}

template <bool WITH_BASE, typename A>
PYMEND_INLINE RowSums<double> read_span(const A* x, const A* b, int width, int64_t begin,
                                        const RowSums<double>& running) {
  const Softmax<A> edited = look(x, width, begin, running.edited.max);
  const Softmax<A> base = WITH_BASE ? look(b, width, begin, running.base.max) : Softmax<A>();
  const A edited_origin = origin_of(edited.max), base_origin = origin_of(base.max);
  double edited_sum = 0, base_sum = 0, cross = 0;
  for (int first = 0; first < width; first += CHUNK) {
    const int last = width - first < CHUNK ? width : first + CHUNK;
    A edited_part = 0, base_part = 0, cross_part = 0;
#pragma omp simd reduction(+ : edited_part, base_part, cross_part)
    for (int j = first; j < last; ++j) {
      const A x_j = x[j] - edited_origin;
      edited_part += exp_down(x_j);
      if (WITH_BASE) {
        const A b_j = b[j] - base_origin, e = exp_down(b_j);
        base_part += e;
        cross_part += cross_term(e, b_j, x_j);
      }
    }
    edited_sum += edited_part;
    base_sum += base_part;
    cross += cross_part;
  }
  return {{edited.max, edited_sum, edited.best}, {base.max, base_sum, base.best}, cross};
}

template <typename T>
PYMEND_INLINE RowSums<double> read(const T* logits, const T* base, int64_t begin, int64_t end) {
  Acc<T> x_copy[SPAN], b_copy[SPAN];
  RowSums<double> sums;
  for (int64_t at = begin; at < end; at += SPAN) {
    const int width = static_cast<int>(end - at < SPAN ? end - at : SPAN);
    const Acc<T>* x = widened(logits + at, width, x_copy);
    sums.add(base ? read_span<true>(x, widened(base + at, width, b_copy), width, at, sums)
                  : read_span<false>(x, x, width, at, sums));
  }
  return sums;
}

// `row` by value: a store into `grad` could change what a reference points to, and the loops would not vectorise.
template <typename T>
PYMEND_INLINE void write(const RowGradient<Acc<T>> row, const T* logits, const T* base, T* grad, int64_t begin,
                         int64_t end) {
  if (row.zero()) {
    for (int64_t j = begin; j < end; ++j) grad[j] = round_to<T>(0);
  } else if (base) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) grad[j] = round_to<T>(row.at(widen(logits[j]), widen(base[j])));
  } else {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) grad[j] = round_to<T>(row.at(widen(logits[j])));
  }
  if (row.target >= begin && row.target < end && !row.zero()) {
    const int64_t j = row.target;
    const Acc<T> x = widen(logits[j]);
    grad[j] = round_to<T>((base ? row.at(x, widen(base[j])) : row.at(x)) - row.nll);
  }
}

}  // namespace

template <typename T>
RowSums<double> read_part(const T* logits, const T* base, int64_t begin, int64_t end) {
  return read(logits, base, begin, end);
}

template <typename T>
void write_gradient(const RowGradient<Acc<T>>& row, const T* logits, const T* base, T* grad, int64_t begin,
                    int64_t end) {
  write(row, logits, base, grad, begin, end);
}

#define PYMEND_DEFINE(T)                                                                                    \
  template RowSums<double> read_part(const T*, const T*, int64_t, int64_t);                                 \
  template void write_gradient(const RowGradient<Acc<T>>&, const T*, const T*, T*, int64_t, int64_t);
PYMEND_DEFINE(double)
PYMEND_DEFINE(float)
PYMEND_DEFINE(Bf16)
PYMEND_DEFINE(Fp16)
#undef PYMEND_DEFINE

}  // namespace PYMEND_LEVEL
}  // namespace pymend
