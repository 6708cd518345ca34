// Checks and gathers the operands of token_losses and makes its results: once, for CPU and CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "math/token_losses.h"
#include "torch_glue.h"

namespace pymend {

using MaybeTensor = std::optional<Tensor>;
using TokenLossesResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // nll, kl, best, base_best, stats

inline void check_logits(const char* argument, const Tensor& tensor, const Tensor& logits) {
  PYMEND_CHECK(tensor.dim() == 2 && tensor.size(0) == logits.size(0) && tensor.size(1) == logits.size(1) &&
                   tensor.size(1) > 0,
               argument, " has shape ", shape_of(tensor), ", expected ",
               logits.dim() == 2 && logits.size(1) > 0 ? shape_of(logits) : "[k, V] with V above 0");
  PYMEND_CHECK(tensor.scalar_type() == logits.scalar_type(), argument, " has dtype ", name_of(tensor.scalar_type()),
               ", expected ", name_of(logits.scalar_type()));
  PYMEND_CHECK(tensor.device() == logits.device(), argument, " is on another device than logits");
  PYMEND_CHECK(tensor.stride(1) == 1 || tensor.is_contiguous(), argument, " has rows that are not contiguous");
}

using Logits = OneOf<double, float, Bf16, Fp16>;

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The operands; shapes and dtypes as the schema in ops.cpp says.
template <typename T>
TokenLosses<T> gather_token_losses(const Tensor& logits, const MaybeTensor& target, const MaybeTensor& base) {
  check_logits("logits", logits, logits);
  if (base) check_logits("base", *base, logits);
  if (target) check_operand("target", *target, ScalarType::Long, logits, {logits.size(0)});
  TokenLosses<T> m = {};
  m.logits = pointer<T>(logits);
  m.logits_stride = logits.stride(0);
  m.rows = logits.size(0);
  m.vocabulary = logits.size(1);
  if (base) {
    m.base = pointer<T>(*base);
    m.base_stride = base->stride(0);
  }
  if (target) m.target = pointer<int64_t>(*target);
  return m;
}

// The results, empty where their operand is missing; `m` points to them.
template <typename T>
TokenLossesResult make_token_losses(TokenLosses<T>& m, const Tensor& logits) {
  const ScalarType wide = accumulate_dtype(logits.scalar_type());
  const int64_t with_target = m.target ? m.rows : 0, with_base = m.base ? m.rows : 0;
  const auto make = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(logits, shape, dtype);
  };
  TokenLossesResult result(make({with_target}, wide), make({with_base}, wide), make({m.rows}, ScalarType::Long),
                           make({with_base}, ScalarType::Long), make({m.rows, STATS}, wide));
  m.nll = static_cast<Acc<T>*>(std::get<0>(result).mutable_data_ptr());
  m.kl = static_cast<Acc<T>*>(std::get<1>(result).mutable_data_ptr());
  m.best = static_cast<int64_t*>(std::get<2>(result).mutable_data_ptr());
  m.base_best = static_cast<int64_t*>(std::get<3>(result).mutable_data_ptr());
  m.stats = static_cast<Acc<T>*>(std::get<4>(result).mutable_data_ptr());
  return result;
}

template <typename T>
TokenLossesGradient<T> gather_gradient(const MaybeTensor& grad_nll, const MaybeTensor& grad_kl, const Tensor& logits,
                                       const MaybeTensor& target, const MaybeTensor& base, const Tensor& stats,
                                       const Tensor& grad) {
  const ScalarType wide = accumulate_dtype(logits.scalar_type());
  TokenLossesGradient<T> m = {gather_token_losses<T>(logits, target, base), nullptr, nullptr, nullptr};
  check_operand("stats", stats, wide, logits, {m.losses.rows, STATS});
  m.losses.stats = static_cast<Acc<T>*>(stats.mutable_data_ptr());
  if (grad_nll) {
    PYMEND_CHECK(target, "grad_nll is given without a target");
    check_operand("grad_nll", *grad_nll, wide, logits, {m.losses.rows});
    m.grad_nll = pointer<Acc<T>>(*grad_nll);
  }
  if (grad_kl) {
    PYMEND_CHECK(base, "grad_kl is given without a base");
    check_operand("grad_kl", *grad_kl, wide, logits, {m.losses.rows});
    m.grad_kl = pointer<Acc<T>>(*grad_kl);
  }
  m.grad = static_cast<T*>(grad.mutable_data_ptr());
  return m;
}

// The ops on a device, whose code is Device::run<T> and Device::run_backward<T>.
template <typename Device>
TokenLossesResult token_losses(Tensor logits, MaybeTensor target, MaybeTensor base) {
  return by_dtype(Logits(), "logits has dtype", logits.scalar_type(),
                  [&](auto kind) { return Device::template run<decltype(kind)>(logits, target, base); });
}

template <typename Device>
Tensor token_losses_backward(MaybeTensor grad_nll, MaybeTensor grad_kl, Tensor logits, MaybeTensor target,
                             MaybeTensor base, Tensor stats) {
  return by_dtype(Logits(), "logits has dtype", logits.scalar_type(), [&](auto kind) {
    using T = decltype(kind);
    Tensor grad = torch::stable::new_empty(logits, logits.sizes());
    Device::run_backward(gather_gradient<T>(grad_nll, grad_kl, logits, target, base, stats, grad), logits);
    return grad;
  });
}

}  // namespace pymend
