// Parts of one row of logits, compiled once per level of x86-64.
#pragma once

#include "cpu/levels.h"
#include "math/token_losses.h"

namespace pymend {

// The sums over elements [begin, end) of a row; `base` may be null.
template <typename T>
using ReadPart = RowSums<double> (*)(const T* logits, const T* base, int64_t begin, int64_t end);

// Writes elements [begin, end) of a row's gradient; `base` may be null.
template <typename T>
using WriteGradient = void (*)(const RowGradient<Acc<T>>& row, const T* logits, const T* base, T* grad, int64_t begin,
                               int64_t end);

PYMEND_IN_EVERY_LEVEL(
    template <typename T>
    RowSums<double> read_part(const T* logits, const T* base, int64_t begin, int64_t end);
    template <typename T>
    void write_gradient(const RowGradient<Acc<T>>& row, const T* logits, const T* base, T* grad, int64_t begin,
                        int64_t end);)

}  // namespace pymend
