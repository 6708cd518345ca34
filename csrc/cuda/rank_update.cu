// rank_update on CUDA tensors: checks, launches on torch's current stream.
#include "kernels/rank_update.cuh"

#include "glue/rank_update.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;

template <typename T>
Tensor run(const std::vector<Tensor>& weights, const std::vector<Tensor>& u, const std::vector<Tensor>& delta,
           const Tensor& alpha, const std::vector<bool>& transposed) {
  const auto matrices = gather_rank_update<T>(weights, u, delta, alpha, transposed);
  const DeviceGuard guard(weights[0].get_device_index());
  const auto stream = static_cast<Stream>(current_stream(weights[0].get_device_index()));
  const auto* step = static_cast<const Acc<T>*>(alpha.const_data_ptr());
  Tensor fidelity = torch::stable::empty_like(alpha);
  auto* fidelity_ptr = static_cast<Acc<T>*>(fidelity.mutable_data_ptr());

  for (size_t first = 0; first < matrices.size(); first += MAX_MATRICES) {
    RankUpdateList<T> list;
    for (size_t i = first; i < matrices.size() && list.count < MAX_MATRICES; ++i) {
      append(list, matrices[i], TILE_ROWS, BLOCK);
    }
    PYMEND_CHECK(list.tiles <= INT32_MAX, "weights[", first, "] and the next ", list.count - 1,
                 " make more tiles than a grid has blocks: ", list.tiles);
    Tensor partial = torch::stable::new_empty(alpha, {2 * list.tiles}, ScalarType::Double);
    auto* kept = static_cast<Kept*>(partial.mutable_data_ptr());
    if (list.tiles > 0) {
      launch(rank_update_kernel<T, BLOCK>, list.tiles, BLOCK, sizeof(RankUpdateShared<T, BLOCK>), stream, list,
             step + first, kept);
    }
    launch(fidelity_kernel<T, BLOCK>, list.count, BLOCK, sizeof(FidelityShared<BLOCK>), stream, list, kept,
           fidelity_ptr + first);
  }
  const cudaError_t error = cudaGetLastError();
  PYMEND_CHECK(error == cudaSuccess, "rank_update could not be launched: ", cudaGetErrorString(error));
  return fidelity;
}

Tensor rank_update(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> delta, Tensor alpha,
                   std::vector<bool> transposed) {
  PYMEND_CHECK(!weights.empty(), "weights is empty");
  switch (weights[0].scalar_type()) {
    case ScalarType::Double:
      return run<double>(weights, u, delta, alpha, transposed);
    case ScalarType::Float:
      return run<float>(weights, u, delta, alpha, transposed);
    case ScalarType::BFloat16:
      return run<Bf16>(weights, u, delta, alpha, transposed);
    case ScalarType::Half:
      return run<Fp16>(weights, u, delta, alpha, transposed);
    default:
      PYMEND_CHECK(false, "weights[0] has dtype ", name_of(weights[0].scalar_type()),
                   ", expected Double, Float, BFloat16 or Half");
  }
  return alpha;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("rank_update", TORCH_BOX(&rank_update)); }

}  // namespace pymend
