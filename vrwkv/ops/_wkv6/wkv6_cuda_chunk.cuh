// A chunk of tokens of the RWKV-6 recurrence on CUDA: how it is found, and its decays. The algorithm stands in
// README.md.
//
// A block has a chunk and 32 columns of it at a time: a warp has a group of neighbouring tokens, a lane one column of
// them, in registers. For products they go to tiles in shared memory.
#pragma once

#include "../common/cuda_matmul.cuh"

namespace vrwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 32;      // of a tile of shared memory
constexpr int kWideColumns = 64;  // of a wide one
// Elements from row to row, so that neighbouring rows begin in other banks.
constexpr int kStride = kColumns + 4;
constexpr int kWideStride = kWideColumns + 8;

// Tokens of a chunk, a power of two, and of a group: a warp's share.
template <typename scalar_t>
constexpr int kChunk = sizeof(scalar_t) == 8 ? 32 : 64;
template <typename scalar_t>
constexpr int kGroup = kChunk<scalar_t> / kWarps;

// How a product with a row for each token is shared out: a warp has 16 rows and every kShare-th tile of columns.
template <typename scalar_t>
constexpr int kShare = kWarps * kTileRows / kChunk<scalar_t>;
template <typename scalar_t, int kOfColumns>
constexpr int kTilesOf = kOfColumns / kTileColumns / kShare<scalar_t>;

template <typename scalar_t>
__device__ __forceinline__ int first_row() {
  return threadIdx.x / 32 / kShare<scalar_t> * kTileRows;
}

template <typename scalar_t>
__device__ __forceinline__ TileColumns tiles_of(int columns) {
  const int part = threadIdx.x / 32 % kShare<scalar_t>;
  return {part * kTileColumns, kShare<scalar_t> * kTileColumns, columns};
}

// What is left of `count` from `first` on, at most `most`.
__device__ __forceinline__ int left_of(int64_t count, int64_t first, int most) {
  return static_cast<int>(count - first < most ? count - first : most);
}

// (B, T, H, N) and what follows from it. States are `width` wide: N in whole tiles, with zeros behind N.
struct Shape {
  int64_t batch, tokens, heads, size, width, chunks;

  __host__ __device__ int64_t all_chunks() const { return batch * heads * chunks; }
};

template <typename scalar_t>
Shape make_shape(const Tensor& r) {
  const int64_t width = divide_up(r.size(3), kTileColumns) * kTileColumns;
  return {r.size(0), r.size(1), r.size(2), r.size(3), width, divide_up(r.size(1), kChunk<scalar_t>)};
}

// One chunk of one head of one image.
template <typename scalar_t>
struct Chunk {
  int64_t index;               // among all chunks; those of a head lie together
  int64_t offset, step, size;  // of its first token, and from token to token; N
  int tokens;                  // that exist

  __device__ __forceinline__ Chunk(const Shape& shape, int64_t index)
      : index(index), step(shape.heads * shape.size), size(shape.size) {
    const int64_t first = index % shape.chunks * kChunk<scalar_t>, image = index / shape.chunks / shape.heads;
    offset = (image * shape.tokens + first) * step + head(shape) * size;
    tokens = left_of(shape.tokens, first, kChunk<scalar_t>);
  }

  __device__ __forceinline__ int64_t head(const Shape& shape) const { return index / shape.chunks % shape.heads; }

  __device__ __forceinline__ bool has(int token, int64_t column) const { return token < tokens && column < size; }

  // Offset in tensors (B, T, H, N).
  __device__ __forceinline__ int64_t at(int token, int64_t column) const { return offset + token * step + column; }

  // Offset of the state (width, width) that enters it from the left, 0, or from the right, 1.
  __device__ __forceinline__ int64_t state(int side, int64_t width) const { return (2 * index + side) * width * width; }
};

// Brings `columns` columns from `first` on to a tile with rows of `stride`, zeros where there is no token or column.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void load_tile(Global<const scalar_t> from, const Chunk<scalar_t>& chunk, int64_t first,
                                          int columns, Shared<acc_t> to, int stride) {
  for (int token = threadIdx.x / 32; token < kChunk<scalar_t>; token += kWarps) {  // count: 8
#pragma unroll 2
    for (int column = threadIdx.x % 32; column < columns; column += 32) {  // count: width / 32, unrolled 2
      acc_t value = 0;
      if (chunk.has(token, first + column)) value = static_cast<acc_t>(from[chunk.at(token, first + column)]);
      to[token * stride + column] = value;
    }
  }
}

// Whether tokens i and j meet where blocks of `half` tokens, a power of two, are joined to blocks of twice that.
__device__ __forceinline__ bool meet(int i, int j, int half) { return ((i ^ j) & ~(half - 1)) == half; }

