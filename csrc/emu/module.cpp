// Python bindings of the emulated kernels, for tests only: `import _emu`. Tensors come as addresses and sizes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "emu/faults.h"
#include "kernels/rank_update.cuh"

namespace pymend {
namespace {

// weight, row, col (addresses), rows, cols, n: see RankUpdate
using Matrix = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

emu::Schedule parse_schedule(const std::string& order, uint64_t seed) {
  if (order == "forward") return {emu::Schedule::forward, seed};
  if (order == "reversed") return {emu::Schedule::reversed, seed};
  if (order == "random") return {emu::Schedule::random, seed};
  throw std::invalid_argument("schedule is '" + order + "', expected forward, reversed or random");
}

template <typename T, int BLOCK>
void rank_update_on(const std::vector<Matrix>& matrices, uintptr_t alpha, uintptr_t fidelity,
                    const emu::Schedule& schedule) {
  RankUpdateList<T> list;
  for (const auto& [weight, row, col, rows, cols, n] : matrices) {
    append(list,
           {reinterpret_cast<T*>(weight), reinterpret_cast<const Acc<T>*>(row), reinterpret_cast<const Acc<T>*>(col),
            rows, cols, n, 0},
           TILE_ROWS, BLOCK);
  }
  std::vector<Kept> partial(list.tiles);
  launch(rank_update_kernel<T, BLOCK>, list.tiles, BLOCK, sizeof(RankUpdateShared<T, BLOCK>), &schedule, list,
         reinterpret_cast<const Acc<T>*>(alpha), partial.data());
  launch(fidelity_kernel<T, BLOCK>, list.count, BLOCK, sizeof(FidelityShared<BLOCK>), &schedule, list, partial.data(),
         reinterpret_cast<Acc<T>*>(fidelity));
}

template <typename T>
void rank_update_in(const std::vector<Matrix>& matrices, uintptr_t alpha, uintptr_t fidelity, int block,
                    const emu::Schedule& schedule) {
  switch (block) {
    case 32:
      return rank_update_on<T, 32>(matrices, alpha, fidelity, schedule);
    case 64:
      return rank_update_on<T, 64>(matrices, alpha, fidelity, schedule);
    case 256:
      return rank_update_on<T, 256>(matrices, alpha, fidelity, schedule);
  }
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

void rank_update(const std::string& dtype, const std::vector<Matrix>& matrices, uintptr_t alpha, uintptr_t fidelity,
                 int block, const std::string& order, uint64_t seed) {
  if (matrices.size() > MAX_MATRICES) throw std::invalid_argument("one launch takes 32 matrices");
  const auto schedule = parse_schedule(order, seed);
  if (dtype == "float64") return rank_update_in<double>(matrices, alpha, fidelity, block, schedule);
  if (dtype == "float32") return rank_update_in<float>(matrices, alpha, fidelity, block, schedule);
  if (dtype == "bfloat16") return rank_update_in<Bf16>(matrices, alpha, fidelity, block, schedule);
  if (dtype == "float16") return rank_update_in<Fp16>(matrices, alpha, fidelity, block, schedule);
  throw std::invalid_argument("dtype is '" + dtype + "'");
}

// in, out: 64 floats
void run_fault(const std::string& fault, uintptr_t in, uintptr_t out, const std::string& order) {
  const auto schedule = parse_schedule(order, 0);
  const auto* in_ptr = reinterpret_cast<const float*>(in);
  auto* out_ptr = reinterpret_cast<float*>(out);
  const size_t shared = 64 * sizeof(float);
  if (fault == "none") return launch(faults::reverse_kernel<true>, 1, 64, shared, &schedule, in_ptr, out_ptr);
  if (fault == "no barrier") return launch(faults::reverse_kernel<false>, 1, 64, shared, &schedule, in_ptr, out_ptr);
  if (fault == "early return") return launch(faults::divergent_kernel, 1, 64, shared, &schedule);
  if (fault == "half warp") return launch(faults::half_warp_kernel, 1, 64, shared, &schedule, out_ptr);
  throw std::invalid_argument("fault is '" + fault + "'");
}

// The rounding of math/rounding.h on raw words, for an exhaustive test against torch.
uint32_t round_bf16(float x) { return round_to<Bf16>(x).bits; }
uint32_t round_fp16(float x) { return round_to<Fp16>(x).bits; }
float widen_bf16(uint16_t bits) { return widen(Bf16{bits}); }
float widen_fp16(uint16_t bits) { return widen(Fp16{bits}); }

}  // namespace
}  // namespace pymend

PYBIND11_MODULE(_emu, m) {
  namespace py = pybind11;
  using namespace pymend;
  m.def("rank_update", &rank_update, py::arg("dtype"), py::arg("matrices"), py::arg("alpha"), py::arg("fidelity"),
        py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
  m.def("run_fault", &run_fault, py::arg("fault"), py::arg("input"), py::arg("output"), py::arg("order") = "forward");
  m.def("round_bf16", py::vectorize(&round_bf16));
  m.def("round_fp16", py::vectorize(&round_fp16));
  m.def("widen_bf16", py::vectorize(&widen_bf16));
  m.def("widen_fp16", py::vectorize(&widen_fp16));
}
