// Parts of one row of logits, compiled once per level of x86-64, which is chosen at run time.
#pragma once

#include "math/token_losses.h"

namespace pymend {

// The sums over elements [begin, end) of a row; `base` may be null.
template <typename T>
using ReadPart = RowSums<double> (*)(const T* logits, const T* base, int64_t begin, int64_t end);

// Writes elements [begin, end) of a row's gradient; `base` may be null.
template <typename T>
using WriteGradient = void (*)(const RowGradient<Acc<T>>& row, const T* logits, const T* base, T* grad, int64_t begin,
                               int64_t end);

#define PYMEND_DECLARE(T)                                                                                        \
  RowSums<double> read_part(const T* logits, const T* base, int64_t begin, int64_t end);                         \
  void write_gradient(const RowGradient<Acc<T>>& row, const T* logits, const T* base, T* grad, int64_t begin, \
                      int64_t end);
#define PYMEND_DECLARE_LEVEL(level) \
  namespace level {                 \
  PYMEND_DECLARE(double)            \
  PYMEND_DECLARE(float)             \
  PYMEND_DECLARE(Bf16)              \
  PYMEND_DECLARE(Fp16)              \
  }
PYMEND_DECLARE_LEVEL(base)
PYMEND_DECLARE_LEVEL(avx2)
PYMEND_DECLARE_LEVEL(avx512)
#undef PYMEND_DECLARE_LEVEL
#undef PYMEND_DECLARE

}  // namespace pymend
