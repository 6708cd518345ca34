// The test-only module _emu: bindings of every op's kernels, of the planted faults, and of the rounding.
#include <pybind11/numpy.h>

#include "emu/bind.h"
#include "emu/faults.h"
#include "math/rounding.h"

namespace pymend {
namespace {

// in, out: 64 floats
void run_fault(const std::string& fault, uintptr_t in, uintptr_t out, const std::string& order) {
  const auto schedule = emu::parse_schedule(order, 0);
  const auto* in_ptr = emu::at<const float>(in);
  auto* out_ptr = emu::at<float>(out);
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
  emu::bind_editor_mlp(m);
  emu::bind_moments(m);
  emu::bind_rank_update(m);
  emu::bind_token_losses(m);
  m.def("run_fault", &run_fault, py::arg("fault"), py::arg("input"), py::arg("output"), py::arg("order") = "forward");
  m.def("round_bf16", py::vectorize(&round_bf16));
  m.def("round_fp16", py::vectorize(&round_fp16));
  m.def("widen_bf16", py::vectorize(&widen_bf16));
  m.def("widen_fp16", py::vectorize(&widen_fp16));
}
