// Bindings of the emulated token_losses kernels, and of the exponential they share with the CPU.
#include "kernels/token_losses.cuh"

#include <pybind11/numpy.h>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

// Addresses by name, as in TokenLosses and TokenLossesGradient; 0 where there is no tensor.
using Addresses = std::map<std::string, uintptr_t>;

template <typename T>
TokenLosses<T> losses_at(const Addresses& a, int64_t rows, int64_t vocabulary) {
  return {at<const T>(a.at("logits")),
          vocabulary,
          at<const T>(a.at("base")),
          vocabulary,
          at<const int64_t>(a.at("target")),
          rows,
          vocabulary,
          at<Acc<T>>(a.at("nll")),
          at<Acc<T>>(a.at("kl")),
          at<int64_t>(a.at("best")),
          at<int64_t>(a.at("base_best")),
          at<Acc<T>>(a.at("stats"))};
}

// Forward, then backward if there is a place for the gradient.
template <typename T, int BLOCK>
void token_losses_on(const Addresses& a, int64_t rows, int64_t vocabulary, const Schedule& schedule) {
  const auto m = losses_at<T>(a, rows, vocabulary);
  const auto kernel = m.base ? token_losses_kernel<T, BLOCK, true> : token_losses_kernel<T, BLOCK, false>;
  launch(kernel, rows, BLOCK, sizeof(TokenLossesShared<T, BLOCK>), &schedule, m);
  const TokenLossesGradient<T> g = {m, at<const Acc<T>>(a.at("grad_nll")), at<const Acc<T>>(a.at("grad_kl")),
                                    at<T>(a.at("grad"))};
  if (!g.grad) return;
  const auto backward =
      g.grad_kl ? token_losses_backward_kernel<T, BLOCK, true> : token_losses_backward_kernel<T, BLOCK, false>;
  launch(backward, rows * gradient_tiles<BLOCK>(vocabulary), BLOCK, 0, &schedule, g);
}

void token_losses(const std::string& dtype, const Addresses& a, int64_t rows, int64_t vocabulary, int block,
                  const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  by_dtype<double, float, Bf16, Fp16>(dtype, [&](auto kind) {
    by_block<32, 64, 256>(
        block, [&](auto size) { token_losses_on<decltype(kind), size>(a, rows, vocabulary, schedule); });
  });
}

float exp_of(float x) { return exp_down(x); }

}  // namespace

void bind_token_losses(pybind11::module_& m) {
  namespace py = pybind11;
  m.def("token_losses", &token_losses, py::arg("dtype"), py::arg("addresses"), py::arg("rows"), py::arg("vocabulary"),
        py::arg("block") = 64, py::arg("order") = "forward", py::arg("seed") = 0);
  m.def("exp_down", py::vectorize(&exp_of));
}

}  // namespace emu
}  // namespace pymend
