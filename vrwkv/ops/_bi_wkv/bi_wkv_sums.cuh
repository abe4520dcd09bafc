// The sums that enter the tiles, with which both passes begin.
#pragma once

#include "bi_wkv_fast.cuh"
#include "bi_wkv_safe.cuh"

namespace vrwkv {
namespace {

// One thread's part of a tile as every kernel begins with it: its tokens are loaded, and all segments' largest keys are
// in shared memory.
template <typename scalar_t, bool kGradients>
struct Part {
  Segment<scalar_t> segment;
  Memory<scalar_t> memory;
  Channel<accumulate_t<scalar_t>> channel;
  bool fast;
  Loaded<scalar_t, kGradients> loaded;

  __device__ __forceinline__ Part(const Inputs<scalar_t>& in, const Tiling& tiling, const Tile& tile)
      : segment(tile),
        memory(tiling, segment),
        channel(load_channel(in, tile, segment)),
        fast(is_fast<scalar_t>(tiling, channel)),
        loaded(in, Tokens<scalar_t>(tiling, tile, segment, fast)) {
    write_maximum_and_powers(memory, segment, loaded, channel);
    __syncthreads();
  }
};

// The sums that leave a tile towards either end. The segments' sums are relative to e^(sign * reference)
// where they are `fast`.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void store_tile_sums(const Memory<scalar_t>& memory, const BlockSums<scalar_t>& sums,
                                                const Segment<scalar_t>& segment, Global<ScaledSum<acc_t>> leaving,
                                                const Tiling& tiling, const Tile& tile, bool fast, acc_t sign,
                                                acc_t w) {
  if (segment.index == 0 && segment.exists(tile)) {  // count: 2 / segments
    ScaledSum<acc_t> to_end, to_start;
    if (fast) {
      const acc_t power = memory.powers[Block<scalar_t>::kLength];
      const acc_t scale = sign * memory.maxima[Block<scalar_t>::kReference];
      const Sum<acc_t> none{0, 0}, end = sums.before(tiling.segments, none, power), start = sums.after(-1, none, power);
      to_end = {end.num, end.den, scale, 0};
      to_start = {start.num, start.den, scale, 0};
    } else {  // count: 0
      to_end = sums.before(tiling.segments, nothing<acc_t>(), w);
      to_start = sums.after(-1, nothing<acc_t>(), w);
    }
    const SumsPlace place(tiling, tile, segment.channel);
    leaving[place.to_end] = to_end;
    leaving[place.to_start()] = to_start;
  }
}

// The sums of each tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    sum_tiles_kernel(Inputs<scalar_t> in, Global<ScaledSum<acc_t>> leaving, Tiling tiling) {
  each_tile<scalar_t, false>(tiling, [&](const Tile& tile) {
    const Part<scalar_t, false> part(in, tiling, tile);
    const auto& [segment, memory, channel, fast, loaded] = part;
    FastSegment<scalar_t> tokens{};
    if (fast) {
      weigh(loaded, memory, segment, acc_t(kEmpty), tokens);
      tokens.sum_tokens(memory.tokens, segment.index);
    } else {  // count: 0
      SafeSegment<scalar_t>(in, tiling, tile, segment).sum_tokens(memory.tokens);
    }
    __syncthreads();
    store_tile_sums(memory, memory.tokens, segment, leaving, tiling, tile, fast, acc_t(1), channel.w);
    __syncthreads();  // before the next tile overwrites shared memory
  });
}

// ---- From the sums that leave tiles to those that enter them ----

constexpr int kScanThreads = 512;
constexpr int kMaxScanned = 256;  // tiles that one block scans: a chunk

// The scan of a workspace of sums (2, B, tiles, C), those towards the end first. `steps` is the number of tokens of a
// tile. A block has `width` channels and `length` tiles, a power of two.
struct TileScan {
  int64_t rows, channels;  // rows = 2 B
  int tiles, chunks, length, width;
  int64_t steps;

  Tasks tasks() const { return {divide_up(channels, width), chunks, rows}; }
};

// Where a thread's sum lies in the workspaces of tiles and of chunks, -1 where it does not exist, and its position in
// the chunk, in the direction of the sum.
struct ChunkPlace {
  int64_t tile, chunk;
  int lane;
};

// Calls function(place, w) for the thread's sum in each of the block's chunks; all threads take part.
template <typename acc_t, typename Function>
__device__ __forceinline__ void each_chunk(const TileScan& scan, Global<const acc_t> w, const Function& function) {
  const int column = threadIdx.x % scan.width, lane = threadIdx.x / scan.width;
  for (int64_t row = blockIdx.z; row < scan.rows; row += gridDim.z) {
    const bool backwards = 2 * row >= scan.rows;
    for (int chunk = blockIdx.y; chunk < scan.chunks; chunk += gridDim.y) {
      const int position = chunk * scan.length + lane;
      for (int64_t group = blockIdx.x; group * scan.width < scan.channels; group += gridDim.x) {
        const int64_t channel = group * scan.width + column;
        const int64_t tile_row = row * scan.tiles + (backwards ? scan.tiles - 1 - position : position);
        const int64_t chunk_row = row * scan.chunks + (backwards ? scan.chunks - 1 - chunk : chunk);
        const bool in_row = channel < scan.channels;
        function(ChunkPlace{in_row && position < scan.tiles ? tile_row * scan.channels + channel : -1,
                            in_row ? chunk_row * scan.channels + channel : -1, lane},
                 in_row ? w[channel] : acc_t(0));
      }
    }
  }
}

