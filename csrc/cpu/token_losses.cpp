// token_losses on CPU tensors; the loops are in token_losses_rows.cpp.
//
// A row is cut into parts of PART elements, whatever the number of rows and threads, and a row's parts are added in
// order: two rows keep many threads busy, and the result does not depend on them.
#include <algorithm>

#include "cpu/level.h"
#include "cpu/token_losses_rows.h"
#include "glue/token_losses.h"
#include "math/ceil_div.h"

namespace pymend {
namespace {

constexpr int64_t PART = 8192;
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread

// Calls body(part, row, begin, end) for every part of every row.
template <typename Body>
void for_parts(int64_t rows, int64_t vocabulary, const Body& body) {
  const int64_t parts = ceil_div(vocabulary, PART);
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::min(PART, vocabulary));
  parallel_for(0, rows * parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part % parts * PART;
      body(part, part / parts, begin, std::min(begin + PART, vocabulary));
    }
  });
}

struct Cpu {
  template <typename T>
  static TokenLossesResult run(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& base) {
    static const auto read_part = choose_level<ReadPart<T>>(PYMEND_LEVELS(read_part));
    auto m = gather_token_losses<T>(logits, target, base);
    for (int64_t row = 0; m.target && row < m.rows; ++row) {
      const int64_t t = m.target[row];
      PYMEND_CHECK(t == IGNORE || (t >= 0 && t < m.vocabulary), "target[", row, "] is ", t, ", expected 0 to ",
                   m.vocabulary - 1, ", or ", IGNORE);
    }
    auto result = make_token_losses(m, logits);
    const int64_t parts = ceil_div(m.vocabulary, PART);
    std::vector<RowSums<double>> sums(m.rows * parts);
    for_parts(m.rows, m.vocabulary, [&](int64_t part, int64_t row, int64_t begin, int64_t end) {
      sums[part] = read_part(m.logits + row * m.logits_stride, m.base ? m.base + row * m.base_stride : nullptr, begin,
                             end);
    });
    for (int64_t row = 0; row < m.rows; ++row) {
      RowSums<double> whole = sums[row * parts];
      for (int64_t part = 1; part < parts; ++part) whole.add(sums[row * parts + part]);
      write_row(m, row, whole);
    }
    return result;
  }

  template <typename T>
  static void run_backward(const TokenLossesGradient<T>& m, const Tensor&) {
    static const auto write_gradient = choose_level<WriteGradient<T>>(PYMEND_LEVELS(write_gradient));
    const auto& operands = m.losses;
    for_parts(operands.rows, operands.vocabulary, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
      const T* base_row = m.grad_kl ? operands.base + row * operands.base_stride : nullptr;
      write_gradient(gradient_of(m, row), operands.logits + row * operands.logits_stride, base_row,
                     m.grad + row * operands.vocabulary, begin, end);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) {
  m.impl("token_losses", TORCH_BOX(&token_losses<Cpu>));
  m.impl("token_losses_backward", TORCH_BOX(&token_losses_backward<Cpu>));
}

}  // namespace pymend
