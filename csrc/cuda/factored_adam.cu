// factored_adam on CUDA tensors: checks, one launch on torch's current stream.
#include "kernels/factored_adam.cuh"

#include "glue/factored_adam.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

void factored_adam(Tensor param, Tensor exp_avg, Tensor exp_avg_sq, Tensor left, Tensor right, Tensor scale, double lr,
                   double beta1, double beta2, double eps, int64_t step) {
  const FactoredAdam f =
      gather_factored_adam(param, exp_avg, exp_avg_sq, left, right, scale, lr, beta1, beta2, eps, step);
  const int64_t tiles = OuterTile<float, BLOCK>::count(f.rows, f.cols);
  if (tiles == 0) return;
  PYMEND_CHECK(tiles <= INT32_MAX, "param makes more tiles than a grid has blocks: ", tiles);
  const DeviceGuard guard(param.get_device_index());
  const auto stream = static_cast<Stream>(current_stream(param.get_device_index()));
  launch(factored_adam_kernel<BLOCK>, tiles, BLOCK, sizeof(OuterTileShared<float, BLOCK>), stream, f);
  const cudaError_t error = cudaGetLastError();
  PYMEND_CHECK(error == cudaSuccess, "factored_adam could not be launched: ", cudaGetErrorString(error));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("factored_adam", TORCH_BOX(&factored_adam)); }

}  // namespace pymend
