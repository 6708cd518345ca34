// rank_update on CPU tensors of float32, bfloat16 and float16; the loops are in rank_update_rows.cpp.
//
// float64 goes through torch's GEMM, from pymend/ops/rank_update.py. Tiles of rows are a fixed partition and
// their sums are added in order, so the result does not depend on the number of threads.
#include "cpu/rank_update_rows.h"

#include <algorithm>
#include <cmath>

#include "cpu/level.h"
#include "glue/rank_update.h"

namespace pymend {
namespace {

// The power of two that brings x near 1, as far as a float can tell.
float unit_scale(float x) {
  return x != 0 && std::isfinite(x) ? std::ldexp(1.0f, std::clamp(-std::ilogb(x), -100, 100)) : 1.0f;
}

struct Cpu {
  using Weights = OneOf<float, Bf16, Fp16>;
  static constexpr const char* NOTE = " on a CPU; pymend.ops.rank_update also takes float64";

  template <typename T>
  static Tensor run(const RankUpdateArguments& of) {
    static const auto update_rows = choose_level<UpdateRows<T>>(PYMEND_LEVELS(update_rows));
    static const auto largest_change = choose_level<LargestChange<T>>(PYMEND_LEVELS(largest_change));
    auto matrices = gather_rank_update<T>(of);
    const auto* step = static_cast<const float*>(of.alpha.const_data_ptr());
    Tensor fidelity = torch::stable::empty_like(of.alpha);
    auto* fidelity_ptr = static_cast<float*>(fidelity.mutable_data_ptr());

    std::vector<int> matrix_of;  // per tile
    std::vector<RowsStep> how;
    int64_t most = 0;  // rows of factors
    for (size_t i = 0; i < matrices.size(); ++i) {
      how.push_back({-step[i], unit_scale(step[i] * largest_change(matrices[i])), !of.seeds.empty()});
      most = std::max(most, matrices[i].n);
      matrices[i].first_tile = static_cast<int64_t>(matrix_of.size());
      const bool empty = matrices[i].n == 0 || matrices[i].cols == 0;
      matrix_of.resize(matrix_of.size() + (empty ? 0 : ceil_div(matrices[i].rows, TILE)), static_cast<int>(i));
    }
    std::vector<Kept> partial(matrix_of.size());
    parallel_for(0, static_cast<int64_t>(partial.size()), 1, [&](int64_t first, int64_t last) {
      std::vector<float> packed(most * TILE);
      for (int64_t tile = first; tile < last; ++tile) {
        const auto& m = matrices[matrix_of[tile]];
        const int64_t begin = (tile - m.first_tile) * TILE, end = std::min<int64_t>(begin + TILE, m.rows);
        partial[tile] = update_rows(m, how[matrix_of[tile]], begin, end, packed.data());
      }
    });

    std::vector<Kept> kept(matrices.size());
    for (size_t tile = 0; tile < partial.size(); ++tile) kept[matrix_of[tile]].add(partial[tile]);
    for (size_t i = 0; i < kept.size(); ++i) fidelity_ptr[i] = static_cast<float>(kept[i].fidelity());
    return fidelity;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) { m.impl("rank_update", TORCH_BOX(&rank_update<Cpu>)); }

}  // namespace pymend
