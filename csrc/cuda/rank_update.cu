// rank_update on CUDA tensors: checks, launches on torch's current stream.
#include "kernels/rank_update.cuh"
#include "kernels/rank_update_mma.cuh"

#include <algorithm>

#include "glue/rank_update.h"

namespace pymend {
namespace {

constexpr int BLOCK = 256;
constexpr int MMA_BLOCK = 128;
// A block goes down so many tiles of its kernel that there is work for about three waves of blocks, and at most these.
constexpr int64_t LONGEST_STRIP = 8, TILES_FOR_WAVES = 132 * 3 * 3;

enum class Way { Simt, Strip, Mma };

template <typename T>
Way way_of(const RankUpdate<T>& matrix, bool random) {
  if (sizeof(T) != 2 || matrix.n <= FEW) return Way::Simt;
  return fits_strip(matrix, random) ? Way::Strip : Way::Mma;
}

// Elements of a tile of each way.
struct Shape {
  int64_t rows, cols;
};
template <typename T>
Shape tile_of(Way way) {
  if (way == Way::Simt) return {OuterTile<Acc<T>, BLOCK>::ROWS, OuterTile<Acc<T>, BLOCK>::COLS};
  if (way == Way::Strip) return {AHEAD * UNIT, STRIP_COLS<MMA_BLOCK>};
  return {MmaTile<MMA_BLOCK>::ROWS, MmaTile<MMA_BLOCK>::COLS};
}

// Gathers matrices for one of the kernels and launches it whenever a list is full.
template <typename T>
struct Launcher {
  const Acc<T>* step;
  Acc<T>* fidelity;
  const Tensor& alpha;
  Stream stream;
  bool random;
  Way way;
  int64_t strip;  // tiles of a block
  RankUpdateList<T> list;

  void add(const RankUpdate<T>& matrix) {
    if (list.count == MAX_MATRICES) run();
    append(list, matrix, strip * tile_of<T>(way).rows, tile_of<T>(way).cols);
  }

  void run() {
    if (list.count == 0) return;
    PYMEND_CHECK(list.tiles <= INT32_MAX, "weights[", list.item[0].index, "] and the next ", list.count - 1,
                 " make more tiles than a grid has blocks: ", list.tiles);
    Tensor partial = torch::stable::new_empty(alpha, {2 * list.tiles}, ScalarType::Double);
    auto* kept = static_cast<Kept*>(partial.mutable_data_ptr());
    if (list.tiles > 0) update(kept);
    launch_early(fidelity_kernel<T, BLOCK>, list.count, BLOCK, sizeof(FidelityShared<BLOCK>), stream, list, kept,
                 fidelity);
    list = {};
  }

  void update(Kept* kept) {
    auto* simt = rank_update_kernel<T, BLOCK, false>;
    if constexpr (sizeof(T) == 2) {
      if (way != Way::Simt) return update_by_mma(kept);
      if (random) simt = rank_update_kernel<T, BLOCK, true>;
    }
    launch(simt, list.tiles, BLOCK, sizeof(RankUpdateShared<T, BLOCK>), stream, list, step, kept);
  }

  void update_by_mma(Kept* kept) {
    PackedFactors packed = place_factors(list, way == Way::Strip ? HELD_STEPS : 1);
    const int64_t units = packed.first[list.count];
    Tensor words = torch::stable::new_empty(alpha, {units * UNIT_WORDS}, ScalarType::Int);
    packed.words = static_cast<uint32_t*>(words.mutable_data_ptr());
    launch(pack_factors_kernel<T, BLOCK>, ceil_div(units, BLOCK / WARP), BLOCK, 0, stream, list, packed);
    auto* kernel = random ? rank_update_mma_kernel<T, MMA_BLOCK, true> : rank_update_mma_kernel<T, MMA_BLOCK, false>;
    int turns = static_cast<int>(strip);
    if constexpr (std::is_same<T, Bf16>::value) {
      if (way == Way::Strip) {
        kernel = rank_update_strip_kernel<MMA_BLOCK>;
        turns *= AHEAD;
      }
    }
    launch_early(kernel, list.tiles, MMA_BLOCK, sizeof(RankUpdateMmaShared<MMA_BLOCK>), stream, list, packed, step,
                 turns, kept);
  }
};

template <typename T>
int64_t strip_for(const std::vector<RankUpdate<T>>& matrices, Way way) {
  if (way == Way::Simt) return 1;
  int64_t tiles = 0;
  for (const auto& m : matrices) {
    tiles += ceil_div(m.rows, tile_of<T>(way).rows) * ceil_div(m.cols, tile_of<T>(way).cols);
  }
  return std::clamp(tiles / TILES_FOR_WAVES, int64_t{1}, way == Way::Strip ? LONGEST_STRIP / AHEAD : LONGEST_STRIP);
}

template <typename T>
Tensor run(const std::vector<Tensor>& weights, const std::vector<Tensor>& u, const std::vector<Tensor>& delta,
           const Tensor& alpha, const std::vector<bool>& transposed, const std::vector<int64_t>& seeds) {
  const auto matrices = gather_rank_update<T>(weights, u, delta, alpha, transposed, seeds);
  const DeviceGuard guard(weights[0].get_device_index());
  const auto stream = static_cast<Stream>(current_stream(weights[0].get_device_index()));
  const auto* step = static_cast<const Acc<T>*>(alpha.const_data_ptr());
  Tensor fidelity = torch::stable::empty_like(alpha);
  auto* fidelity_ptr = static_cast<Acc<T>*>(fidelity.mutable_data_ptr());

  const bool random = !seeds.empty();
  for (const Way way : {Way::Simt, Way::Strip, Way::Mma}) {
    Launcher<T> next{step, fidelity_ptr, alpha, stream, random, way, strip_for(matrices, way)};
    for (const auto& matrix : matrices) {
      if (way_of(matrix, random) == way) next.add(matrix);
    }
    next.run();
  }
  const cudaError_t error = cudaGetLastError();
  PYMEND_CHECK(error == cudaSuccess, "rank_update could not be launched: ", cudaGetErrorString(error));
  return fidelity;
}

Tensor rank_update(std::vector<Tensor> weights, std::vector<Tensor> u, std::vector<Tensor> delta, Tensor alpha,
                   std::vector<bool> transposed, std::vector<int64_t> seeds) {
  PYMEND_CHECK(!weights.empty(), "weights is empty");
  switch (weights[0].scalar_type()) {
    case ScalarType::Double:
      return run<double>(weights, u, delta, alpha, transposed, seeds);
    case ScalarType::Float:
      return run<float>(weights, u, delta, alpha, transposed, seeds);
    case ScalarType::BFloat16:
      return run<Bf16>(weights, u, delta, alpha, transposed, seeds);
    case ScalarType::Half:
      return run<Fp16>(weights, u, delta, alpha, transposed, seeds);
    default:
      PYMEND_CHECK(false, "weights[0] has dtype ", name_of(weights[0].scalar_type()),
                   ", expected Double, Float, BFloat16 or Half");
  }
  return alpha;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("rank_update", TORCH_BOX(&rank_update)); }

}  // namespace pymend
