// The levels of x86-64 that the inner loops are compiled for: a wheel assumes none, cpu/level.h chooses at run time.
#pragma once

// Declares what a *_rows.cpp defines, once for each level.
#define PYMEND_IN_EVERY_LEVEL(...)     \
  namespace base {                     \
  __VA_ARGS__                          \
  }                                    \
  namespace avx2 {                     \
  __VA_ARGS__                          \
  }                                    \
  namespace avx512 {                   \
  __VA_ARGS__                          \
  }
