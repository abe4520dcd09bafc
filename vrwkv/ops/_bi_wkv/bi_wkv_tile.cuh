// How Bi-WKV is cut into blocks and threads, and what the threads of a block share.
//
// A block takes one tile of one image: up to 16 segments of 16 tokens times 16 channels (8 tokens, 8 channels in
// double). A thread has one channel of one segment; neighbouring threads have neighbouring channels.
#pragma once

#include "bi_wkv_scan.cuh"

namespace vrwkv {
namespace {

constexpr int kMaxSegments = 16;

template <typename scalar_t>
struct Block {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kChannels = sizeof(acc_t) == 8 ? 8 : 16;
  static constexpr int kLength = sizeof(acc_t) == 8 ? 8 : 16;  // tokens of a segment
  static constexpr int kMaxThreads = kMaxSegments * kChannels;
  // Blocks that a multiprocessor must hold at once: they bound the registers, just above what would spill.
  static constexpr int kForwardBlocks = (sizeof(acc_t) == 8 ? 512 : 768) / kMaxThreads;
  static constexpr int kBackwardBlocks = 512 / kMaxThreads;
  // A channel's powers: e^(-w i) for i to kLength, and its bonus e^u.
  static constexpr int kBonus = kLength + 1, kPowers = kLength + 2;
  // Elements of a channel's powers and maxima: vectors of neighbouring channels lie in different banks.
  static constexpr int kPowerStride = kLength + 4, kMaximumStride = kMaxSegments + 4;
  static constexpr int kReference = kMaximumStride - 1;  // place of the reference behind the maxima

  // `kinds` of sums: of tokens, and of a and b in the backward pass.
  static constexpr int shared_bytes(int segments, int kinds) {
    return kChannels * static_cast<int>(sizeof(acc_t)) * (kPowerStride + kMaximumStride + kinds * 2 * 4 * segments);
  }
};

// How one call is cut.
struct Tiling {
  int64_t batch, tokens, channels;
  int tiles, groups;               // tiles of tokens in an image, groups of channels
  int segments;                    // of a tile
  int last_tokens, last_channels;  // of the last tile and group

  Tasks tasks() const { return {groups, tiles, batch}; }
};

// The fewest tiles, of equal size.
template <typename scalar_t>
Tiling make_tiling(int64_t batch, int64_t tokens, int64_t channels) {
  using B = Block<scalar_t>;
  const int64_t segments = divide_up(tokens, B::kLength);
  const int64_t each = divide_up(segments, divide_up(segments, kMaxSegments));
  const int64_t tiles = divide_up(segments, each), groups = divide_up(channels, B::kChannels);
  return {batch,
          tokens,
          channels,
          static_cast<int>(tiles),
          static_cast<int>(groups),
          static_cast<int>(each),
          static_cast<int>(tokens - (tiles - 1) * each * B::kLength),
          static_cast<int>(channels - (groups - 1) * B::kChannels)};
}

// Where a tile lies, the same for all threads of its block.
struct Tile {
  int64_t image;
  int index;
  int64_t first_channel, offset;  // of its first element in a (B, T, C) tensor
  int tokens, channels;           // that exist
};

// Calls function(tile) for the tiles of this block. Groups of channels run fastest, so that blocks that share memory
// lines run together. `kReversed`: the last tiles first, which a kernel before this one has left in the cache.
template <typename scalar_t, bool kReversed, typename Function>
__device__ __forceinline__ void each_tile(const Tiling& tiling, const Function& function) {
  using B = Block<scalar_t>;
  const int length = tiling.segments * B::kLength;
  for (int64_t z = blockIdx.z; z < tiling.batch; z += gridDim.z) {
    for (int y = blockIdx.y; y < tiling.tiles; y += gridDim.y) {
      for (int x = blockIdx.x; x < tiling.groups; x += gridDim.x) {
        const int64_t image = kReversed ? tiling.batch - 1 - z : z;
        const int index = kReversed ? tiling.tiles - 1 - y : y, group = kReversed ? tiling.groups - 1 - x : x;
        const int64_t first = static_cast<int64_t>(index) * length;
        const int64_t first_channel = static_cast<int64_t>(group) * B::kChannels;
        function(Tile{image, index, first_channel, (image * tiling.tokens + first) * tiling.channels + first_channel,
                      index == tiling.tiles - 1 ? tiling.last_tokens : length,
                      group == tiling.groups - 1 ? tiling.last_channels : B::kChannels});
      }
    }
  }
}

// One thread's tokens; none where its channel does not exist.
template <typename scalar_t>
struct Segment {
  using B = Block<scalar_t>;
  int index, channel, tokens;

