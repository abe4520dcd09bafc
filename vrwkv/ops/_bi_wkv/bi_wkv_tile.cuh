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
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kChannels = sizeof(acc_t) == 8 ? 8 : 16;
  static constexpr int kLength = sizeof(acc_t) == 8 ? 8 : 16;  // tokens of a segment
  // An empty row follows each segment: the two segments of a warp then lie in different banks.
  static constexpr int kSegmentElements = (kLength + 1) * kChannels;
  static constexpr int kMaxThreads = kMaxSegments * kChannels;
  // Blocks that a multiprocessor must hold at once: they bound the registers, just above what would spill.
  static constexpr int kForwardBlocks = (sizeof(acc_t) == 8 ? 512 : 768) / kMaxThreads;
  static constexpr int kBackwardBlocks = 512 / kMaxThreads;

  __host__ __device__ static constexpr int tensor_bytes(int segments) {
    return segments * kSegmentElements * sizeof(scalar_t);
  }
  // Two sums for each thread, one towards either end.
  __host__ __device__ static constexpr int sums_bytes(int segments) {
    return segments * kChannels * 2 * sizeof(ScaledSum<acc_t>);
  }
  static constexpr int shared_bytes(int segments, int tensors) {
    return tensors * tensor_bytes(segments) + sums_bytes(segments);
  }
};

// How one call is cut.
struct Tiling {
  int64_t batch, tokens, channels;
  int64_t tiles, groups;  // tiles of tokens in an image, groups of channels
  int segments;           // of a tile
  bool vectorized;

  __host__ __device__ int64_t tasks() const { return batch * tiles * groups; }
};

