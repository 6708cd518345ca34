// moments on CUDA tensors.
#include "kernels/moments.cuh"

#include "cuda/launcher.h"
#include "glue/moments.h"

namespace pymend {
namespace {

constexpr int ROWS_BLOCK = 256;
constexpr int COLUMNS_BLOCK = 64;  // a few thousand columns: small blocks spread them over the device

struct Cuda {
  template <typename T, typename O>
  static MomentsResult run(const MomentsArguments& x) {
    const auto segments = gather_segments<T>(x);
    const Launcher launch("moments", x.mean);
    const int64_t columns = x.a() + x.b();
    const int64_t rows = segments.empty() ? 0 : segments.back().first + segments.back().rows;
    MomentsResult result = empty_moments_result(x, rows);
    if (rows == 0 || columns == 0) {
      torch::stable::zero_(result.live);  // a row of nothing is dead
      return result;
    }
    Tensor before = torch::stable::new_empty(x.mean, {1}, ScalarType::Long);
    auto* live_ptr = static_cast<uint8_t*>(result.live.mutable_data_ptr());
    auto* before_ptr = static_cast<int64_t*>(before.mutable_data_ptr());
    auto* count_ptr = static_cast<int64_t*>(x.count.mutable_data_ptr());

    for (size_t first = 0; first < segments.size(); first += MAX_SEGMENTS) {
      SegmentList<T> list;
      list.a = x.a();
      list.b = x.b();
      for (size_t s = first; s < segments.size() && list.count < MAX_SEGMENTS; ++s) list.item[list.count++] = segments[s];
      launch(live_rows_kernel<T, ROWS_BLOCK>, list.row_blocks(), ROWS_BLOCK, sizeof(LiveRowsShared<ROWS_BLOCK>), list,
             count_ptr, before_ptr, live_ptr);
      launch(moments_kernel<T, O, COLUMNS_BLOCK>, list.column_blocks(COLUMNS_BLOCK, x.merge), COLUMNS_BLOCK, 0, list,
             live_ptr, before_ptr, static_cast<double*>(x.mean.mutable_data_ptr()),
             static_cast<double*>(x.m2.mutable_data_ptr()), count_ptr, x.merge,
             static_cast<O*>(result.z.mutable_data_ptr()));
    }
    return result;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CUDA, m) { m.impl("moments", TORCH_BOX(&moments<Cuda>)); }

}  // namespace pymend
