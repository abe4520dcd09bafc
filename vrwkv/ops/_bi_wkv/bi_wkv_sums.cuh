// The sums of Bi-WKV's segments and tiles, which the forward and the backward pass both begin with.
#pragma once

#include "bi_wkv_tile.cuh"

namespace vrwkv {
namespace {

// ---- One thread, one segment ----

// Fast segments unroll their loops and keep their sums in registers; safe ones, which are rare, keep them in local
// memory.
template <typename Scan, typename scalar_t>
constexpr int kUnroll = Scan::kFast ? Block<scalar_t>::kLength : 1;

template <typename Scan, typename scalar_t>
__device__ __forceinline__ int length_of(const Segment<scalar_t>& segment) {
  return Scan::kFast ? Block<scalar_t>::kLength : segment.tokens;
}

template <typename acc_t>
struct KeyRange {
  acc_t largest, smallest;
};

// NaN is passed over here; it shows in every sum.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ KeyRange<acc_t> key_range(const Segment<scalar_t>& segment) {
  acc_t largest = kEmpty, smallest = -kEmpty;
#pragma unroll
  for (int i = 0; i < Block<scalar_t>::kLength; ++i) {
    const acc_t key = segment.key(i);
    largest = fmax(largest, key);
    if (i < segment.tokens) smallest = fmin(smallest, key);
  }
  return {largest, smallest};
}

// Whether FastScan holds relative to e^reference. An empty segment, which the last tile may have, has nothing to scan;
// in double both scans would not fit into the registers.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ bool is_fast(const Segment<scalar_t>& segment, acc_t reference, acc_t smallest_key,
                                        const Channel<acc_t>& channel) {
  if constexpr (std::is_same_v<acc_t, double>) return false;
  const acc_t decay = fabs(channel.w) * Block<scalar_t>::kLength;
  return segment.tokens > 0 && reference - smallest_key + decay + fabs(channel.u) < kFastRange;
}

// The sums of the segment's own tokens that leave it towards either end.
template <typename Scan, typename scalar_t>
__device__ __forceinline__ void sum_tokens(const Scan& scan, const Segment<scalar_t>& segment,
                                           const BlockSums<scalar_t>& sums) {
  const int length = length_of<Scan>(segment);
  typename Scan::Sum prefix = scan.zero(), suffix = scan.zero();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) prefix = scan.advanced(prefix, scan.token(segment.key(i), segment.value(i)));
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) suffix = scan.advanced(suffix, scan.token(segment.key(i), segment.value(i)));
  sums.write(segment.index, scan.leave(prefix), scan.leave(suffix));
}

// The sums of the block's segments, each by the scan that holds for it.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void sum_segments(const Segment<scalar_t>& segment, const Channel<acc_t>& channel,
                                             const KeyRange<acc_t>& range, const BlockSums<scalar_t>& sums) {
  if (is_fast(segment, range.largest, range.smallest, channel)) {
    sum_tokens(FastScan<acc_t>(channel, range.largest), segment, sums);
  } else {
    sum_tokens(SafeScan<acc_t>(channel), segment, sums);
  }
}

// ---- Tiles ----

template <typename scalar_t>
struct Inputs {
  using acc_t = accumulate_t<scalar_t>;
  Global<const acc_t> w, u;
  Global<const scalar_t> k, v, grad;  // grad only in the backward pass
};