  __device__ __forceinline__ explicit Segment(const Tile& tile) {
    index = threadIdx.x / B::kChannels;
    channel = threadIdx.x % B::kChannels;
    const int left = exists(tile) ? tile.tokens - index * B::kLength : 0;
    tokens = left < 0 ? 0 : (left < B::kLength ? left : B::kLength);
  }
  __device__ __forceinline__ bool exists(const Tile& tile) const { return channel < tile.channels; }
  // The same, opaque to the compiler.
  __device__ __forceinline__ Segment computed_here() const {
    Segment copy = *this;
    copy.index = vrwkv::computed_here(index);
    copy.channel = vrwkv::computed_here(channel);
    return copy;
  }
  // Offset of its first token from the tile's, in a tensor that has `stride` elements from token to token.
  template <typename index_t>
  __device__ __forceinline__ index_t first(index_t stride) const {
    return index * B::kLength * stride + channel;
  }
};

template <typename scalar_t>
struct Inputs {
  using acc_t = accumulate_t<scalar_t>;
  Global<const acc_t> w, u;
  Global<const scalar_t> k, v, grad;  // grad only in the backward pass
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ Channel<acc_t> load_channel(const Inputs<scalar_t>& in, const Tile& tile,
                                                       const Segment<scalar_t>& segment) {
  if (!segment.exists(tile)) return {0, 0};
  return {in.w[tile.first_channel + segment.channel], in.u[tile.first_channel + segment.channel]};
}

// Sums of one kind of all segments of the block, in shared memory: towards the end, then towards the start. Where they
// have scales of their own, those lie behind them.
template <typename scalar_t>
struct BlockSums {
  using B = Block<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  Shared<Sum<acc_t>> sums;  // of this channel
  int segments;

  __device__ __forceinline__ int place(int segment, int direction) const {
    return (direction * segments + segment) * B::kChannels;
  }
  __device__ __forceinline__ int scale_place(int segment, int direction) const { return place(segment, 2 + direction); }

  __device__ __forceinline__ void write(int segment, const Sum<acc_t>& to_end, const Sum<acc_t>& to_start) const {
    write(segment, 0, to_end);
    write(segment, 1, to_start);
  }
  __device__ __forceinline__ void write(int segment, int direction, const Sum<acc_t>& sum) const {
    sums[place(segment, direction)] = sum;
  }
  __device__ __forceinline__ Sum<acc_t> read(int segment, int direction) const {
    return sums[place(segment, direction)];
  }

  __device__ __forceinline__ void write(int segment, const ScaledSum<acc_t>& to_end,
                                        const ScaledSum<acc_t>& to_start) const {
    write(segment, Sum<acc_t>{to_end.num, to_end.den}, Sum<acc_t>{to_start.num, to_start.den});
    sums[scale_place(segment, 0)] = {to_end.key, to_end.gap};
    sums[scale_place(segment, 1)] = {to_start.key, to_start.gap};
  }
  __device__ __forceinline__ ScaledSum<acc_t> read_scaled(int segment, int direction) const {
    const Sum<acc_t> sum = read(segment, direction), scale = sums[scale_place(segment, direction)];
    return {sum.num, sum.den, scale.num, scale.den};
  }

