// What the bindings of the emulated kernels share: `import _emu`, for tests only. Tensors come as addresses and sizes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "emu/shim.h"
#include "math/rounding.h"

namespace pymend {
namespace emu {

inline Schedule parse_schedule(const std::string& order, uint64_t seed) {
  if (order == "forward") return {Schedule::forward, seed};
  if (order == "reversed") return {Schedule::reversed, seed};
  if (order == "random") return {Schedule::random, seed};
  if (order == "last") return {Schedule::last, seed};
  throw std::invalid_argument("schedule is '" + order + "', expected forward, reversed, random or last");
}

// Calls body(T()) for the T among Types that goes by this name.
template <typename T>
constexpr const char* NAME = "float32";
template <>
constexpr const char* NAME<double> = "float64";
template <>
constexpr const char* NAME<Bf16> = "bfloat16";
template <>
constexpr const char* NAME<Fp16> = "float16";

template <typename... Types, typename Body>
void by_dtype(const std::string& dtype, const Body& body) {
  if (!((dtype == NAME<Types> && (body(Types()), true)) || ...)) {
    throw std::invalid_argument("dtype is '" + dtype + "'");
  }
}

// Calls body(std::integral_constant<int, block>()) for a block among BLOCKS.
template <int... BLOCKS, typename Body>
void by_block(int block, const Body& body) {
  if (!((block == BLOCKS && (body(std::integral_constant<int, BLOCKS>()), true)) || ...)) {
    std::string all;
    size_t left = sizeof...(BLOCKS);
    ((all += std::to_string(BLOCKS), all += --left > 1 ? ", " : left ? " or " : ""), ...);
    throw std::invalid_argument("block is " + std::to_string(block) + ", expected " + all);
  }
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
