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

template <typename T>
void token_losses_in(const Addresses& a, int64_t rows, int64_t vocabulary, int block, const Schedule& schedule) {
  switch (block) {
    case 32:
      return token_losses_on<T, 32>(a, rows, vocabulary, schedule);
    case 64:
      return token_losses_on<T, 64>(a, rows, vocabulary, schedule);
    case 256:
      return token_losses_on<T, 256>(a, rows, vocabulary, schedule);
  }
  throw std::invalid_argument("block is " + std::to_string(block) + ", expected 32, 64 or 256");
}

void token_losses(const std::string& dtype, const Addresses& a, int64_t rows, int64_t vocabulary, int block,
                  const std::string& order, uint64_t seed) {
  const auto schedule = parse_schedule(order, seed);
  if (dtype == "float64") return token_losses_in<double>(a, rows, vocabulary, block, schedule);
  if (dtype == "float32") return token_losses_in<float>(a, rows, vocabulary, block, schedule);
  if (dtype == "bfloat16") return token_losses_in<Bf16>(a, rows, vocabulary, block, schedule);
  if (dtype == "float16") return token_losses_in<Fp16>(a, rows, vocabulary, block, schedule);
  throw std::invalid_argument("dtype is '" + dtype + "'");
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
