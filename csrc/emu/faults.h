// Kernels with planted faults: tests show that the emulation catches each.
#pragma once

#include "device.h"

namespace pymend {
namespace faults {

// Reverses 64 values through shared memory; right with the barrier, wrong without.
template <bool BARRIER>
__global__ void reverse_kernel(const float* in, float* out) {
  float* staged = &shared_memory<float>();
  staged[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = staged[63 - threadIdx.x];
}

// One thread leaves before the barrier.
__global__ void divergent_kernel() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

// Half of a warp takes part in a shuffle.
__global__ void half_warp_kernel(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
}

}  // namespace faults
}  // namespace pymend