  // What enters `segment` from the earlier ones and from `entering`, what enters the block. All are relative to one
  // scale, and `decay` is e^(-w * kLength).
  __device__ __forceinline__ Sum<acc_t> before(int segment, Sum<acc_t> entering, acc_t decay) const {
#pragma unroll 4
    for (int other = 0; other < segment; ++other) {  // count: (segments - 1) / 2, unrolled 4
      entering = entering.advanced(decay, read(other, 0));
    }
    return entering;
  }
  __device__ __forceinline__ Sum<acc_t> after(int segment, Sum<acc_t> entering, acc_t decay) const {
#pragma unroll 4
    for (int other = segments - 1; other > segment; --other) {  // count: (segments - 1) / 2, unrolled 4
      entering = entering.advanced(decay, read(other, 1));
    }
    return entering;
  }

  // The same for sums that have scales of their own.
  __device__ __forceinline__ ScaledSum<acc_t> before(int segment, ScaledSum<acc_t> entering, acc_t w) const {
    entering.gap += segment * B::kLength;
    for (int other = 0; other < segment; ++other) {
      ScaledSum<acc_t> sum = read_scaled(other, 0);
      sum.gap += (segment - 1 - other) * B::kLength;
      entering = merge(entering, sum, w);
    }
    return entering;
  }
  __device__ __forceinline__ ScaledSum<acc_t> after(int segment, ScaledSum<acc_t> entering, acc_t w) const {
    entering.gap += (segments - 1 - segment) * B::kLength;
    for (int other = segments - 1; other > segment; --other) {
      ScaledSum<acc_t> sum = read_scaled(other, 1);
      sum.gap += (other - 1 - segment) * B::kLength;
      entering = merge(entering, sum, w);
    }
    return entering;
  }
};

// What enters a segment, or a tile, from before and from after it.
template <typename Sum>
struct Around {
  Sum before, after;
};

// Where sums of a tile lie in a workspace (2, B, tiles, C): those towards the end; those towards the start lie
// `distance` behind them.
struct SumsPlace {
  int64_t to_end, distance;

  __device__ __forceinline__ SumsPlace(const Tiling& tiling, const Tile& tile, int channel)
      : to_end((computed_here(tile.image) * tiling.tiles + tile.index) * tiling.channels + tile.first_channel +
               channel),
        distance(tiling.batch * tiling.tiles * tiling.channels) {}

  __device__ __forceinline__ int64_t to_start() const { return to_end + distance; }
};

// What enters the tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ Around<ScaledSum<acc_t>> load_entering(Global<const ScaledSum<acc_t>> entering,
                                                                  const Tiling& tiling, const Tile& tile,
                                                                  const Segment<scalar_t>& segment) {
  if (tiling.tiles == 1 || !segment.exists(tile)) return {nothing<acc_t>(), nothing<acc_t>()};
  const SumsPlace place(tiling, tile, segment.channel);
  return {entering[place.to_end], entering[place.to_start()]};
}

// The block's shared memory.
template <typename scalar_t>
struct Memory {
  using B = Block<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  Shared<acc_t> powers;  // of this channel
  Shared<acc_t> maxima;  // of this channel: the largest key of each segment, repeated to kMaxSegments
  BlockSums<scalar_t> tokens, ab;

  __device__ __forceinline__ Memory(const Tiling& tiling, const Segment<scalar_t>& segment) {
    constexpr int kRows = B::kChannels * (B::kPowerStride + B::kMaximumStride);
    powers = shared_at<acc_t>(0) + segment.channel * B::kPowerStride;
    maxima = shared_at<acc_t>(B::kChannels * B::kPowerStride * sizeof(acc_t)) + segment.channel * B::kMaximumStride;
    tokens = {shared_at<Sum<acc_t>>(kRows * sizeof(acc_t)) + segment.channel, tiling.segments};
    ab = {tokens.sums + 4 * tiling.segments * B::kChannels, tiling.segments};
  }
};

// A row of shared memory that starts on a vector.
template <typename acc_t, int kSize>
__device__ __forceinline__ void read_row(const Shared<acc_t>& row, acc_t (&values)[kSize]) {
  using V = Vector<acc_t, kVector<acc_t>>;
#pragma unroll
  for (int i = 0; i < kSize; i += kVector<acc_t>) {
    const V some = vector_at<V>(row + i);
#pragma unroll
    for (int j = 0; j < kVector<acc_t>; ++j) values[i + j] = some.values[j];
  }
}

}  // namespace
}  // namespace vrwkv