// Replaces the sums that leave each tile by those that enter it from its chunk: a scan in log2(length) steps, each of
// which doubles the tiles that a sum covers. With several chunks `leaving` receives what leaves each.
template <typename acc_t>
__global__ void __launch_bounds__(kScanThreads) scan_tiles_kernel(Global<const acc_t> w, Global<ScaledSum<acc_t>> sums,
                                                                  Global<ScaledSum<acc_t>> leaving, TileScan scan) {
  const int threads = scan.length * scan.width, thread = threadIdx.x;
  const Shared<ScaledSum<acc_t>> shared = shared_at<ScaledSum<acc_t>>(0);  // (2, length, width): read one, write one
  each_chunk<acc_t>(scan, w, [&](const ChunkPlace& place, acc_t decay) {
    ScaledSum<acc_t> sum = nothing<acc_t>();
    if (place.tile >= 0) sum = sums[place.tile];
    int half = 0;
    shared[thread] = sum;
    __syncthreads();
    for (int covered = 1; covered < scan.length; covered *= 2) {  // count: steps
      if (place.lane >= covered) {
        ScaledSum<acc_t> earlier = shared[half * threads + thread - covered * scan.width];
        earlier.gap += static_cast<acc_t>(covered * scan.steps);
        sum = merge(earlier, sum, decay);
      }
      half = 1 - half;
      shared[half * threads + thread] = sum;
      __syncthreads();
    }
    ScaledSum<acc_t> entering = nothing<acc_t>();
    if (place.lane > 0) entering = shared[half * threads + thread - scan.width];
    if (place.tile >= 0) sums[place.tile] = entering;
    // The last lane of a chunk that is not full has seen all of its tiles, too.
    if (scan.chunks > 1 && place.chunk >= 0 && place.lane == scan.length - 1) leaving[place.chunk] = sum;
    __syncthreads();  // before the next chunk overwrites shared memory
  });
}

// Adds what enters each chunk to what enters its tiles.
template <typename acc_t>
__global__ void __launch_bounds__(kScanThreads)
    add_chunks_kernel(Global<const acc_t> w, Global<ScaledSum<acc_t>> sums, Global<const ScaledSum<acc_t>> entering,
                      TileScan scan) {
  each_chunk<acc_t>(scan, w, [&](const ChunkPlace& place, acc_t decay) {
    if (place.tile < 0) return;
    ScaledSum<acc_t> before = entering[place.chunk];
    before.gap += static_cast<acc_t>(place.lane * scan.steps);
    sums[place.tile] = merge(before, sums[place.tile], decay);
  });
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

// Replaces the sums that leave each of `tiles` tiles of `steps` tokens by those that enter it.
template <typename acc_t>
void scan_tiles(const Context& context, const Tensor& w, const Tensor& sums, int64_t rows, int64_t tiles,
                int64_t steps) {
  TileScan scan{rows, w.size(0), static_cast<int>(tiles), 0, 1, 0, steps};
  while (scan.length < std::min<int64_t>(tiles, kMaxScanned)) scan.length *= 2;
  scan.width = std::min(32, kScanThreads / scan.length);
  scan.chunks = static_cast<int>(divide_up(tiles, scan.length));
  const dim3 threads(scan.length * scan.width);
  Tensor of_chunks = sums;  // not read, with one chunk
  if (scan.chunks > 1) of_chunks = torch::stable::new_empty(w, {rows, scan.chunks, scan.channels, 4});
  launch(context, scan_tiles_kernel<acc_t>, scan.tasks(), threads, 2 * threads.x * sizeof(ScaledSum<acc_t>),
         global<const acc_t>(w), global<ScaledSum<acc_t>>(sums), global<ScaledSum<acc_t>>(of_chunks), scan);
  if (scan.chunks == 1) return;
  scan_tiles<acc_t>(context, w, of_chunks, rows, scan.chunks, steps * scan.length);
  launch(context, add_chunks_kernel<acc_t>, scan.tasks(), threads, 0, global<const acc_t>(w),
         global<ScaledSum<acc_t>>(sums), global<const ScaledSum<acc_t>>(of_chunks), scan);
}

template <typename scalar_t>
void scan_tiles(const Context& context, const Tiling& tiling, const Tensor& w, const Tensor& sums) {
  scan_tiles<accumulate_t<scalar_t>>(context, w, sums, 2 * tiling.batch, tiling.tiles,
                                     tiling.segments * Block<scalar_t>::kLength);
}

// What enters each tile; not read where there is one tile only.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
Tensor entering_sums(const Context& context, const Tiling& tiling, const Inputs<scalar_t>& in, const Tensor& w) {
  using B = Block<scalar_t>;
  if (tiling.tiles == 1) return torch::stable::new_empty(w, {0});
  Tensor sums = empty_sums(tiling, w);
  launch(context, sum_tiles_kernel<scalar_t>, tiling.tasks(), dim3(tiling.segments * B::kChannels),
         B::shared_bytes(tiling.segments, 1), in, global<ScaledSum<acc_t>>(sums), tiling);
  scan_tiles<scalar_t>(context, tiling, w, sums);
  return sums;
}

}  // namespace
}  // namespace vrwkv
