// Bindings of the emulated moments kernels.
#include "kernels/moments.cuh"

#include <tuple>
#include <vector>

#include "emu/bind.h"

namespace pymend {
namespace emu {
namespace {

// u, delta (addresses), rows: see Segment
using Rows = std::tuple<uintptr_t, uintptr_t, int64_t>;

// Where the moments lie, and what to do with them.
struct State {
  uintptr_t mean, m2, count, z;
  bool merge;
};

template <typename T, typename O, int BLOCK>
void moments_on(const std::vector<Rows>& segments, int64_t a, int64_t b, const State& state, int segments_per_launch,
                const Schedule& schedule) {
  int64_t row = 0;
  std::vector<uint8_t> live;
  for (size_t first = 0; first < segments.size(); first += segments_per_launch) {
    SegmentList<T> list;
    list.a = a;
    list.b = b;
    for (size_t s = first; s < segments.size() && list.count < segments_per_launch; ++s) {
      const auto& [u, delta, rows] = segments[s];
      list.item[list.count++] = {at<const T>(u), at<const T>(delta), rows, row};
      row += rows;
    }
    live.resize(row);
    int64_t before = 0;
    launch(live_rows_kernel<T, BLOCK>, list.row_blocks(), BLOCK, sizeof(LiveRowsShared<BLOCK>), &schedule, list,
           at<const int64_t>(state.count), &before, live.data());
    launch(moments_kernel<T, O, BLOCK>, list.column_blocks(BLOCK, state.merge), BLOCK, 0, &schedule, list, live.data(), &before,
           at<double>(state.mean), at<double>(state.m2), at<int64_t>(state.count), state.merge, at<O>(state.z));
  }
}

void moments(const std::string& rows, const std::string& out, const std::vector<Rows>& segments, int64_t a, int64_t b,
             uintptr_t mean, uintptr_t m2, uintptr_t count, uintptr_t z, bool merge, int segments_per_launch, int block,
             const std::string& order, uint64_t seed) {
  const State state{mean, m2, count, z, merge};
  const auto schedule = parse_schedule(order, seed);
  by_dtype<double, float>(rows, [&](auto row) {
    by_dtype<double, float>(out, [&](auto result) {
      by_block<32, 64, 256>(block, [&](auto size) {
        moments_on<decltype(row), decltype(result), size>(segments, a, b, state, segments_per_launch, schedule);
      });
    });
  });
}

}  // namespace

void bind_moments(pybind11::module_& m) {
  namespace py = pybind11;
  m.attr("MAX_SEGMENTS") = MAX_SEGMENTS;
  m.def("moments", &moments, py::arg("rows"), py::arg("out"), py::arg("segments"), py::arg("a"), py::arg("b"),
        py::arg("mean"), py::arg("m2"), py::arg("count"), py::arg("z"), py::arg("merge"),
        py::arg("segments_per_launch") = MAX_SEGMENTS, py::arg("block") = 64, py::arg("order") = "forward",
        py::arg("seed") = 0);
}

}  // namespace emu
}  // namespace pymend
