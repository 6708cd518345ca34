// Checks and gathers the operands of rank_update: once, for CPU and CUDA.
#pragma once

#include "math/rank_update.h"
#include "torch_glue.h"

namespace pymend {

struct RankUpdateArguments {
  const std::vector<Tensor>& weights;
  const std::vector<Tensor>& u;
  const std::vector<Tensor>& delta;
  const Tensor& alpha;
  const std::vector<bool>& transposed;
  const std::vector<int64_t>& seeds;
};

// Shapes and dtypes as the schema in ops.cpp says; called before any weight is written.
template <typename T>
std::vector<RankUpdate<T>> gather_rank_update(const RankUpdateArguments& of) {
  const auto& [weights, u, delta, alpha, transposed, seeds] = of;
  const int64_t count = static_cast<int64_t>(weights.size());
  const ScalarType dtype = weights[0].scalar_type(), factor_dtype = accumulate_dtype(dtype);
  PYMEND_CHECK(u.size() == weights.size(), "u has ", u.size(), " entries for ", count, " weights");
  PYMEND_CHECK(delta.size() == weights.size(), "delta has ", delta.size(), " entries for ", count, " weights");
  PYMEND_CHECK(transposed.size() == weights.size(), "transposed has ", transposed.size(), " entries for ", count,
               " weights");
  PYMEND_CHECK(seeds.empty() || seeds.size() == weights.size(), "seeds has ", seeds.size(), " entries for ", count,
               " weights");
  PYMEND_CHECK(seeds.empty() || sizeof(T) == 2, "seeds: ", name_of(dtype),
               " weights are not rounded at random, only BFloat16 and Half");
  check_operand("alpha", alpha, factor_dtype, weights[0], {count});

  std::vector<RankUpdate<T>> matrices;
  for (int64_t i = 0; i < count; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    check_operand("weights" + at, weights[i], dtype, weights[0], {-1, -1});
    const int64_t rows = weights[i].size(0), cols = weights[i].size(1);
    check_operand("u" + at, u[i], factor_dtype, weights[0], {-1, transposed[i] ? rows : cols});
    const int64_t n = u[i].size(0);
    check_operand("delta" + at, delta[i], factor_dtype, weights[0], {n, transposed[i] ? cols : rows});
    const Tensor& row = transposed[i] ? u[i] : delta[i];
    const Tensor& col = transposed[i] ? delta[i] : u[i];
    matrices.push_back({static_cast<T*>(weights[i].mutable_data_ptr()),
                        static_cast<const Acc<T>*>(row.const_data_ptr()),
                        static_cast<const Acc<T>*>(col.const_data_ptr()), rows, cols, n, i, 0,
                        seeds.empty() ? 0 : static_cast<uint64_t>(seeds[i])});
  }
  return matrices;
}

// The op on a device, whose code is Device::run<T> for weights of Device::Weights.
template <typename Device>
Tensor rank_update(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> delta, Tensor alpha,
                   std::vector<bool> transposed, std::vector<int64_t> seeds) {
  PYMEND_CHECK(!weights.empty(), "weights is empty");
  const RankUpdateArguments of{weights, u, delta, alpha, transposed, seeds};
  return by_dtype(typename Device::Weights(), "weights[0] has dtype", weights[0].scalar_type(),
                  [&](auto kind) { return Device::template run<decltype(kind)>(of); }, Device::NOTE);
}

}  // namespace pymend
