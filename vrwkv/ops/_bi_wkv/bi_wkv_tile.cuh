// How Bi-WKV is cut into blocks and threads, and how a block's tokens reach shared memory and come back.
//
// A block takes one tile of one image: up to 16 segments of 16 tokens times 16 channels (8 tokens, 8 channels in
// double). A thread has one channel of one segment; neighbouring threads have neighbouring channels.
#pragma once

#include "bi_wkv_scan.cuh"

namespace vrwkv {
namespace {

constexpr int kSharedBytes = 48 * 1024;  // what every device grants without being asked
constexpr int kMaxSegments = 16;

template <typename scalar_t>
struct Block {
  using T = accumulate_t<scalar_t>;
  static constexpr int kChannels = sizeof(T) == 8 ? 8 : 16;
  static constexpr int kLength = sizeof(T) == 8 ? 8 : 16;  // tokens of a segment
  // An empty row follows each segment: the two segments of a warp then lie in different banks.
  static constexpr int kSegmentElements = (kLength + 1) * kChannels;
  static constexpr int kMaxThreads = kMaxSegments * kChannels;
  // Blocks that a multiprocessor must hold at once: they bound the registers, just above what would spill.
  static constexpr int kForwardBlocks = (sizeof(T) == 8 ? 512 : 768) / kMaxThreads;
  static constexpr int kBackwardBlocks = 512 / kMaxThreads;

  __host__ __device__ static constexpr int tensor_bytes(int segments) {
    return segments * kSegmentElements * sizeof(scalar_t);
  }
  // Two sums for each thread, one towards either end.
  __host__ __device__ static constexpr int sums_bytes(int segments) {
    return segments * kChannels * 2 * sizeof(Anchored<T>);
  }
  static constexpr int shared_bytes(int segments, int tensors) {
    return tensors * tensor_bytes(segments) + sums_bytes(segments);
  }
};

struct Shape {
  int64_t batch, tokens, channels;
  int64_t tiles, groups;  // tiles of tokens in an image, groups of channels
  int segments;           // of a tile
  bool vectorized;

  __host__ __device__ int64_t tasks() const { return batch * tiles * groups; }
};

// The fewest tiles whose `tensors` tensors fit into shared memory, of equal size.
template <typename scalar_t>
Shape make_shape(int64_t batch, int64_t tokens, int64_t channels, int tensors, bool vectorized) {
  using B = Block<scalar_t>;
  const int64_t limit = std::min(kMaxSegments, kSharedBytes / B::shared_bytes(1, tensors));
  const int64_t segments = divide_up(tokens, B::kLength);
  const int64_t each = divide_up(segments, divide_up(segments, limit));
  return {
      batch,     tokens, channels, divide_up(segments, each), divide_up(channels, B::kChannels), static_cast<int>(each),
      vectorized};
}

// Where a task's tile lies. Groups of channels come first, so that blocks that share memory lines run together.
template <typename scalar_t>
struct Tile {
  using B = Block<scalar_t>;
  int64_t image, index, first_channel, offset;
  int tokens, channels;  // that exist

