// editor_stream on CUDA tensors: checks, scratch, one cooperative launch on torch's current stream.
#include "kernels/editor_stream.cuh"

#include "glue/editor_stream.h"

namespace pymend {
namespace {

// Shared memory leaves room for one block on an SM, and so a thread has all the registers it can address.
constexpr int BLOCK = 256;

void check(cudaError_t error) {
  PYMEND_CHECK(error == cudaSuccess, "editor_stream could not be launched: ", cudaGetErrorString(error));
}

template <typename W>
auto* kernel_for(int64_t rows) {
  switch (stream_step(rows)) {
    case 8:
      return editor_stream_kernel<W, 8, BLOCK>;
    case 16:
      return editor_stream_kernel<W, 16, BLOCK>;
    case 32:
      return editor_stream_kernel<W, 32, BLOCK>;
    default:
      return editor_stream_kernel<W, 64, BLOCK>;
  }
}

template <typename W>
Tensor run(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
           const std::vector<Tensor>& bias, const std::vector<Tensor>& scale, const std::vector<Tensor>& shift,
           const Tensor& mode, bool residual) {
  auto m = gather_editor_stream<W>(x, v, u, bias, scale, shift, mode, residual);
  const DeviceGuard guard(x.get_device_index());
  const auto stream = static_cast<Stream>(current_stream(x.get_device_index()));
  Tensor y = torch::stable::empty_like(x);
  if (m.rows == 0 || m.d == 0) return y;
  const auto scratch = [&x](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(x, std::vector<int64_t>{size}, dtype);
  };
  Tensor partial = scratch(partial_floats(m.rows, m.d, m.r), ScalarType::Float);
  Tensor a = scratch(m.rows * m.r, ScalarType::Float);
  Tensor between = scratch(m.rows * m.d, ScalarType::Float);
  Tensor arrived = scratch(1, ScalarType::Int);
  m.y = static_cast<float*>(y.mutable_data_ptr());
  m.partial = static_cast<float*>(partial.mutable_data_ptr());
  m.a = static_cast<float*>(a.mutable_data_ptr());
  m.between = static_cast<float*>(between.mutable_data_ptr());
  m.arrived = static_cast<unsigned*>(arrived.mutable_data_ptr());
  check(cudaMemsetAsync(m.arrived, 0, sizeof *m.arrived, stream));
  int blocks = 0;
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  launch_together(kernel_for<W>(m.rows), blocks, BLOCK, STAGED * sizeof(float), stream, m);
  check(cudaGetLastError());
  return y;
}

Tensor editor_stream(Tensor x, std::vector<Tensor> v, std::vector<Tensor> u, std::vector<Tensor> bias,
                     std::vector<Tensor> scale, std::vector<Tensor> shift, Tensor mode, bool residual) {
  const ScalarType dtype = v.empty() ? ScalarType::Float : v[0].scalar_type();
  PYMEND_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "v[0] has dtype ", name_of(dtype),
               ", expected Float or BFloat16");
  return dtype == ScalarType::Float ? run<float>(x, v, u, bias, scale, shift, mode, residual)
                                    : run<Bf16>(x, v, u, bias, scale, shift, mode, residual);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("editor_stream", TORCH_BOX(&editor_stream)); }

}  // namespace pymend
