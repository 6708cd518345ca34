// What a kernel may use: the CUDA runtime under nvcc, the emulation's shim under a host compiler.
//
// Kernels are launched by launch() and take dynamic shared memory through shared_memory<T>(), so that the same source
// runs on a GPU and on fibers.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstdint>

namespace pymend {

using Stream = cudaStream_t;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, Stream stream,
            const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(grid), block, shared, stream>>>(arguments...);
}

// Launches a kernel that may start while the one launched before it on the stream still runs, from Hopper on: the time of
// a launch is hidden. All its threads that touch what that one writes must call await_former() before. The former should
// call let_next_start(); what came before that is safe to read at once if the former was launched by launch().
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared, Stream stream,
                  const Arguments&... arguments) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 9) return launch(kernel, grid, block, shared, stream, arguments...);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Lets a kernel behind this one, launched by launch_early(), start once all blocks have called this or ended.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernel before this one has ended and its writes are seen. Nothing to do after launch().
__device__ __forceinline__ void await_former() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Tensor cores: c += a b^T for a [16, 16], b [8, 16] of bfloat16 pairs along k, c [16, 8] of float. With g = lane / 4 and
// t = lane % 4 a lane holds a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: (g, 2t), (g, 2t + 8); c: (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). All lanes of the warp must call it.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
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

#include <type_traits>

#include "math/rounding.h"

namespace pymend {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// Four neighbours that a thread loads at once, up to 16 bytes; twice 16 of double.
template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
  T of[4];
};

// Asks for the 32 bytes that a global address lies in to come to L2; nobody waits for them.
__device__ __forceinline__ void call_for_sector(const void* at) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
  static_cast<void>(at);  // a hint
#endif
}

// 16 aligned bytes that nobody reads again: they need not push others out of the caches.
__device__ __forceinline__ Four<uint32_t> load_once(const void* from) {
#ifdef __CUDACC__
  const uint4 words = __ldcs(static_cast<const uint4*>(from));
  return {{words.x, words.y, words.z, words.w}};
#else
  return *static_cast<const Four<uint32_t>*>(from);
#endif
}

// 16 aligned bytes that nobody reads soon.
__device__ __forceinline__ void store_once(void* to, const Four<uint32_t>& words) {
#ifdef __CUDACC__
  __stcs(static_cast<uint4*>(to), make_uint4(words.of[0], words.of[1], words.of[2], words.of[3]));
#else
  *static_cast<Four<uint32_t>*>(to) = words;
#endif
}

// Two elements of 16 bits in a word, each rounded to nearest, as round_to<T>() does but for the bits of a NaN.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  if constexpr (std::is_same<T, Bf16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return round_to<T>(low).bits | static_cast<uint32_t>(round_to<T>(high).bits) << 16;
#endif
}

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
