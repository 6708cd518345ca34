// moments on CPU tensors; the loops are in moments_rows.cpp.
//
// Columns do not depend on each other, so the result does not depend on the number of threads.
#include "cpu/moments_rows.h"

#include <algorithm>

#include "cpu/level.h"
#include "glue/moments.h"
#include "math/ceil_div.h"

namespace pymend {
namespace {

template <typename T>
bool any_nonzero(const T* row, int64_t width) {
  return std::any_of(row, row + width, [](T x) { return x != 0; });
}

struct Cpu {
  template <typename T, typename O>
  static MomentsResult run(const MomentsArguments& x) {
    static const auto normalise_columns = choose_level<NormaliseColumns<T, O>>(PYMEND_LEVELS(normalise_columns));
    const auto segments = gather_segments<T>(x);
    const int64_t a = x.a(), b = x.b();
    const int64_t rows = segments.empty() ? 0 : segments.back().first + segments.back().rows;
    const MomentsResult result = empty_moments_result(x, rows);
    auto* live = static_cast<uint8_t*>(result.live.mutable_data_ptr());
    auto& count = *static_cast<int64_t*>(x.count.mutable_data_ptr());

    std::vector<int64_t> kept;
    int64_t seen = count;
    for (const auto& segment : segments) {
      kept.push_back(0);
      for (int64_t r = 0; r < segment.rows; ++r) {
        live[segment.first + r] = any_nonzero(segment.u + r * a, a) && any_nonzero(segment.delta + r * b, b);
        kept.back() += live[segment.first + r];
      }
      seen += kept.back();
    }
    const MomentsTask<T, O> task{segments.data(),
                                 static_cast<int64_t>(segments.size()),
                                 live,
                                 kept.data(),
                                 a,
                                 b,
                                 static_cast<double*>(x.mean.mutable_data_ptr()),
                                 static_cast<double*>(x.m2.mutable_data_ptr()),
                                 count,
                                 x.merge,
                                 static_cast<O*>(result.z.mutable_data_ptr())};
    const int64_t spans_of_u = ceil_div(a, SPAN), spans = spans_of_u + ceil_div(b, SPAN);
    parallel_for(0, spans, 1, [&](int64_t first, int64_t last) {
      for (int64_t span = first; span < last; ++span) {
        const bool of_u = span < spans_of_u;
        const int64_t begin = of_u ? span * SPAN : a + (span - spans_of_u) * SPAN;
        normalise_columns(task, begin, static_cast<int>(std::min<int64_t>(SPAN, (of_u ? a : a + b) - begin)));
      }
    });
    if (x.merge) count = seen;
    return result;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pymend, CPU, m) { m.impl("moments", TORCH_BOX(&moments<Cpu>)); }

}  // namespace pymend
