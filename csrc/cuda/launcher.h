// Launches of one op: on the device of an operand and on torch's current stream there, each checked.
#pragma once

#include "device.h"
#include "torch_glue.h"

namespace pymend {

class Launcher {
 public:
  Launcher(const char* op, const Tensor& operand)
      : op_(op),
        guard_(operand.get_device_index()),
        stream_(static_cast<Stream>(current_stream(operand.get_device_index()))) {}

  // An empty grid is nothing to do.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared,
                  const Arguments&... arguments) const {
    if (fits(grid)) launch(kernel, grid, block, shared, stream_, arguments...);
    check();
  }

  // See launch_early() in device.h.
  template <typename... Parameters, typename... Arguments>
  void early(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared,
             const Arguments&... arguments) const {
    if (fits(grid)) launch_early(kernel, grid, block, shared, stream_, arguments...);
    check();
  }

 private:
  bool fits(int64_t grid) const {
    PYMEND_CHECK(grid <= INT32_MAX, op_, " was given operands for more blocks than a grid has: ", grid);
    return grid > 0;
  }

  void check() const {
    const cudaError_t error = cudaGetLastError();
    PYMEND_CHECK(error == cudaSuccess, op_, " could not be launched: ", cudaGetErrorString(error));
  }

  const char* op_;
  DeviceGuard guard_;
  Stream stream_;
};

}  // namespace pymend
