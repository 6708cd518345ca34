// Bindings of the emulated factored_adam kernel.
#include "kernels/factored_adam.cuh"

#include <tuple>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

// param, exp_avg, exp_avg_sq, left, right, scale (addresses), rows, cols, n: see FactoredAdam
using Operands =
    std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

template <int BLOCK>
void factored_adam_on(const FactoredAdam& f, const Schedule& schedule) {
  using Tile = OuterTile<float, BLOCK>;
  launch(factored_adam_kernel<BLOCK>, Tile::count(f.rows, f.cols), BLOCK, sizeof(OuterTileShared<float, BLOCK>),
         &schedule, f);
}

void factored_adam(const Operands& operands, double lr, double beta1, double beta2, double eps, int64_t step, int block,
                   const std::string& order, uint64_t seed) {
  const auto& [param, exp_avg, exp_avg_sq, left, right, scale, rows, cols, n] = operands;
  const FactoredAdam f = {at<float>(param),
                          at<float>(exp_avg),
                          at<float>(exp_avg_sq),
                          at<const float>(left),
                          at<const float>(right),
                          at<const float>(scale),
                          rows,
                          cols,
                          n,
                          adam_step(lr, beta1, beta2, eps, step)};
  const auto schedule = parse_schedule(order, seed);
  switch (block) {
    case 32:
      return factored_adam_on<32>(f, schedule);
    case 64:
      return factored_adam_on<64>(f, schedule);
    case 256:
      return factored_adam_on<256>(f, schedule);
  }
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

}  // namespace

void bind_factored_adam(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("factored_adam", &factored_adam, py::arg("operands"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"),
        py::arg("eps"), py::arg("step"), py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
}

}  // namespace emu
}  // namespace pymend
