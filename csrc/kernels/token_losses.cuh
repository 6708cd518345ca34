// token_losses on a GPU: NLL, KL and argmaxes of rows of logits in one pass, and their gradient in another.
//
// Formula    math/token_losses.h; the edit and locality losses of MEND (Mitchell et al. 2022, Eq. 4). Sums in fp32 (fp64
//            for fp64), by online softmax: maximum, sum of exponentials and the cross sum of the KL together.
// Layout     Forward: one block per row. A thread takes every BLOCK-th element, BATCH at a time, and brings its sums to
//            the batch's maximum once; threads meet by shuffles, warps through shared memory, in a fixed order. Backward:
//            one block per tile of BLOCK * BATCH elements of one row.
// Bytes      Forward: sizeof(T) per element of logits and of base. Backward: the same, and sizeof(T) written.
// Caller     Rows contiguous, blockDim = BLOCK, grid = rows (backward: rows * gradient_tiles), shared memory of
//            sizeof(TokenLossesShared) (backward: none).
#pragma once

#include "device.h"
#include "math/token_losses.h"

namespace pymend {

constexpr int BATCH = 4;

template <typename T, int BLOCK>
struct TokenLossesShared {
  RowSums<Acc<T>> part[BLOCK / WARP];
};

// Adds the sums of the lane that differs in the bits of `lanes`.
template <typename A>
__device__ __forceinline__ Softmax<A> shuffled(const Softmax<A>& mine, int lanes) {
  return {__shfl_xor_sync(ALL_LANES, mine.max, lanes), __shfl_xor_sync(ALL_LANES, mine.sum, lanes),
          __shfl_xor_sync(ALL_LANES, mine.best, lanes)};
}

// Sums of one batch of a thread: elements first, first + BLOCK, ... of one row.
template <typename T, int BLOCK, bool WITH_BASE>
__device__ __forceinline__ RowSums<Acc<T>> read_batch(const T* logits, const T* base, int64_t first, int64_t end) {
  using A = Acc<T>;
  RowSums<A> sums;
  A x[BATCH], b[BATCH];
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    const int64_t j = first + i * BLOCK;
    x[i] = j < end ? widen(logits[j]) : -static_cast<A>(INFINITY);  // adds nothing to any sum
    b[i] = WITH_BASE && j < end ? widen(base[j]) : -static_cast<A>(INFINITY);
    sums.edited.look(x[i], j);
    if (WITH_BASE) sums.base.look(b[i], j);
  }
  const A edited_origin = origin_of(sums.edited.max), base_origin = origin_of(sums.base.max);
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    sums.edited.sum += exp_down(x[i] - edited_origin);
    if (WITH_BASE) {
      const A e = exp_down(b[i] - base_origin);
      sums.base.sum += e;
      sums.cross += cross_term(e, b[i] - base_origin, x[i] - edited_origin);
    }
  }
  return sums;
}

template <typename T, int BLOCK, bool WITH_BASE>
__global__ void token_losses_kernel(const TokenLosses<T> m) {
  auto& shared = shared_memory<TokenLossesShared<T, BLOCK>>();
  const int64_t row = blockIdx.x;
  const T* logits = m.logits + row * m.logits_stride;
  const T* base = WITH_BASE ? m.base + row * m.base_stride : nullptr;
  RowSums<Acc<T>> sums;
  for (int64_t first = threadIdx.x; first < m.vocabulary; first += BLOCK * BATCH) {
    sums.add(read_batch<T, BLOCK, WITH_BASE>(logits, base, first, m.vocabulary));
  }
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    sums.add({shuffled(sums.edited, lanes), shuffled(sums.base, lanes), __shfl_xor_sync(ALL_LANES, sums.cross, lanes)});
  }
  if (threadIdx.x % WARP == 0) shared.part[threadIdx.x / WARP] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < BLOCK / WARP; ++warp) sums.add(shared.part[warp]);
  write_row(m, row, sums);
}

template <int BLOCK>
PYMEND_INLINE constexpr int64_t gradient_tiles(int64_t vocabulary) {
  return (vocabulary + BLOCK * BATCH - 1) / (BLOCK * BATCH);
}

template <typename T, int BLOCK, bool WITH_BASE>
__global__ void token_losses_backward_kernel(const TokenLossesGradient<T> m) {
  const int64_t tiles = gradient_tiles<BLOCK>(m.losses.vocabulary);
  const int64_t row = blockIdx.x / tiles;
  const auto gradient = gradient_of(m, row);
  const T* logits = m.losses.logits + row * m.losses.logits_stride;
  const T* base = WITH_BASE ? m.losses.base + row * m.losses.base_stride : nullptr;
  T* grad = m.grad + row * m.losses.vocabulary;
#pragma unroll
  for (int i = 0; i < BATCH; ++i) {
    const int64_t j = (blockIdx.x % tiles * BATCH + i) * BLOCK + threadIdx.x;
    if (j < m.losses.vocabulary) {
      const Acc<T> x = widen(logits[j]);
      const Acc<T> hit = j == gradient.target ? gradient.nll : Acc<T>(0);
      const Acc<T> value = (WITH_BASE ? gradient.at(x, widen(base[j])) : gradient.at(x)) - hit;
      grad[j] = round_to<T>(gradient.zero() ? Acc<T>(0) : value);
    }
  }
}

}  // namespace pymend
