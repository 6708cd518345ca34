// Host emulation of the part of CUDA that our kernels use: one fiber per thread, one block at a time.
//
// A barrier is a switch to the scheduler; blocks and threads run in the order that a Schedule gives; shared memory
// starts as NaN bits. It shows faults of logic: missing or divergent barriers, index errors (with AddressSanitizer),
// results that depend on the order, wrong lanes of a tensor-core fragment. It cannot show: memory ordering and true races,
// warp divergence, how tensor cores round their sums, asynchronous copies, occupancy, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() pymend::emu::sync_block(__LINE__)
#define mma_bf16(c, a, b) pymend::emu::mma(c, a, b, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) pymend::emu::shuffle_xor(mask, value, lanes, __LINE__)

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
// Of the running fiber; the scheduler sets them before it switches.
inline Dim3 threadIdx, blockIdx;

namespace pymend {
namespace emu {

struct Schedule {
  // `last` runs no block but the last: of operands too large for this machine, only what that block touches exists.
  enum Order { forward, reversed, random, last } order = forward;
  uint64_t seed = 0;  // of `random`
};

// Ends a fiber's turn until all threads of its block (of its warp) have come to the same line.
void sync_block(int line);
void sync_warp(int line);

uint64_t exchange(uint64_t bits, unsigned other_lane, int line);  // my bits against those of a lane of my warp
void* shared_memory();

// One tensor-core product of a warp, as device.h describes it; sums run in float, k upwards.
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line);

// Runs body() once per thread of every block. Throws std::runtime_error where threads part ways at a barrier.
void run(int64_t grid, int block, size_t shared, const Schedule& schedule, const std::function<void()>& body);

template <typename T>
T shuffle_xor(unsigned mask, T value, int lanes, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 64 bits");
  static_cast<void>(mask);  // our kernels shuffle whole warps; exchange() checks that all lanes come
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, (threadIdx.x ^ static_cast<unsigned>(lanes)) % 32, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emu

using Stream = const emu::Schedule*;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, Stream stream,
            const Arguments&... arguments) {
  emu::run(grid, block, shared, *stream, [&] { kernel(arguments...); });
}

// Kernels run one after the other here.
inline void let_next_start() {}
inline void await_former() {}

template <typename T>
T& shared_memory() {
  return *static_cast<T*>(emu::shared_memory());
}

}  // namespace pymend
