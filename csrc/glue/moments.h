// Checks and gathers the operands of moments: once, for CPU and CUDA.
#pragma once

#include <tuple>

#include "math/moments.h"
#include "torch_glue.h"

namespace pymend {

struct MomentsArguments {
  const std::vector<Tensor>& u;
  const std::vector<Tensor>& delta;
  const std::vector<int64_t>& counts;
  Tensor& mean;
  Tensor& m2;
  Tensor& count;
  bool merge;
  ScalarType dtype;

  int64_t a() const { return u[0].size(1); }
  int64_t b() const { return delta[0].size(1); }
};

struct MomentsResult {
  Tensor z, live;
};

inline MomentsResult empty_moments_result(const MomentsArguments& x, int64_t rows) {
  return {torch::stable::new_empty(x.mean, {rows, x.a() + x.b()}, x.dtype),
          torch::stable::new_empty(x.mean, {rows}, ScalarType::Bool)};
}

// Shapes and dtypes as the schema in ops.cpp says; called before anything is written.
template <typename T>
std::vector<Segment<T>> gather_segments(const MomentsArguments& x) {
  const size_t weights = x.u.size();
  const ScalarType dtype = x.u[0].scalar_type();
  PYMEND_CHECK(x.delta.size() == weights, "delta has ", x.delta.size(), " entries for ", weights, " in u");
  PYMEND_CHECK(x.counts.size() % weights == 0, "counts has ", x.counts.size(), " entries, not a multiple of ", weights);
  PYMEND_CHECK(x.u[0].dim() == 2 && x.delta[0].dim() == 2, "u[0] and delta[0] have shapes ", shape_of(x.u[0]), " and ",
               shape_of(x.delta[0]), ", expected matrices");
  check_operand("mean", x.mean, ScalarType::Double, x.u[0], {x.a() + x.b()});
  check_operand("m2", x.m2, ScalarType::Double, x.u[0], {x.a() + x.b()});
  check_operand("count", x.count, ScalarType::Long, x.u[0], {});

  std::vector<const T*> u, delta;  // the next row of each weight
  for (size_t i = 0; i < weights; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    int64_t rows = 0;
    for (size_t s = i; s < x.counts.size(); s += weights) {
      PYMEND_CHECK(x.counts[s] >= 0, "counts[", s, "] is ", x.counts[s]);
      rows += x.counts[s];
    }
    check_operand("u" + at, x.u[i], dtype, x.u[0], {rows, x.a()});
    check_operand("delta" + at, x.delta[i], dtype, x.u[0], {rows, x.b()});
    u.push_back(static_cast<const T*>(x.u[i].const_data_ptr()));
    delta.push_back(static_cast<const T*>(x.delta[i].const_data_ptr()));
  }
  std::vector<Segment<T>> segments;
  int64_t first = 0;
  for (size_t s = 0; s < x.counts.size(); ++s) {
    const int64_t rows = x.counts[s];
    segments.push_back({u[s % weights], delta[s % weights], rows, first});
    u[s % weights] += rows * x.a();
    delta[s % weights] += rows * x.b();
    first += rows;
  }
  return segments;
}

// The op on a device, whose code is Device::run<T, O> for the types T of the rows and O of z.
template <typename Device>
std::tuple<Tensor, Tensor> moments(std::vector<Tensor> u, std::vector<Tensor> delta, std::vector<int64_t> counts,
                                   Tensor mean, Tensor m2, Tensor count, bool merge, ScalarType dtype) {
  PYMEND_CHECK(!u.empty(), "u is empty");
  const OneOf<float, double> kinds;
  const MomentsArguments x{u, delta, counts, mean, m2, count, merge, dtype};
  const auto result = by_dtype(kinds, "u[0] has dtype", u[0].scalar_type(), [&](auto row) {
    return by_dtype(kinds, "dtype is", dtype,
                    [&](auto out) { return Device::template run<decltype(row), decltype(out)>(x); });
  });
  return {result.z, result.live};
}

}  // namespace pymend
