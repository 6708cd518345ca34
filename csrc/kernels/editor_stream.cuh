// editor_stream on a GPU: both layers of the editor's network for at most 64 rows, in one cooperative launch.
//
// Formula    math/editor_stream.h (MEND, Mitchell et al. 2022, Eq. 3), forward only. fp32 multiply-adds, for float and
//            for bfloat16 weights.
// Layout     Four products in turn, x V^T and a U^T of each layer; after each, the grid meets, adds up the slices'
//            partial sums and meets again. A product is cut into units of TOGETHER weight rows by one slice of their
//            width, slice by slice, and every block takes an equal run of units: it stages all activations of a slice
//            in shared memory and keeps them for as long as its run stays there. A warp takes a unit: LANES lanes go
//            along the weight rows, 16 bytes of each at a time, and the sums of HELD rows of activations by TOGETHER
//            weight rows stay in registers; with more than HELD rows, groups of lanes load the same weights and take
//            other rows. Sums of lanes are added in a tree.
// Bytes      Each weight once, 4 r d sizeof(W) in all. From L2: activations, of its slices for each block; partial
//            sums, written and read once, rows / slice of the weights' number each.
//            From some 32 rows of bfloat16 weights on the multiply-adds take longer than the bytes: tensor cores are a
//            later step. Another one is to load the next product's first weights before the grid meets: they do not
//            depend on activations.
// Caller     Operands as in EditorStream<W>, 0 < rows <= ROWS, every mode[row] in [0, modes); blockDim = BLOCK; shared
//            memory of sizeof(EditorStreamShared); launch_together() with any number of blocks, one per SM for speed.
//            The result depends neither on BLOCK nor on the number of blocks.
#pragma once

#include "device.h"
#include "math/editor_stream.h"

