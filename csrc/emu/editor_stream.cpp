// Bindings of the emulated editor_stream kernel.
#include "kernels/editor_stream.cuh"

#include <array>
#include <limits>
#include <vector>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

using Layer = std::array<uintptr_t, 5>;  // v, u, bias, scale, shift; the last two 0 without modes
using Sizes = std::array<int64_t, 4>;    // rows, d, r, modes

template <typename W, int ROWS, int BLOCK>
void run_on(const EditorStream<W>& m, int blocks, const Schedule& schedule) {
  launch_together(editor_stream_kernel<W, ROWS, BLOCK>, blocks, BLOCK, sizeof(EditorStreamShared<ROWS>), &schedule, m);
}

template <typename W, int BLOCK>
void run_rows(const EditorStream<W>& m, int blocks, const Schedule& schedule) {
  switch (stream_step(m.rows)) {
    case 8:
      return run_on<W, 8, BLOCK>(m, blocks, schedule);
    case 16:
      return run_on<W, 16, BLOCK>(m, blocks, schedule);
    case 32:
      return run_on<W, 32, BLOCK>(m, blocks, schedule);
    default:
      return run_on<W, 64, BLOCK>(m, blocks, schedule);
  }
}

template <typename W>
void run_in(const std::vector<Layer>& layers, const Sizes& sizes, uintptr_t x, uintptr_t mode, uintptr_t y,
            bool residual, bool aligned, int blocks, int block, const Schedule& schedule) {
  const auto [rows, d, r, modes] = sizes;
  // Read before it is written, scratch gives NaN.
  const float poison = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> partial(partial_floats(rows, d, r), poison), a(rows * r, poison), between(rows * d, poison);
  unsigned arrived = 0;
  EditorStream<W> m{{},       at<const float>(x), at<const int64_t>(mode), at<float>(y), partial.data(), a.data(),
                    between.data(), &arrived,     rows,                    d,            r,              modes,
                    residual, aligned};
  for (int i = 0; i < STREAM_LAYERS; ++i) {
    const Layer& of = layers[i];
    m.layer[i] = {at<const W>(of[0]), at<const W>(of[1]), at<const W>(of[2]), at<const W>(of[3]), at<const W>(of[4])};
  }
  if (block == 32) return run_rows<W, 32>(m, blocks, schedule);
  if (block == 64) return run_rows<W, 64>(m, blocks, schedule);
  if (block == 256) return run_rows<W, 256>(m, blocks, schedule);
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

void editor_stream(const std::string& dtype, const std::vector<Layer>& layers, const Sizes& sizes, uintptr_t x,
                   uintptr_t mode, uintptr_t y, bool residual, bool aligned, int blocks, int block,
                   const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  if (layers.size() != STREAM_LAYERS) throw std::invalid_argument("one launch takes two layers");
  if (dtype == "float32") return run_in<float>(layers, sizes, x, mode, y, residual, aligned, blocks, block, schedule);
  if (dtype == "bfloat16") return run_in<Bf16>(layers, sizes, x, mode, y, residual, aligned, blocks, block, schedule);
  throw std::invalid_argument("dtype is '" + dtype + "'");
}

}  // namespace

void bind_editor_stream(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("editor_stream", &editor_stream, py::arg("dtype"), py::arg("layers"), py::arg("sizes"), py::arg("x"),
        py::arg("mode"), py::arg("y"), py::arg("residual"), py::arg("aligned"), py::arg("blocks") = 2,
        py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
}

}  // namespace emu
}  // namespace pymend
