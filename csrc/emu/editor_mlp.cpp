// Bindings of the emulated editor_mlp kernels.
#include "kernels/editor_mlp.cuh"

#include <array>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

using Operands = std::array<uintptr_t, 5>;   // p, bias, scale, shift, mode; the last three 0 without modes
using Gradients = std::array<uintptr_t, 5>;  // y, p, bias, scale, shift
using Sizes = std::array<int64_t, 3>;        // rows, cols, modes

template <typename T>
EditorMlp<T> gather(const Operands& of, const Sizes& sizes) {
  return {at<const T>(of[0]),       at<const T>(of[1]), at<const T>(of[2]), at<const T>(of[3]),
          at<const int64_t>(of[4]), sizes[0],           sizes[1],           sizes[2]};
}

template <typename T, int BLOCK>
void forward_on(const EditorMlp<T>& m, uintptr_t x, uintptr_t y, const Schedule& schedule) {
  launch(editor_mlp_kernel<T, BLOCK>, forward_blocks(m, BLOCK), BLOCK, 0, &schedule, m, at<const T>(x), at<T>(y));
}

template <typename T, int BLOCK>
void backward_on(const EditorMlp<T>& m, const Gradients& of, const Schedule& schedule) {
  const EditorMlpGradients<T> grad{at<const T>(of[0]), at<T>(of[1]), at<T>(of[2]), at<T>(of[3]), at<T>(of[4])};
  launch(editor_mlp_backward_kernel<T, BLOCK>, backward_blocks(m), BLOCK, sizeof(EditorMlpShared<T, BLOCK>), &schedule,
         m, grad);
  if (m.modes > 0) {
    launch(editor_mlp_bias_kernel<T, BLOCK>, tiles_of(m.cols, BLOCK), BLOCK, 0, &schedule, m, grad);
  }
}

void editor_mlp(const std::string& dtype, const Operands& of, const Sizes& sizes, uintptr_t x, uintptr_t y, int block,
                const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  by_dtype<double, float, Bf16, Fp16>(dtype, [&](auto kind) {
    using T = decltype(kind);
    by_block<32, 64, 256>(block, [&](auto size) { forward_on<T, size>(gather<T>(of, sizes), x, y, schedule); });
  });
}

void editor_mlp_backward(const std::string& dtype, const Operands& of, const Sizes& sizes, const Gradients& grad,
                         int block, const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  by_dtype<double, float>(dtype, [&](auto kind) {
    using T = decltype(kind);
    by_block<32, 64, 256>(block, [&](auto size) { backward_on<T, size>(gather<T>(of, sizes), grad, schedule); });
  });
}

}  // namespace

void bind_editor_mlp(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("editor_mlp", &editor_mlp, py::arg("dtype"), py::arg("operands"), py::arg("sizes"), py::arg("x"), py::arg("y"),
        py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
  m.def("editor_mlp_backward", &editor_mlp_backward, py::arg("dtype"), py::arg("operands"), py::arg("sizes"),
        py::arg("gradients"), py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
}

}  // namespace emu
}  // namespace pymend