namespace pymend {

template <typename W, int ROWS>
struct StreamShape {
  static constexpr int TOGETHER = 4;                      // 4 multiply-adds for each float read from shared memory
  static constexpr int HELD = ROWS < 16 ? ROWS : 16;      // with TOGETHER, 64 sums in registers
  static constexpr int SUMS = HELD * TOGETHER;            // [row][weight row]
  static constexpr int LANES = WARP * HELD / ROWS;
  static constexpr int CHUNK = 16 / sizeof(W);            // weights in 16 bytes
  static constexpr int SPAN = LANES * CHUNK;              // of a weight row, loaded by a warp at a time
  static constexpr int AHEAD = 2;                         // spans: with 8 warps about 20 KiB on their way to an SM
  static constexpr int SLICE = STAGED / ROWS;
  static_assert(SLICE % SPAN == 0 && SUMS % LANES == 0, "lanes share slices and sums evenly");
};

// [row][place]: within each span all first four of the lanes' chunks, then all second four, so that neighbouring lanes
// read neighbouring 16 bytes.
template <int ROWS>
struct EditorStreamShared {
  alignas(16) float x[ROWS][STAGED / ROWS];
};

// One of the four products: weights [count, width] on x [rows, width].
template <typename W>
struct StreamProduct {
  const W* weights;
  const float* x;
  int64_t count, width;
};

// Element i of 16 bytes of weights.
template <typename W>
PYMEND_INLINE float weight_in(const Four<uint32_t>& words, int i) {
  if constexpr (sizeof(W) == 4) return from_bits(words.of[i]);
  return from_bits(i % 2 ? words.of[i / 2] & 0xFFFF0000u : words.of[i / 2] << 16);
}
PYMEND_INLINE uint32_t bits_of(float x) { return to_bits(x); }
PYMEND_INLINE uint32_t bits_of(Bf16 x) { return x.bits; }

// The same 16 bytes one element at a time, with zeros from `end` on.
template <typename W>
__device__ __forceinline__ Four<uint32_t> load_apart(const W* from, int end) {
  constexpr int EACH = 4 / sizeof(W);
  Four<uint32_t> words = {};
#pragma unroll
  for (int i = 0; i < 4 * EACH; ++i) {
    if (i < end) words.of[i / EACH] |= bits_of(from[i]) << (32 / EACH * (i % EACH));
  }
  return words;
}

// Stages x[:, first : first + depth], with zeros up to a whole span and up to ROWS rows.
template <typename W, int ROWS, int BLOCK>
__device__ __forceinline__ void stage(const float* x, int64_t rows, int64_t width, int64_t first, int depth,
                                      EditorStreamShared<ROWS>& shared) {
  using Shape = StreamShape<W, ROWS>;
  const int padded = static_cast<int>(ceil_div(depth, Shape::SPAN)) * Shape::SPAN;
  for (int i = threadIdx.x; i < ROWS * padded; i += BLOCK) {
    const int row = i / padded, k = i % padded, in_span = k % Shape::SPAN;
    const int lane = in_span / Shape::CHUNK, quarter = in_span % Shape::CHUNK / 4;
    const int place = k - in_span + quarter * 4 * Shape::LANES + lane * 4 + k % 4;
    shared.x[row][place] = row < rows && k < depth ? x[row * width + first + k] : 0.0f;
  }
}

// Adds each of the first KEPT sums over LANES lanes, in halves: a lane keeps one half and gives the other away. Leaves
// in sum[0 : KEPT / LANES] of lane `along` the sums from along * KEPT / LANES on.
template <int LANES, int KEPT, int COUNT>
__device__ __forceinline__ void add_lanes(float (&sum)[COUNT], int along) {
  if constexpr (LANES > 1) {
    const bool upper = along & (LANES / 2);
#pragma unroll
    for (int i = 0; i < KEPT / 2; ++i) {
      const float low = sum[i], high = sum[i + KEPT / 2];
      sum[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, LANES / 2);
    }
    add_lanes<LANES / 2, KEPT / 2>(sum, along);
  }
}

// Partial sums [slice, row, weight row] of the units that fall to this block.
template <typename W, int ROWS, int BLOCK>
__device__ __forceinline__ void stream_units(const EditorStream<W>& m, const StreamProduct<W>& product,
                                             EditorStreamShared<ROWS>& shared) {
  using Shape = StreamShape<W, ROWS>;
  const int warp = threadIdx.x / WARP, along = threadIdx.x % WARP % Shape::LANES;
  const int first_row = threadIdx.x % WARP / Shape::LANES * Shape::HELD;
  const int64_t groups = ceil_div(product.count, Shape::TOGETHER);
  const int64_t units = groups * ceil_div(product.width, Shape::SLICE);
  const int64_t end = units * (blockIdx.x + 1) / gridDim.x;
  for (int64_t unit = units * blockIdx.x / gridDim.x; unit < end;) {
    const int64_t slice = unit / groups, from = slice * Shape::SLICE;
    const int64_t stop = end < (slice + 1) * groups ? end : (slice + 1) * groups;
    const int depth = product.width - from < Shape::SLICE ? static_cast<int>(product.width - from) : Shape::SLICE;
    __syncthreads();  // the previous slice has been read
    stage<W, ROWS, BLOCK>(product.x, m.rows, product.width, from, depth, shared);
    __syncthreads();
    for (int64_t mine = unit + warp; mine < stop; mine += BLOCK / WARP) {
      const int64_t first = (mine - slice * groups) * Shape::TOGETHER;
      const W* weights[Shape::TOGETHER];
#pragma unroll
      for (int j = 0; j < Shape::TOGETHER; ++j) {  // past the edge the last row again, and nothing is written for it
        const int64_t row = first + j < product.count ? first + j : product.count - 1;
        weights[j] = product.weights + row * product.width + from;
      }
      float sum[Shape::SUMS] = {};
      Four<uint32_t> next[Shape::AHEAD][Shape::TOGETHER] = {};  // on their way while others are multiplied
      for (int k = along * Shape::CHUNK - Shape::AHEAD * Shape::SPAN; k < depth; k += Shape::SPAN) {
        const int then = k + Shape::AHEAD * Shape::SPAN;
        Four<uint32_t> now[Shape::TOGETHER];
#pragma unroll
        for (int j = 0; j < Shape::TOGETHER; ++j) {
          now[j] = next[0][j];
#pragma unroll
          for (int i = 1; i < Shape::AHEAD; ++i) next[i - 1][j] = next[i][j];
        }
        if (m.aligned && then < depth) {
#pragma unroll
          for (int j = 0; j < Shape::TOGETHER; ++j) next[Shape::AHEAD - 1][j] = load_once(weights[j] + then);
        } else {
#pragma unroll
          for (int j = 0; j < Shape::TOGETHER; ++j) {
            next[Shape::AHEAD - 1][j] = load_apart(weights[j] + then, depth - then);
          }
        }
        if (k < 0) continue;  // the first are still on their way
#pragma unroll
        for (int i = 0; i < Shape::CHUNK / 4 * Shape::HELD; ++i) {
          const int quarter = i / Shape::HELD, row = i % Shape::HELD;
          // The place of this quarter of the lane's chunk: see EditorStreamShared.
          const int place = k - along * (Shape::CHUNK - 4) + quarter * 4 * Shape::LANES;
          const auto x = *reinterpret_cast<const Four<float>*>(&shared.x[first_row + row][place]);
#pragma unroll
          for (int j = 0; j < 4 * Shape::TOGETHER; ++j) {
            sum[row * Shape::TOGETHER + j / 4] += x.of[j % 4] * weight_in<W>(now[j / 4], quarter * 4 + j % 4);
          }
        }
      }
      add_lanes<Shape::LANES, Shape::SUMS>(sum, along);
#pragma unroll
      for (int i = 0; i < Shape::SUMS / Shape::LANES; ++i) {
        const int at = along * (Shape::SUMS / Shape::LANES) + i;
        const int64_t row = first_row + at / Shape::TOGETHER, col = first + at % Shape::TOGETHER;
        if (row < m.rows && col < product.count) m.partial[(slice * m.rows + row) * product.count + col] = sum[i];
      }
    }
    unit = stop;
  }
}

// What a layer makes of p, at one element.
template <typename W>
__device__ __forceinline__ float finished(const EditorStream<W>& m, const EditorStreamLayer<W>& layer, const float* x,
                                          int64_t at, float p) {
  const int64_t col = at % m.d;
  float pre = p + widen(layer.bias[col]);
  if (m.modes > 0) {
    const int64_t of_mode = m.mode[at / m.d] * m.d + col;
    pre = under_max(pre, widen(layer.scale[of_mode]), widen(layer.shift[of_mode]));
  }
  return m.residual ? x[at] + rectify(pre) : rectify(pre);
}

template <typename W, int ROWS, int BLOCK>
__global__ void __launch_bounds__(BLOCK) editor_stream_kernel(const __grid_constant__ EditorStream<W> m) {
  auto& shared = shared_memory<EditorStreamShared<ROWS>>();
  for (int turn = 0; turn < 2 * STREAM_LAYERS; ++turn) {
    const EditorStreamLayer<W>& layer = m.layer[turn / 2];
    const bool down = turn % 2 == 0;
    const float* x = turn / 2 == 0 ? m.x : m.between;
    const StreamProduct<W> product =
        down ? StreamProduct<W>{layer.v, x, m.r, m.d} : StreamProduct<W>{layer.u, m.a, m.d, m.r};
    float* y = down ? m.a : turn / 2 == STREAM_LAYERS - 1 ? m.y : m.between;

    stream_units<W, ROWS, BLOCK>(m, product, shared);
    sync_grid(m.arrived);  // all partial sums are there
    const int64_t slices = ceil_div(product.width, StreamShape<W, ROWS>::SLICE), size = m.rows * product.count;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x; at < size;
         at += static_cast<int64_t>(gridDim.x) * BLOCK) {
      float sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += m.partial[slice * size + at];
      y[at] = down ? sum : finished(m, layer, x, at, sum);
    }
    if (turn + 1 < 2 * STREAM_LAYERS) sync_grid(m.arrived);  // the next product's x is whole, and `partial` free
  }
}

}  // namespace pymend
