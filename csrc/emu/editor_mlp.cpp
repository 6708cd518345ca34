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

template <typename T>
void forward_in(const EditorMlp<T>& m, uintptr_t x, uintptr_t y, int block, const Schedule& schedule) {
  if (block == 32) return forward_on<T, 32>(m, x, y, schedule);
  if (block == 64) return forward_on<T, 64>(m, x, y, schedule);
  if (block == 256) return forward_on<T, 256>(m, x, y, schedule);
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

template <typename T>
void backward_in(const EditorMlp<T>& m, const Gradients& grad, int block, const Schedule& schedule) {
  if (block == 32) return backward_on<T, 32>(m, grad, schedule);
  if (block == 64) return backward_on<T, 64>(m, grad, schedule);
  if (block == 256) return backward_on<T, 256>(m, grad, schedule);
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

void editor_mlp(const std::string& dtype, const Operands& of, const Sizes& sizes, uintptr_t x, uintptr_t y, int block,
                const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  if (dtype == "float64") return forward_in(gather<double>(of, sizes), x, y, block, schedule);
  if (dtype == "float32") return forward_in(gather<float>(of, sizes), x, y, block, schedule);
  if (dtype == "bfloat16") return forward_in(gather<Bf16>(of, sizes), x, y, block, schedule);
  if (dtype == "float16") return forward_in(gather<Fp16>(of, sizes), x, y, block, schedule);
  throw std::invalid_argument("dtype is '" + dtype + "'");
}

void editor_mlp_backward(const std::string& dtype, const Operands& of, const Sizes& sizes, const Gradients& grad,
                         int block, const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  if (dtype == "float64") return backward_in(gather<double>(of, sizes), grad, block, schedule);
  if (dtype == "float32") return backward_in(gather<float>(of, sizes), grad, block, schedule);
  throw std::invalid_argument("dtype is '" + dtype + "'");
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
