// Rows of one matrix, compiled once per level of x86-64: a wheel assumes none, the level is chosen at run time.
#pragma once

#include "math/rank_update.h"

namespace pymend {

// Updates rows [begin, end) of a weight by step * sum_k row_k col_k^T.
template <typename T>
using UpdateRows = Kept (*)(const RankUpdate<T>& matrix, float step, int64_t begin, int64_t end);

#define PYMEND_DECLARE_LEVEL(level)                                                         \
  namespace level {                                                                         \
  Kept update_rows(const RankUpdate<Bf16>& matrix, float step, int64_t begin, int64_t end); \
  Kept update_rows(const RankUpdate<Fp16>& matrix, float step, int64_t begin, int64_t end); \
  }
PYMEND_DECLARE_LEVEL(base)
PYMEND_DECLARE_LEVEL(avx2)
PYMEND_DECLARE_LEVEL(avx512)
#undef PYMEND_DECLARE_LEVEL

}  // namespace pymend