  __device__ __forceinline__ Tile(const Shape& shape, int64_t task) {
    first_channel = task % shape.groups * B::kChannels;
    index = task / shape.groups % shape.tiles;
    image = task / shape.groups / shape.tiles;
    const int64_t length = shape.segments * B::kLength, first = index * length;
    offset = (image * shape.tokens + first) * shape.channels + first_channel;
    tokens = static_cast<int>(shape.tokens - first < length ? shape.tokens - first : length);
    const int64_t left = shape.channels - first_channel;
    channels = static_cast<int>(left < B::kChannels ? left : B::kChannels);
  }
};

// Offset in shared memory of row `token`.
template <typename scalar_t>
__device__ __forceinline__ int row_of(int token) {
  using B = Block<scalar_t>;
  return token / B::kLength * B::kSegmentElements + token % B::kLength * B::kChannels;
}

// Brings a tile into shared memory, `fill` where there is no token or channel.
template <typename scalar_t>
__device__ __forceinline__ void load_tile(Global<const scalar_t> from, Shared<scalar_t> to, const Shape& shape,
                                          const Tile<scalar_t>& tile, scalar_t fill) {
  using B = Block<scalar_t>;
  using V = Vector<scalar_t, kVector<scalar_t>>;
  constexpr int kPerRow = B::kChannels / kVector<scalar_t>;
  const int rows = shape.segments * B::kLength, threads = blockDim.x;
  if (shape.vectorized) {
    V filled;
#pragma unroll
    for (int j = 0; j < kVector<scalar_t>; ++j) filled.values[j] = fill;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * kPerRow; i += threads) {
      const int token = i / kPerRow, channel = i % kPerRow * kVector<scalar_t>;
      const bool inside = token < tile.tokens && channel < tile.channels;
      V value = filled;
      if (inside) value = vector_at<V>(from + (tile.offset + token * shape.channels + channel));
      vector_at<V>(to + (row_of<scalar_t>(token) + channel)) = value;
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * B::kChannels; i += threads) {
      const int token = i / B::kChannels, channel = i % B::kChannels;
      const bool inside = token < tile.tokens && channel < tile.channels;
      scalar_t value = fill;
      if (inside) value = from[tile.offset + token * shape.channels + channel];
      to[row_of<scalar_t>(token) + channel] = value;
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_tile(Shared<const scalar_t> from, Global<scalar_t> to, const Shape& shape,
                                           const Tile<scalar_t>& tile) {
  using B = Block<scalar_t>;
  using V = Vector<scalar_t, kVector<scalar_t>>;
  constexpr int kPerRow = B::kChannels / kVector<scalar_t>;
  const int threads = blockDim.x;
  if (shape.vectorized) {
    for (int i = threadIdx.x; i < tile.tokens * kPerRow; i += threads) {
      const int token = i / kPerRow, channel = i % kPerRow * kVector<scalar_t>;
      if (channel >= tile.channels) continue;
      const V value = vector_at<V>(from + (row_of<scalar_t>(token) + channel));
      vector_at<V>(to + (tile.offset + token * shape.channels + channel)) = value;
    }
  } else {
    for (int i = threadIdx.x; i < tile.tokens * B::kChannels; i += threads) {
      const int token = i / B::kChannels, channel = i % B::kChannels;
      if (channel < tile.channels) {
        to[tile.offset + token * shape.channels + channel] = from[row_of<scalar_t>(token) + channel];
      }
    }
  }
}

// One thread's tokens.
template <typename scalar_t>
struct Segment {
  using B = Block<scalar_t>;
  using T = accumulate_t<scalar_t>;
  Shared<scalar_t> k, v, g;  // first element of this channel; g only in the backward pass
  int index, channel, tokens;

  __device__ __forceinline__ Segment(const Shape& shape, const Tile<scalar_t>& tile) {
    index = threadIdx.x / B::kChannels;
    channel = threadIdx.x % B::kChannels;
    const int left = tile.tokens - index * B::kLength;
    tokens = left < 0 ? 0 : (left < B::kLength ? left : B::kLength);
    const int own = index * B::kSegmentElements + channel, tensor = B::tensor_bytes(shape.segments);
    k = shared_at<scalar_t>(0) + own;
    v = shared_at<scalar_t>(tensor) + own;
    g = shared_at<scalar_t>(2 * tensor) + own;
  }

  __device__ __forceinline__ T key(int i) const {
    const scalar_t value = k[i * B::kChannels];
    const T key = static_cast<T>(value);
    return key < kEmpty ? T(kEmpty) : key;
  }
  __device__ __forceinline__ T value(int i) const {
    const scalar_t value = v[i * B::kChannels];
    return static_cast<T>(value);
  }
  __device__ __forceinline__ T grad(int i) const {
    const scalar_t value = g[i * B::kChannels];
    return static_cast<T>(value);
  }
};

// Sums of all segments of the block, in shared memory behind its `tensors` tensors: towards the end, towards the start.
template <typename scalar_t>
struct BlockSums {
  using B = Block<scalar_t>;
  using T = accumulate_t<scalar_t>;
  Shared<Anchored<T>> prefix, suffix;
  int segments, channel;

  __device__ __forceinline__ BlockSums(const Shape& shape, int tensors, const Segment<scalar_t>& segment) {
    segments = shape.segments;
    channel = segment.channel;
    prefix = shared_at<Anchored<T>>(tensors * B::tensor_bytes(segments));
    suffix = prefix + segments * B::kChannels;
  }

  __device__ __forceinline__ void write(int segment, const Anchored<T>& to_end, const Anchored<T>& to_start) const {
    prefix[segment * B::kChannels + channel] = to_end;
    suffix[segment * B::kChannels + channel] = to_start;
  }

  // What enters `segment` from the earlier ones and from `carry`, which enters the block.
  __device__ __forceinline__ Anchored<T> before(int segment, Anchored<T> carry, T w) const {
    carry.gap += segment * B::kLength;
    for (int other = 0; other < segment; ++other) {
      Anchored<T> sum = prefix[other * B::kChannels + channel];
      sum.gap += (segment - 1 - other) * B::kLength;
      carry = merge(carry, sum, w);
    }
    return carry;
  }
  __device__ __forceinline__ Anchored<T> after(int segment, Anchored<T> carry, T w) const {
    carry.gap += (segments - 1 - segment) * B::kLength;
    for (int other = segments - 1; other > segment; --other) {
      Anchored<T> sum = suffix[other * B::kChannels + channel];
      sum.gap += (other - 1 - segment) * B::kLength;
      carry = merge(carry, sum, w);
    }
    return carry;
  }
};

}  // namespace
}  // namespace vrwkv
