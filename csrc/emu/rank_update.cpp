// Bindings of the emulated rank_update kernels.
#include "kernels/rank_update.cuh"
#include "kernels/rank_update_mma.cuh"

#include <tuple>
#include <vector>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

// weight, row, col (addresses), rows, cols, n, seed: see RankUpdate
using Matrix = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uint64_t>;

enum class Way { Simt, Strip, Mma };

Way parse_way(const std::string& way) {
  if (way == "simt") return Way::Simt;
  if (way == "strip") return Way::Strip;
  if (way == "mma") return Way::Mma;
  throw std::invalid_argument("way is '" + way + "', expected simt, strip or mma");
}

template <typename T, int BLOCK>
void rank_update_on(const std::vector<Matrix>& matrices, uintptr_t alpha, uintptr_t fidelity, bool random, Way way,
                    const Schedule& schedule) {
  constexpr int TURNS = 2 * AHEAD, TILES = 2;  // of a strip
  using Simt = OuterTile<Acc<T>, BLOCK>;
  using Mma = MmaTile<BLOCK>;
  const bool strips = way == Way::Strip;
  const int64_t tile_rows = way == Way::Simt ? Simt::ROWS : strips ? TURNS * UNIT : TILES * Mma::ROWS;
  const int64_t tile_cols = way == Way::Simt ? Simt::COLS : strips ? STRIP_COLS<BLOCK> : Mma::COLS;
  RankUpdateList<T> list;
  for (const auto& [weight, row, col, rows, cols, n, seed] : matrices) {
    const RankUpdate<T> matrix{
        at<T>(weight), at<const Acc<T>>(row), at<const Acc<T>>(col), rows, cols, n, list.count, 0, seed};
    if (strips && !fits_strip(matrix, random)) {
      throw std::invalid_argument(
          "a strip takes bfloat16 to nearest, 32 rows of factors, sides that are multiples of 32 and 64");
    }
    append(list, matrix, tile_rows, tile_cols);
  }
  std::vector<Kept> partial(list.tiles);
  const auto run = [&](auto* kernel, size_t shared) {
    launch(kernel, list.tiles, BLOCK, shared, &schedule, list, at<const Acc<T>>(alpha), partial.data());
  };
  const size_t simt_shared = sizeof(RankUpdateShared<T, BLOCK>);
  if constexpr (sizeof(T) == 2) {
    if (way != Way::Simt) {
      PackedFactors packed = place_factors(list, strips ? HELD_STEPS : 1);
      const int64_t units = packed.first[list.count];
      std::vector<Four<uint32_t>> words(units * UNIT_WORDS / 4);
      packed.words = reinterpret_cast<uint32_t*>(words.data());
      Schedule whole = schedule;  // the last block of W needs more than the last units
      if (whole.order == Schedule::last) whole.order = Schedule::forward;
      launch(pack_factors_kernel<T, BLOCK>, ceil_div(units, BLOCK / WARP), BLOCK, 0, &whole, list, packed);
      auto* kernel = random ? rank_update_mma_kernel<T, BLOCK, true> : rank_update_mma_kernel<T, BLOCK, false>;
      if constexpr (std::is_same<T, Bf16>::value) {
        if (strips) kernel = rank_update_strip_kernel<BLOCK>;
      }
      launch(kernel, list.tiles, BLOCK, sizeof(RankUpdateMmaShared<BLOCK>), &schedule, list, packed,
             at<const float>(alpha), strips ? TURNS : TILES, partial.data());
    } else if (random) {
      run(rank_update_kernel<T, BLOCK, true>, simt_shared);
    } else {
      run(rank_update_kernel<T, BLOCK, false>, simt_shared);
    }
  } else {
    run(rank_update_kernel<T, BLOCK, false>, simt_shared);
  }
  launch(fidelity_kernel<T, BLOCK>, list.count, BLOCK, sizeof(FidelityShared<BLOCK>), &schedule, list, partial.data(),
         at<Acc<T>>(fidelity));
}

void rank_update(const std::string& dtype, const std::vector<Matrix>& matrices, uintptr_t alpha, uintptr_t fidelity,
                 int block, bool random, const std::string& way, const std::string& order, uint64_t seed) {
  if (matrices.size() > MAX_MATRICES) throw std::invalid_argument("one launch takes 32 matrices");
  const auto schedule = parse_schedule(order, seed);
  const Way by = parse_way(way);
  by_dtype<double, float, Bf16, Fp16>(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (by != Way::Simt && sizeof(T) != 2) {
      throw std::invalid_argument("tensor cores serve bfloat16 and float16 weights");
    }
    by_block<32, 64, 128, 256>(
        block, [&](auto size) { rank_update_on<T, size>(matrices, alpha, fidelity, random, by, schedule); });
  });
}

}  // namespace

void bind_rank_update(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("rank_update", &rank_update, py::arg("dtype"), py::arg("matrices"), py::arg("alpha"), py::arg("fidelity"),
        py::arg("block") = 64, py::arg("random") = false,
        py::arg("way") = "simt", py::arg("order") = "forward", py::arg("seed") = 0);
}

}  // namespace emu
}  // namespace pymend