// A border next to each token of a chunk. With `half` below the length of the chunk: the middle of the block of
// 2 * `half` tokens that it lies in. Else the start of the chunk, with `shift` = `half`, or its end, with 0.
struct Border {
  int half, shift;

  // Whether the token lies right of it.
  __device__ __forceinline__ bool is_left_of(int token) const { return ((token + shift) & half) != 0; }
};

template <typename scalar_t>
__device__ __forceinline__ Border start_of_chunk() {
  return {kChunk<scalar_t>, kChunk<scalar_t>};
}

template <typename scalar_t>
__device__ __forceinline__ Border end_of_chunk() {
  return {kChunk<scalar_t>, 0};
}

// A thread's tokens of one column.
template <typename scalar_t>
struct Group {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kLength = kGroup<scalar_t>;
  using Values = acc_t[kLength];

  int index, lane;

  __device__ __forceinline__ Group() : index(threadIdx.x / 32), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ int token(int i) const { return index * kLength + i; }

  __device__ __forceinline__ void load(Global<const scalar_t> from, const Chunk<scalar_t>& chunk, int64_t column,
                                       Values& to) const {
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      to[i] = 0;
      if (chunk.has(token(i), column)) to[i] = static_cast<acc_t>(from[chunk.at(token(i), column)]);
    }
  }

  // Products of values and factors to the rows of its tokens in a tile.
  __device__ __forceinline__ void store(const Values& values, const Values& factors, Shared<acc_t> tile,
                                        int stride) const {
#pragma unroll
    for (int i = 0; i < kLength; ++i) tile[token(i) * stride + lane] = values[i] * factors[i];
  }

  // Logarithms of decays, -e^w; what does not exist has no decay. Their sum goes to `sums`, for find_factors after a
  // barrier.
  __device__ __forceinline__ void load_logs(Global<const scalar_t> w, const Chunk<scalar_t>& chunk, int64_t column,
                                            Values& logs, Shared<acc_t> sums) const {
    load(w, chunk, column, logs);
    acc_t sum = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const acc_t w_i = logs[i] > 30 ? acc_t(30) : logs[i];  // e^-e^30 is zero
      logs[i] = chunk.has(token(i), column) ? -exponential(w_i) : acc_t(0);
      sum += logs[i];
    }
    sums[index * 32 + lane] = sum;
  }

  // Decays between the tokens and the border, from the sums of `logs` over groups.
  __device__ __forceinline__ void find_factors(const Values& logs, Border border, Shared<const acc_t> sums,
                                               Values& factors) const {
    const acc_t outside = sum_groups(border, sums, border.is_left_of(token(0)));
    acc_t sum = outside;
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) {
      if ((i & (border.half - 1)) == border.half - 1) sum = outside;
      factors[i] = sum;
      sum += logs[i];
    }
    sum = outside;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if ((i & (border.half - 1)) == 0) sum = outside;
      factors[i] = exponential(border.is_left_of(token(i)) ? sum : factors[i]);
      sum += logs[i];
    }
  }

  // The reverse: adds to the gradients of `logs` those of the exponents of the factors. Those of a group add up to
  // the number that it returns; add_outside_gradients adds such numbers of other groups.
  __device__ __forceinline__ acc_t add_gradients(const Values& grads, Border border, Values& grad_logs) const {
    acc_t sum = 0;
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) {
      if ((i & (border.half - 1)) == border.half - 1) sum = 0;
      if (border.is_left_of(token(i))) grad_logs[i] += sum;
      sum += grads[i];
    }
    sum = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if ((i & (border.half - 1)) == 0) sum = 0;
      if (!border.is_left_of(token(i))) grad_logs[i] += sum;
      sum += grads[i];
    }
    return sum;
  }

  __device__ __forceinline__ void add_outside_gradients(Border border, Shared<const acc_t> sums,
                                                        Values& grad_logs) const {
    const acc_t outside = sum_groups(border, sums, !border.is_left_of(token(0)));
#pragma unroll
    for (int i = 0; i < kLength; ++i) grad_logs[i] += outside;
  }

 private:
  // The sum over the groups on this one's side of the border, those before it or those behind it.
  __device__ __forceinline__ acc_t sum_groups(Border border, Shared<const acc_t> sums, bool before) const {
    acc_t sum = 0;
    const int first = (token(0) & ~(border.half - 1)) / kLength, end = first + border.half / kLength;
    for (int i = before ? first : index + 1; i < (before ? index : end); ++i) {  // count: groups, unrolled 16
      sum += sums[i * 32 + lane];
    }
    return sum;
  }
};

}  // namespace
}  // namespace vrwkv
