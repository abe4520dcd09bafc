// The sums that enter the tiles, with which both passes begin.
#pragma once

#include "bi_wkv_fast.cuh"
#include "bi_wkv_safe.cuh"

namespace vrwkv {
namespace {

// The sums that leave a tile towards either end. The segments' sums are relative to `scale` where they are `fast`.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void store_tile_sums(const Memory<scalar_t>& memory, const BlockSums<scalar_t>& sums,
                                                const Segment<scalar_t>& segment, Global<ScaledSum<acc_t>> leaving,
                                                const Tiling& tiling, const Tile& tile, bool fast, acc_t scale,
                                                acc_t w) {
  if (segment.index != 0 || !segment.exists(tile)) return;
  ScaledSum<acc_t> to_end, to_start;
  if (fast) {
    const acc_t power = memory.powers[Block<scalar_t>::kLength];
    const Sum<acc_t> none{0, 0}, end = sums.before(tiling.segments, none, power), start = sums.after(-1, none, power);
    to_end = {end.num, end.den, scale, 0};
    to_start = {start.num, start.den, scale, 0};
  } else {
    to_end = sums.before(tiling.segments, nothing<acc_t>(), w);
    to_start = sums.after(-1, nothing<acc_t>(), w);
  }
  leaving[sums_index(tiling, tile, segment.channel, 0)] = to_end;
  leaving[sums_index(tiling, tile, segment.channel, 1)] = to_start;
}

// The sums of each tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    sum_tiles_kernel(Inputs<scalar_t> in, Global<ScaledSum<acc_t>> leaving, Tiling tiling) {
  each_tile<scalar_t, false>(tiling, [&](const Tile& tile) {
    const Segment<scalar_t> segment(tile);
    const Memory<scalar_t> memory(tiling, segment);
    const Channel<acc_t> channel = load_channel(in, tile, segment);
    const bool fast = is_fast<scalar_t>(tiling, channel);
    const Loaded<scalar_t, false> loaded(in, Tokens<scalar_t>(tiling, tile, segment, fast));
    write_maximum_and_powers(memory, segment, loaded, channel);
    __syncthreads();
    FastSegment<scalar_t> tokens{};
    if (fast) {
      weigh(loaded, memory, acc_t(kEmpty), tokens);
      tokens.sum_tokens(memory.tokens, segment.index);
    } else {
      SafeSegment<scalar_t>(in, tiling, tile, segment, channel).sum_tokens(memory.tokens);
    }
    __syncthreads();
    store_tile_sums(memory, memory.tokens, segment, leaving, tiling, tile, fast, tokens.reference, channel.w);
    __syncthreads();  // before the next tile overwrites shared memory
  });
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
         B::shared_bytes(tiling.segments, 1), in, global<ScaledSum<acc_t>>(sums), tiling);
  merge_tiles<scalar_t>(context, tiling, w, sums);
  return sums;
}

}  // namespace
}  // namespace vrwkv