// The fewest tiles whose `tensors` tensors fit into shared memory, of equal size.
template <typename scalar_t>
Tiling make_tiling(int64_t batch, int64_t tokens, int64_t channels, int tensors, bool vectorized) {
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

  __device__ __forceinline__ Tile(const Tiling& tiling, int64_t task) {
    first_channel = task % tiling.groups * B::kChannels;
    index = task / tiling.groups % tiling.tiles;
    image = task / tiling.groups / tiling.tiles;
    const int64_t length = tiling.segments * B::kLength, first = index * length;
    offset = (image * tiling.tokens + first) * tiling.channels + first_channel;
    tokens = static_cast<int>(tiling.tokens - first < length ? tiling.tokens - first : length);
    const int64_t left = tiling.channels - first_channel;
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
__device__ __forceinline__ void load_tile(Global<const scalar_t> from, Shared<scalar_t> to, const Tiling& tiling,
                                          const Tile<scalar_t>& tile, scalar_t fill) {
  using B = Block<scalar_t>;
  using V = Vector<scalar_t, kVector<scalar_t>>;
  constexpr int kPerRow = B::kChannels / kVector<scalar_t>;
  const int rows = tiling.segments * B::kLength, threads = blockDim.x;
  if (tiling.vectorized) {
    V filled;
#pragma unroll
    for (int j = 0; j < kVector<scalar_t>; ++j) filled.values[j] = fill;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * kPerRow; i += threads) {
      const int token = i / kPerRow, channel = i % kPerRow * kVector<scalar_t>;
      const bool inside = token < tile.tokens && channel < tile.channels;
      V value = filled;
      if (inside) value = vector_at<V>(from + (tile.offset + token * tiling.channels + channel));
      vector_at<V>(to + (row_of<scalar_t>(token) + channel)) = value;
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * B::kChannels; i += threads) {
      const int token = i / B::kChannels, channel = i % B::kChannels;
      const bool inside = token < tile.tokens && channel < tile.channels;
      scalar_t value = fill;
      if (inside) value = from[tile.offset + token * tiling.channels + channel];
      to[row_of<scalar_t>(token) + channel] = value;
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ void store_tile(Shared<const scalar_t> from, Global<scalar_t> to, const Tiling& tiling,
                                           const Tile<scalar_t>& tile) {
  using B = Block<scalar_t>;
  using V = Vector<scalar_t, kVector<scalar_t>>;
  constexpr int kPerRow = B::kChannels / kVector<scalar_t>;
  const int threads = blockDim.x;
  if (tiling.vectorized) {
    for (int i = threadIdx.x; i < tile.tokens * kPerRow; i += threads) {
      const int token = i / kPerRow, channel = i % kPerRow * kVector<scalar_t>;
      if (channel >= tile.channels) continue;
      const V value = vector_at<V>(from + (row_of<scalar_t>(token) + channel));
      vector_at<V>(to + (tile.offset + token * tiling.channels + channel)) = value;
    }
  } else {
    for (int i = threadIdx.x; i < tile.tokens * B::kChannels; i += threads) {
      const int token = i / B::kChannels, channel = i % B::kChannels;
      if (channel < tile.channels) {
        to[tile.offset + token * tiling.channels + channel] = from[row_of<scalar_t>(token) + channel];
      }
    }
  }
}

// One thread's tokens.
template <typename scalar_t>
struct Segment {
  using B = Block<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  Shared<scalar_t> k, v, grad;  // first element of this channel; grad only in the backward pass
  int index, channel, tokens;

  __device__ __forceinline__ Segment(const Tiling& tiling, const Tile<scalar_t>& tile) {
    index = threadIdx.x / B::kChannels;
    channel = threadIdx.x % B::kChannels;
    const int left = tile.tokens - index * B::kLength;
    tokens = left < 0 ? 0 : (left < B::kLength ? left : B::kLength);
    const int own = index * B::kSegmentElements + channel, tensor = B::tensor_bytes(tiling.segments);
    k = shared_at<scalar_t>(0) + own;
    v = shared_at<scalar_t>(tensor) + own;
    grad = shared_at<scalar_t>(2 * tensor) + own;
  }

  __device__ __forceinline__ acc_t key(int i) const {
    const scalar_t value = k[i * B::kChannels];
    const acc_t key = static_cast<acc_t>(value);
    return key < kEmpty ? acc_t(kEmpty) : key;
  }
  __device__ __forceinline__ acc_t value(int i) const {
    const scalar_t value = v[i * B::kChannels];
    return static_cast<acc_t>(value);
  }
  __device__ __forceinline__ acc_t gradient(int i) const {
    const scalar_t value = grad[i * B::kChannels];
    return static_cast<acc_t>(value);
  }
};

// Sums of all segments of the block, in shared memory behind its `tensors` tensors: towards the end, towards the start.
template <typename scalar_t>
struct BlockSums {
  using B = Block<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  Shared<ScaledSum<acc_t>> prefix, suffix;
  int segments, channel;

  __device__ __forceinline__ BlockSums(const Tiling& tiling, int tensors, const Segment<scalar_t>& segment) {
    segments = tiling.segments;
    channel = segment.channel;
    prefix = shared_at<ScaledSum<acc_t>>(tensors * B::tensor_bytes(segments));
    suffix = prefix + segments * B::kChannels;
  }

  __device__ __forceinline__ void write(int segment, const ScaledSum<acc_t>& to_end,
                                        const ScaledSum<acc_t>& to_start) const {
    prefix[segment * B::kChannels + channel] = to_end;
    suffix[segment * B::kChannels + channel] = to_start;
  }

  // What enters `segment` from the earlier ones and from `entering`, what enters the block.
  __device__ __forceinline__ ScaledSum<acc_t> before(int segment, ScaledSum<acc_t> entering, acc_t w) const {
    entering.gap += segment * B::kLength;
    for (int other = 0; other < segment; ++other) {
      ScaledSum<acc_t> sum = prefix[other * B::kChannels + channel];
      sum.gap += (segment - 1 - other) * B::kLength;
      entering = merge(entering, sum, w);
    }
    return entering;
  }
  __device__ __forceinline__ ScaledSum<acc_t> after(int segment, ScaledSum<acc_t> entering, acc_t w) const {
    entering.gap += (segments - 1 - segment) * B::kLength;
    for (int other = segments - 1; other > segment; --other) {
      ScaledSum<acc_t> sum = suffix[other * B::kChannels + channel];
      sum.gap += (other - 1 - segment) * B::kLength;
      entering = merge(entering, sum, w);
    }
    return entering;
  }
};

}  // namespace
}  // namespace vrwkv
