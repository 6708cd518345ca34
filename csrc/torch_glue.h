// The border to torch: the only file that includes it. LibTorch's stable ABI, so one binary serves torch 2.11 and
// later.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "math/rounding.h"

namespace pymend {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

#define PYMEND_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

// torch's current stream on a device, as the opaque pointer that the CUDA runtime calls cudaStream_t. The function is
// looked up in the library that torch has loaded: naming that library would make the import fail under a CPU-only torch,
// and a weak reference stays null, because Python gives every module a scope of its own. Can go when the floor reaches
// torch 2.13.
inline void* current_stream(int32_t device_index) {
  using Get = AOTITorchError (*)(int32_t device_index, void** stream);
  static const auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  PYMEND_CHECK(get != nullptr, "this torch has no CUDA, yet a CUDA tensor was given");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device_index, &stream));
  return stream;
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// The ScalarType whose accumulation type a weight of this dtype uses.
inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

template <typename T>
constexpr ScalarType DTYPE = ScalarType::Float;
template <>
constexpr ScalarType DTYPE<double> = ScalarType::Double;
template <>
constexpr ScalarType DTYPE<Bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType DTYPE<Fp16> = ScalarType::Half;

template <typename... Types>
struct OneOf {};

// Returns body(T()) for the T whose dtype it is; `what` and `after` stand around the names in the message.
template <typename... Types, typename Body>
auto by_dtype(OneOf<Types...>, const char* what, ScalarType dtype, const Body& body, const char* after = "") {
  std::optional<std::common_type_t<decltype(body(Types()))...>> result;
  ((dtype == DTYPE<Types> ? void(result.emplace(body(Types()))) : void()), ...);
  std::string names;
  size_t left = sizeof...(Types);
  ((names += name_of(DTYPE<Types>), names += --left > 1 ? ", " : left ? " or " : ""), ...);
  PYMEND_CHECK(result.has_value(), what, " ", name_of(dtype), ", expected ", names, after);
  return *result;
}

// Checks one operand; messages name it as `argument`, which includes its index in a list.
inline void check_operand(const std::string& argument, const Tensor& tensor, ScalarType dtype, const Tensor& beside,
                          const std::vector<int64_t>& shape) {
  PYMEND_CHECK(tensor.scalar_type() == dtype, argument, " has dtype ", name_of(tensor.scalar_type()), ", expected ",
               name_of(dtype));
  PYMEND_CHECK(tensor.device() == beside.device(), argument, " is on another device than the first operand");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || tensor.size(i) == shape[i];
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) {
    expected += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  PYMEND_CHECK(same, argument, " has shape ", shape_of(tensor), ", expected [", expected, "]");
  PYMEND_CHECK(tensor.is_contiguous(), argument, " is not contiguous");
}

}  // namespace pymend
