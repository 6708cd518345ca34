// token_losses: the sums of a row of logits, and how the sums of its parts become those of the whole.
//
//   nll  = log S_x - (x_target - m_x)             m_x = max_j x_j,  S_x = sum_j exp(x_j - m_x);  m_b, S_b likewise
//   kl   = C / S_b - log(S_b / S_x)               C   = sum_j exp(b_j - m_b) ((b_j - m_b) - (x_j - m_x))
//   dx_j = g_nll (q_j - [j = target]) + g_kl (q_j - p_j),    q = softmax(x) of the edited model, p = softmax(b)
//
// All differences are taken from the maxima, so that a shift of all logits costs no precision.
#pragma once

#include "math/exp.h"

namespace pymend {

constexpr int64_t IGNORE = -100;
constexpr int STATS = 4;  // per row, for the backward pass: m_x, S_x, m_b, S_b

template <typename T>
struct TokenLosses {
  const T* logits;  // [rows, vocabulary], rows at logits_stride
  int64_t logits_stride;
  const T* base;  // likewise; null: no kl
  int64_t base_stride;
  const int64_t* target;  // [rows]; null: no nll
  int64_t rows, vocabulary;
  Acc<T>*nll, *kl;            // [rows] each
  int64_t *best, *base_best;  // [rows] each
  Acc<T>* stats;              // [rows, STATS]
};

template <typename T>
struct TokenLossesGradient {
  TokenLosses<T> losses;              // operands and stats
  const Acc<T>*grad_nll, *grad_kl;  // [rows] each; null: zero
  T* grad;                            // [rows, vocabulary], contiguous
};

// The order of torch.argmax: NaN is above everything.
template <typename A>
PYMEND_INLINE bool above(A a, A b) {
  return a > b || (a != a && b == b);
}

// Where exponentials are taken from: the maximum; 0 if all logits are -inf, so that exp(x - origin) is 0 and not NaN.
template <typename A>
PYMEND_INLINE A origin_of(A max) {
  return max == -static_cast<A>(INFINITY) ? A(0) : max;
}

template <typename A>
struct Softmax {
  A max = -static_cast<A>(INFINITY);
  A sum = 0;         // of exp(x - origin_of(max))
  int64_t best = 0;  // lowest index of the maximum

  // Takes a logit into maximum and index, not into the sum; indices come in rising order.
  PYMEND_INLINE void look(A x, int64_t index) {
    if (!above(x, max)) return;
    max = x;
    best = index;
  }
  PYMEND_INLINE void look(const Softmax& other) {
    if (above(max, other.max) || (!above(other.max, max) && best <= other.best)) return;
    max = other.max;
    best = other.best;
  }
  // What exponentials are multiplied by when they are to be taken from another maximum.
  PYMEND_INLINE A down_to(A other) const {
    return max == -static_cast<A>(INFINITY) ? A(0) : exp_down(max - other);
  }
};

// One term of C, from e = exp(b - m_b), b - m_b and x - m_x. Where p is 0 it is 0, whatever x is.
template <typename A>
PYMEND_INLINE A cross_term(A e, A b, A x) {
  return e > A(0) ? e * (b - x) : A(0);
}

// The sums over a part of one row.
template <typename A>
struct RowSums {
  Softmax<A> edited, base;
  A cross = 0;  // C, by the maxima of this part

  PYMEND_INLINE void rescale(const Softmax<A>& new_edited, const Softmax<A>& new_base) {
    const A down = base.down_to(new_base.max);
    const A moved =
        (origin_of(base.max) - origin_of(new_base.max)) - (origin_of(edited.max) - origin_of(new_edited.max));
    cross = down > A(0) ? down * (cross + base.sum * moved) : A(0);  // 0 times infinity is 0 here
    base.sum *= down;
    edited.sum *= edited.down_to(new_edited.max);
  }

  PYMEND_INLINE void add(RowSums other) {
    Softmax<A> new_edited = edited, new_base = base;
    new_edited.look(other.edited);
    new_base.look(other.base);
    rescale(new_edited, new_base);
    other.rescale(new_edited, new_base);
    new_edited.sum = edited.sum + other.edited.sum;
    new_base.sum = base.sum + other.base.sum;
    *this = {new_edited, new_base, cross + other.cross};
  }
};

// Writes what a row's sums amount to. A target outside of the vocabulary gives NaN.
template <typename T, typename A>
PYMEND_INLINE void write_row(const TokenLosses<T>& m, int64_t row, const RowSums<A>& sums) {
  const double edited_sum = sums.edited.sum, base_sum = sums.base.sum;
  m.best[row] = sums.edited.best;
  if (m.target != nullptr) {
    const int64_t target = m.target[row];
    const bool inside = target >= 0 && target < m.vocabulary;
    const double x = inside ? static_cast<double>(widen(m.logits[row * m.logits_stride + target])) : NAN;
    m.nll[row] = target == IGNORE ? Acc<T>(0) : static_cast<Acc<T>>(std::log(edited_sum) - (x - sums.edited.max));
  }
  if (m.base != nullptr) {
    m.kl[row] = static_cast<Acc<T>>(sums.cross / base_sum - std::log(base_sum / edited_sum));
    m.base_best[row] = sums.base.best;
  }
  Acc<T>* stats = m.stats + row * STATS;
  stats[0] = static_cast<Acc<T>>(sums.edited.max);
  stats[1] = static_cast<Acc<T>>(sums.edited.sum);
  stats[2] = static_cast<Acc<T>>(sums.base.max);
  stats[3] = static_cast<Acc<T>>(sums.base.sum);
}

// What makes the gradient of one row: nll q_j + kl (q_j - p_j), less `nll` at the target.
template <typename A>
struct RowGradient {
  A nll, kl;
  A edited_max, edited_scale, base_max, base_scale;  // q = edited_scale exp(x - edited_max); p likewise
  int64_t target;                                    // -1: none

  // No gradient comes in: the row is zero, even where logits are not finite.
  PYMEND_INLINE bool zero() const { return nll == A(0) && kl == A(0); }
  PYMEND_INLINE A q(A x) const { return edited_scale * exp_down(x - edited_max); }
  PYMEND_INLINE A at(A x) const { return nll * q(x); }
  PYMEND_INLINE A at(A x, A b) const { return nll * q(x) + kl * (q(x) - base_scale * exp_down(b - base_max)); }
};

template <typename T>
PYMEND_INLINE RowGradient<Acc<T>> gradient_of(const TokenLossesGradient<T>& m, int64_t row) {
  using A = Acc<T>;
  const A* stats = m.losses.stats + row * STATS;
  const bool counts = m.grad_nll != nullptr && m.losses.target != nullptr && m.losses.target[row] != IGNORE;
  return {counts ? m.grad_nll[row] : A(0),
          m.grad_kl != nullptr && m.losses.base != nullptr ? m.grad_kl[row] : A(0),
          stats[0],
          1 / stats[1],
          stats[2],
          1 / stats[3],
          counts ? m.losses.target[row] : -1};
}

}  // namespace pymend
