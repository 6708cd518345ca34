// What the bindings of the emulated kernels share: `import _emu`, for tests only. Tensors come as addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "emu/shim.h"

namespace pymend {
namespace emu {

inline Schedule parse_schedule(const std::string& order, uint64_t seed) {
  if (order == "forward") return {Schedule::forward, seed};
  if (order == "reversed") return {Schedule::reversed, seed};
  if (order == "random") return {Schedule::random, seed};
  if (order == "last") return {Schedule::last, seed};
  throw std::invalid_argument("schedule is '" + order + "', expected forward, reversed, random or last");
}

// An address from Python as a pointer.
template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// One per file of bindings; module.cpp calls them.
void bind_editor_mlp(pybind11::module_& m);
void bind_moments(pybind11::module_& m);
void bind_rank_update(pybind11::module_& m);
void bind_token_losses(pybind11::module_& m);

}  // namespace emu
}  // namespace pymend