// Keys and values of a tile into shared memory.
template <typename scalar_t>
__device__ __forceinline__ void load_tokens(const Inputs<scalar_t>& in, const Tiling& tiling,
                                            const Tile<scalar_t>& tile) {
  load_tile<scalar_t>(in.k, shared_at<scalar_t>(0), tiling, tile, -INFINITY);
  load_tile<scalar_t>(in.v, shared_at<scalar_t>(Block<scalar_t>::tensor_bytes(tiling.segments)), tiling, tile, 0);
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ Channel<acc_t> load_channel(const Inputs<scalar_t>& in, const Tile<scalar_t>& tile,
                                                       int channel) {
  if (channel >= tile.channels) return {0, 0};
  return {in.w[tile.first_channel + channel], in.u[tile.first_channel + channel]};
}

// Where sums of a tile lie in a workspace (2, B, tiles, C): those towards the end first.
template <typename scalar_t>
__device__ __forceinline__ int64_t sums_index(const Tiling& tiling, const Tile<scalar_t>& tile, int channel,
                                              int direction) {
  return ((direction * tiling.batch + tile.image) * tiling.tiles + tile.index) * tiling.channels + tile.first_channel +
         channel;
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void store_tile_sums(const BlockSums<scalar_t>& sums, const Segment<scalar_t>& segment,
                                                Global<ScaledSum<acc_t>> leaving, const Tiling& tiling,
                                                const Tile<scalar_t>& tile, acc_t w) {
  if (segment.index != 0 || segment.channel >= tile.channels) return;
  leaving[sums_index(tiling, tile, segment.channel, 0)] = sums.before(tiling.segments, nothing<acc_t>(), w);
  leaving[sums_index(tiling, tile, segment.channel, 1)] = sums.after(-1, nothing<acc_t>(), w);
}

// What enters the tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ ScaledSum<acc_t> load_entering(Global<const ScaledSum<acc_t>> entering, const Tiling& tiling,
                                                          const Tile<scalar_t>& tile, int channel, int direction) {
  if (tiling.tiles == 1 || channel >= tile.channels) return nothing<acc_t>();
  return entering[sums_index(tiling, tile, channel, direction)];
}

// What enters a segment from before and from after it.
template <typename acc_t>
struct Around {
  ScaledSum<acc_t> before, after;
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ Around<acc_t> around(const Segment<scalar_t>& segment, const BlockSums<scalar_t>& sums,
                                                Global<const ScaledSum<acc_t>> entering, const Tiling& tiling,
                                                const Tile<scalar_t>& tile, acc_t w) {
  return {sums.before(segment.index, load_entering<scalar_t>(entering, tiling, tile, segment.channel, 0), w),
          sums.after(segment.index, load_entering<scalar_t>(entering, tiling, tile, segment.channel, 1), w)};
}

// The sums of each tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    sum_tiles_kernel(Inputs<scalar_t> in, Global<ScaledSum<acc_t>> leaving, Tiling tiling) {
  for (int64_t task = blockIdx.x; task < tiling.tasks(); task += gridDim.x) {
    const Tile<scalar_t> tile(tiling, task);
    const Segment<scalar_t> segment(tiling, tile);
    const BlockSums<scalar_t> sums(tiling, 2, segment);
    load_tokens(in, tiling, tile);
    const Channel<acc_t> channel = load_channel(in, tile, segment.channel);
    __syncthreads();
    sum_segments(segment, channel, key_range(segment), sums);
    __syncthreads();
    store_tile_sums(sums, segment, leaving, tiling, tile, channel.w);
    __syncthreads();  // before the next task overwrites shared memory
  }
}

constexpr int kMergeThreads = 128;

// Replaces the sums that leave each tile by those that enter it: an exclusive scan over the tiles, one thread a channel
// and direction.
template <typename acc_t>
__global__ void __launch_bounds__(kMergeThreads)
    merge_tiles_kernel(Global<const acc_t> w, Global<ScaledSum<acc_t>> sums, int64_t batch, int64_t tiles,
                       int64_t channels, int tokens) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < 2 * batch * channels; i += stride) {
    const int64_t channel = i % channels, image = i / channels % batch, backwards = i / channels / batch;
    const acc_t decay = w[channel];
    ScaledSum<acc_t> entering = nothing<acc_t>();
    for (int64_t step = 0; step < tiles; ++step) {
      const int64_t tile = backwards ? tiles - 1 - step : step;
      const int64_t index = ((backwards * batch + image) * tiles + tile) * channels + channel;
      const ScaledSum<acc_t> leaving = sums[index];
      sums[index] = entering;
      entering.gap += tokens;
      entering = merge(entering, leaving, decay);
    }
  }
}

// ---- Host functions ----

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
Inputs<scalar_t> make_inputs(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  return {global<const acc_t>(w), global<const acc_t>(u), global<const scalar_t>(k), global<const scalar_t>(v), {}};
}

// A workspace of sums, (2, B, tiles, C) of four numbers each.
inline Tensor empty_sums(const Tiling& tiling, const Tensor& w) {
  return torch::stable::new_empty(w, {2, tiling.batch, tiling.tiles, tiling.channels, 4});
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void merge_tiles(const Context& context, const Tiling& tiling, const Tensor& w, const Tensor& sums) {
  launch(context, merge_tiles_kernel<acc_t>, divide_up(2 * tiling.batch * tiling.channels, kMergeThreads),
         dim3(kMergeThreads), 0, global<const acc_t>(w), global<ScaledSum<acc_t>>(sums), tiling.batch, tiling.tiles,
         tiling.channels, tiling.segments * Block<scalar_t>::kLength);
}

// What enters each tile; not read where there is one tile only.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
Tensor entering_sums(const Context& context, const Tiling& tiling, const Inputs<scalar_t>& in, const Tensor& w) {
  using B = Block<scalar_t>;
  if (tiling.tiles == 1) return torch::stable::new_empty(w, {0});
  Tensor sums = empty_sums(tiling, w);
  launch(context, sum_tiles_kernel<scalar_t>, tiling.tasks(), dim3(tiling.segments * B::kChannels),
         B::shared_bytes(tiling.segments, 2), in, global<ScaledSum<acc_t>>(sums), tiling);
  merge_tiles<scalar_t>(context, tiling, w, sums);
  return sums;
}

}  // namespace
}  // namespace vrwkv
