// rank_update on CUDA tensors.
#include "kernels/rank_update.cuh"
#include "kernels/rank_update_mma.cuh"

#include <algorithm>

#include "cuda/launcher.h"
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
struct Lists {
  const Acc<T>* step;
  Acc<T>* fidelity;
  const Tensor& alpha;
  const Launcher& launch;
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
    Tensor partial = torch::stable::new_empty(alpha, {2 * list.tiles}, ScalarType::Double);
    auto* kept = static_cast<Kept*>(partial.mutable_data_ptr());
    if (list.tiles > 0) update(kept);
    launch.early(fidelity_kernel<T, BLOCK>, list.count, BLOCK, sizeof(FidelityShared<BLOCK>), list, kept, fidelity);
    list = {};
  }

  void update(Kept* kept) {
    auto* simt = rank_update_kernel<T, BLOCK, false>;
    if constexpr (sizeof(T) == 2) {
      if (way != Way::Simt) return update_by_mma(kept);
      if (random) simt = rank_update_kernel<T, BLOCK, true>;
    }
    launch(simt, list.tiles, BLOCK, sizeof(RankUpdateShared<T, BLOCK>), list, step, kept);
  }

  void update_by_mma(Kept* kept) {
    PackedFactors packed = place_factors(list, way == Way::Strip ? HELD_STEPS : 1);
    const int64_t units = packed.first[list.count];
    Tensor words = torch::stable::new_empty(alpha, {units * UNIT_WORDS}, ScalarType::Int);
    packed.words = static_cast<uint32_t*>(words.mutable_data_ptr());
    launch(pack_factors_kernel<T, BLOCK>, ceil_div(units, BLOCK / WARP), BLOCK, 0, list, packed);
    auto* kernel = random ? rank_update_mma_kernel<T, MMA_BLOCK, true> : rank_update_mma_kernel<T, MMA_BLOCK, false>;
    int turns = static_cast<int>(strip);
    if constexpr (std::is_same<T, Bf16>::value) {
      if (way == Way::Strip) {
        kernel = rank_update_strip_kernel<MMA_BLOCK>;
        turns *= AHEAD;
      }
    }
    launch.early(kernel, list.tiles, MMA_BLOCK, sizeof(RankUpdateMmaShared<MMA_BLOCK>), list, packed, step, turns,
                 kept);
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

struct Cuda {
  using Weights = OneOf<double, float, Bf16, Fp16>;
  static constexpr const char* NOTE = "";

  template <typename T>
  static Tensor run(const RankUpdateArguments& of) {
    const auto matrices = gather_rank_update<T>(of);
    const Launcher launch("rank_update", of.weights[0]);
    const auto* step = static_cast<const Acc<T>*>(of.alpha.const_data_ptr());
    Tensor fidelity = torch::stable::empty_like(of.alpha);
    auto* fidelity_ptr = static_cast<Acc<T>*>(fidelity.mutable_data_ptr());

    const bool random = !of.seeds.empty();
    for (const Way way : {Way::Simt, Way::Strip, Way::Mma}) {
      Lists<T> next{step, fidelity_ptr, of.alpha, launch, random, way, strip_for(matrices, way)};
      for (const auto& matrix : matrices) {
        if (way_of(matrix, random) == way) next.add(matrix);
      }
      next.run();
    }
    return fidelity;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("rank_update", TORCH_BOX(&rank_update<Cuda>)); }

}  // namespace pymend
