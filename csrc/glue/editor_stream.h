// Checks and gathers the operands of editor_stream.
#pragma once

#include "math/editor_stream.h"
#include "torch_glue.h"

namespace pymend {

inline bool starts_at_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Shapes and dtypes as the schema in ops.cpp says; y and scratch are still null.
template <typename W>
EditorStream<W> gather_editor_stream(const Tensor& x, const std::vector<Tensor>& v, const std::vector<Tensor>& u,
                                     const std::vector<Tensor>& bias, const std::vector<Tensor>& scale,
                                     const std::vector<Tensor>& shift, const Tensor& mode, bool residual) {
  const auto check_count = [](const char* name, const std::vector<Tensor>& of, bool may_be_none) {
    PYMEND_CHECK(of.size() == STREAM_LAYERS || (may_be_none && of.empty()), name, " has ", of.size(),
                 " entries, expected ", STREAM_LAYERS);
  };
  check_count("v", v, false);
  check_count("u", u, false);
  check_count("bias", bias, false);
  check_count("scale", scale, true);
  check_count("shift", shift, true);
  PYMEND_CHECK(scale.size() == shift.size(), "one of scale and shift is missing; give both or neither");
  check_operand("x", x, ScalarType::Float, x, {-1, -1});
  const ScalarType dtype = v[0].scalar_type();
  EditorStream<W> m{};
  m.rows = x.size(0);
  m.d = x.size(1);
  m.residual = residual;
  PYMEND_CHECK(m.rows <= MOST_STREAM_ROWS, "x has ", m.rows, " rows, at most ", MOST_STREAM_ROWS, " can be streamed");
  check_operand("v[0]", v[0], dtype, x, {-1, m.d});
  m.r = v[0].size(0);
  if (!scale.empty()) {
    check_operand("scale[0]", scale[0], dtype, x, {-1, m.d});
    m.modes = scale[0].size(0);
    check_operand("mode", mode, ScalarType::Long, x, {m.rows});
    PYMEND_CHECK(m.rows == 0 || m.modes > 0, "scale[0] has no row, and x has ", m.rows);
    m.mode = static_cast<const int64_t*>(mode.const_data_ptr());
  }
  m.x = static_cast<const float*>(x.const_data_ptr());
  m.aligned = m.d * sizeof(W) % 16 == 0 && m.r * sizeof(W) % 16 == 0;
  const auto pointer = [](const Tensor& of) { return static_cast<const W*>(of.const_data_ptr()); };
  for (int i = 0; i < STREAM_LAYERS; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    check_operand("v" + at, v[i], dtype, x, {m.r, m.d});
    check_operand("u" + at, u[i], dtype, x, {m.d, m.r});
    check_operand("bias" + at, bias[i], dtype, x, {m.d});
    m.layer[i] = {pointer(v[i]), pointer(u[i]), pointer(bias[i]), nullptr, nullptr};
    if (!scale.empty()) {
      check_operand("scale" + at, scale[i], dtype, x, {m.modes, m.d});
      check_operand("shift" + at, shift[i], dtype, x, {m.modes, m.d});
      m.layer[i].scale = pointer(scale[i]);
      m.layer[i].shift = pointer(shift[i]);
    }
    m.aligned = m.aligned && starts_at_16_bytes(m.layer[i].v) && starts_at_16_bytes(m.layer[i].u);
  }
  return m;
}

}  // namespace pymend
