// What a kernel may use: the CUDA runtime under nvcc, the emulation's shim under a host compiler.
//
// Kernels are launched by launch() and take dynamic shared memory through shared_memory<T>(), so that the same source
// runs on a GPU and on fibers.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

namespace pymend {

using Stream = cudaStream_t;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, Stream stream,
            const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(grid), block, shared, stream>>>(arguments...);
}

template <typename T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char raw[];
  return *reinterpret_cast<T*>(raw);
}

}  // namespace pymend

#else
#include "emu/shim.h"
#endif

namespace pymend {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// Sum over a block of BLOCK threads, in an order that depends on BLOCK alone; every thread gets it.
// All threads of the block must call it. `scratch`: shared, one double per warp, free for reuse on return.
template <int BLOCK>
__device__ __forceinline__ double block_sum(double value, double* scratch) {
  static_assert(BLOCK % WARP == 0, "a block is made of whole warps");
  for (int lane = WARP / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(ALL_LANES, value, lane);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < BLOCK / WARP; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

}  // namespace pymend
