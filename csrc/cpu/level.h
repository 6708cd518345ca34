// Which of the inner loops, compiled once per level of x86-64, this machine runs: a wheel assumes no level.
#pragma once

#include <cstdlib>
#include <string>

#include "torch_glue.h"

namespace pymend {

// The best of one function's three builds for this machine; PYMEND_CPU=base, avx2 or avx512 asks for no more than that.
template <typename Function>
Function choose_level(Function base, [[maybe_unused]] Function avx2, [[maybe_unused]] Function avx512) {
#ifdef PYMEND_X86_LEVELS
  const char* wish = std::getenv("PYMEND_CPU");
  const std::string most = wish && *wish ? wish : "avx512";
  PYMEND_CHECK(most == "base" || most == "avx2" || most == "avx512", "PYMEND_CPU is '", most,
               "', expected base, avx2 or avx512");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (most == "avx512" && has_avx512) return avx512;
  if (most != "base" && has_avx2) return avx2;
#endif
  return base;
}

// The three builds of `function`, as arguments of choose_level.
#ifdef PYMEND_X86_LEVELS
#define PYMEND_LEVELS(function) base::function, avx2::function, avx512::function
#else
#define PYMEND_LEVELS(function) base::function, base::function, base::function
#endif

}  // namespace pymend
