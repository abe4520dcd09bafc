// Bi-WKV on CUDA. The formula stands in __init__.py, the algorithm and its traffic in README.md; how tokens are cut
// into tiles and segments in bi_wkv_tile.cuh, the arithmetic of the scans in bi_wkv_scan.cuh.
#include <tuple>

#include "../common/reduce_rows.cuh"
#include "bi_wkv_checks.h"
#include "bi_wkv_tile.cuh"

namespace vrwkv {
namespace {

// ---- Device code: one thread, one segment ----

// Fast segments unroll their loops and keep their sums in registers; safe ones, which are rare, keep them in local
// memory.
template <typename Scan, typename scalar_t>
constexpr int kUnroll = Scan::kFast ? Block<scalar_t>::kLength : 1;

template <typename Scan, typename scalar_t>
__device__ __forceinline__ int length_of(const Segment<scalar_t>& segment) {
  return Scan::kFast ? Block<scalar_t>::kLength : segment.tokens;
}

template <typename T>
struct KeyRange {
  T largest, smallest;
};

// NaN is passed over here; it shows in every sum.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ KeyRange<T> key_range(const Segment<scalar_t>& segment) {
  T largest = kEmpty, smallest = -kEmpty;
#pragma unroll
  for (int i = 0; i < Block<scalar_t>::kLength; ++i) {
    const T key = segment.key(i);
    largest = fmax(largest, key);
    if (i < segment.tokens) smallest = fmin(smallest, key);
  }
  return {largest, smallest};
}

// Whether FastScan holds relative to e^reference. An empty segment, which the last tile may have, has nothing to scan;
// in double both scans would not fit into the registers.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ bool is_fast(const Segment<scalar_t>& segment, T reference, T smallest_key,
                                        const Channel<T>& channel) {
  if constexpr (std::is_same_v<T, double>) return false;
  const T decay = fabs(channel.w) * Block<scalar_t>::kLength;
  return segment.tokens > 0 && reference - smallest_key + decay + fabs(channel.u) < kFastRange;
}

// The sums of the segment's own tokens that leave it towards either end.
template <typename Scan, typename scalar_t>
__device__ __forceinline__ void sum_tokens(const Scan& scan, const Segment<scalar_t>& segment,
                                           const BlockSums<scalar_t>& sums) {
  const int length = length_of<Scan>(segment);
  typename Scan::Sum prefix = scan.zero(), suffix = scan.zero();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) prefix = scan.step(prefix, scan.token(segment.key(i), segment.value(i)));
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) suffix = scan.step(suffix, scan.token(segment.key(i), segment.value(i)));
  sums.write(segment.index, scan.leave(prefix), scan.leave(suffix));
}

// y, in place of the keys.
template <typename Scan, typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_outputs(const Scan& scan, const Segment<scalar_t>& segment,
                                              const Anchored<T>& before, const Anchored<T>& after) {
  using B = Block<scalar_t>;
  const int length = length_of<Scan>(segment);
  typename Scan::Sum suffixes[B::kLength], suffix = scan.enter(after), prefix = scan.enter(before);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    suffixes[i] = suffix;
    suffix = scan.step(suffix, scan.token(segment.key(i), segment.value(i)));
  }
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const T key = segment.key(i), v = segment.value(i);
    const typename Scan::Sum total = scan.total(prefix, suffixes[i], key, v);
    prefix = scan.step(prefix, scan.token(key, v));
    segment.k[i * B::kChannels] = static_cast<scalar_t>(total.n * reciprocal(total.d));
  }
}

// What the backward pass keeps of a segment while its sums of gradients travel through the block.
template <typename Scan, typename scalar_t>
struct Gradients {
  typename Scan::Sum each[Block<scalar_t>::kLength];  // (a_t, b_t)
  typename Scan::Sum split;                           // e^-w per step over the prefixes P_t of the segment
  accumulate_t<scalar_t> grad_w;
};

// a_t = g_t / D_t, b_t = a_t y_t, their sums, and the part of grad_w from pairs i < t with t in this segment.
template <typename Scan, typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ void find_gradients(const Scan& scan, const Segment<scalar_t>& segment,
                                               const Anchored<T>& before, const Anchored<T>& after,
                                               Gradients<Scan, scalar_t>& gradients, const BlockSums<scalar_t>& sums) {
  const int length = length_of<Scan>(segment);
  typename Scan::Sum suffix = scan.enter(after), prefix = scan.enter(before);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    gradients.each[i] = suffix;  // until the gradient takes its place
    suffix = scan.step(suffix, scan.token(segment.key(i), segment.value(i)));
  }
  gradients.split = scan.zero();
  gradients.grad_w = 0;
  typename Scan::Sum to_end = scan.zero(), to_start = scan.zero();
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const T key = segment.key(i), v = segment.value(i);
    typename Scan::Sum gradient = scan.gradient(scan.total(prefix, gradients.each[i], key, v), segment.grad(i));
    if (Scan::kFast && i >= segment.tokens) gradient = scan.zero();
    gradients.each[i] = gradient;
    gradients.grad_w -= scan.product(gradients.split, gradient);
    gradients.split = scan.split(gradients.split, prefix);
    prefix = scan.step(prefix, scan.token(key, v));
    to_end = scan.step(to_end, gradient);
  }
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) to_start = scan.step(to_start, gradients.each[i]);
  sums.write(segment.index, scan.leave_gradient(to_end), scan.leave_gradient(to_start));
}

// Gradients of k and v in their place, and this segment's share of those of w and u.
template <typename Scan, typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_gradients(const Scan& scan, const Segment<scalar_t>& segment,
                                                const Anchored<T>& before, const Anchored<T>& after,
                                                const Anchored<T>& gradients_before, const Anchored<T>& gradients_after,
                                                const Gradients<Scan, scalar_t>& gradients, T& grad_w, T& grad_u) {
  using B = Block<scalar_t>;
  using Sum = typename Scan::Sum;
  const int length = length_of<Scan>(segment);
  Sum suffixes[B::kLength], to_start = scan.enter_gradient(gradients_after),
                            to_end = scan.enter_gradient(gradients_before);
  Sum suffix = scan.enter(after), split = scan.zero();
  // Pairs i < t with t beyond this segment.
  grad_w = gradients.grad_w - scan.product(gradients.split, to_start);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    grad_w -= scan.product(split, gradients.each[i]);  // pairs i > t
    split = scan.split(split, suffix);
    suffix = scan.step(suffix, scan.token(segment.key(i), segment.value(i)));
    suffixes[i] = to_start;
    to_start = scan.step(to_start, gradients.each[i]);
  }
  grad_w -= scan.product(split, to_end);
  grad_u = 0;
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const T key = segment.key(i), v = segment.value(i);
    const Sum own = scan.own(gradients.each[i]);
    const Sum all = scan.added(scan.added(to_end, suffixes[i]), own);
    const T scale = scan.scale(key, all);
    grad_u += (v * own.n - own.d) * scan.scale(key, own);
    to_end = scan.step(to_end, gradients.each[i]);
    segment.k[i * B::kChannels] = static_cast<scalar_t>((v * all.n - all.d) * scale);
    segment.v[i * B::kChannels] = static_cast<scalar_t>(all.n * scale);
  }
}

// ---- Kernels ----

// Where sums of a tile lie in a workspace (2, B, tiles, C): those towards the end first.
template <typename scalar_t>
__device__ __forceinline__ int64_t sums_index(const Shape& shape, const Tile<scalar_t>& tile, int channel,
                                              int direction) {
  return ((direction * shape.batch + tile.image) * shape.tiles + tile.index) * shape.channels + tile.first_channel +
         channel;
}

// What enters the tile, where there are several.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ Anchored<T> entering(Global<const Anchored<T>> carries, const Shape& shape,
                                                const Tile<scalar_t>& tile, int channel, int direction) {
  if (shape.tiles == 1 || channel >= tile.channels) return nothing<T>();
  return carries[sums_index(shape, tile, channel, direction)];
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_tile_sums(const BlockSums<scalar_t>& sums, const Segment<scalar_t>& segment,
                                                Global<Anchored<T>> out, const Shape& shape, const Tile<scalar_t>& tile,
                                                T w) {
  if (segment.index != 0 || segment.channel >= tile.channels) return;
  out[sums_index(shape, tile, segment.channel, 0)] = sums.before(shape.segments, nothing<T>(), w);
  out[sums_index(shape, tile, segment.channel, 1)] = sums.after(-1, nothing<T>(), w);
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__device__ __forceinline__ Channel<T> load_channel(Global<const T> w, Global<const T> u, const Tile<scalar_t>& tile,
                                                   int channel) {
  if (channel >= tile.channels) return {0, 0};
  return {w[tile.first_channel + channel], u[tile.first_channel + channel]};
}

// The sums of each tile, where there are several.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    sums_kernel(Global<const T> w, Global<const T> u, Global<const scalar_t> k, Global<const scalar_t> v,
                Global<Anchored<T>> out, Shape shape) {
  for (int64_t task = blockIdx.x; task < shape.tasks(); task += gridDim.x) {
    const Tile<scalar_t> tile(shape, task);
    const Segment<scalar_t> segment(shape, tile);
    const BlockSums<scalar_t> sums(shape, 2, segment);
    load_tile<scalar_t>(k, shared_at<scalar_t>(0), shape, tile, -INFINITY);
    load_tile<scalar_t>(v, shared_at<scalar_t>(Block<scalar_t>::tensor_bytes(shape.segments)), shape, tile, 0);
    const Channel<T> channel = load_channel<scalar_t>(w, u, tile, segment.channel);
    __syncthreads();
    const KeyRange<T> range = key_range(segment);
    if (is_fast(segment, range.largest, range.smallest, channel)) {
      sum_tokens(FastScan<T>(channel, range.largest), segment, sums);
    } else {
      sum_tokens(SafeScan<T>(channel), segment, sums);
    }
    __syncthreads();
    write_tile_sums(sums, segment, out, shape, tile, channel.w);
    __syncthreads();  // before the next task overwrites shared memory
  }
}

constexpr int kCarryThreads = 128;

// Replaces the sums of each tile by what enters it: an exclusive scan over the tiles, one thread a channel and
// direction.
template <typename T>
__global__ void __launch_bounds__(kCarryThreads)
    carry_kernel(Global<const T> w, Global<Anchored<T>> sums, int64_t batch, int64_t tiles, int64_t channels,
                 int tokens) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < 2 * batch * channels; i += stride) {
    const int64_t channel = i % channels, image = i / channels % batch, backwards = i / channels / batch;
    const T decay = w[channel];
    Anchored<T> carry = nothing<T>();
    for (int64_t step = 0; step < tiles; ++step) {
      const int64_t tile = backwards ? tiles - 1 - step : step;
      const int64_t index = ((backwards * batch + image) * tiles + tile) * channels + channel;
      const Anchored<T> sum = sums[index];
      sums[index] = carry;
      carry.gap += tokens;
      carry = merge(carry, sum, decay);
    }
  }
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    forward_kernel(Global<const T> w, Global<const T> u, Global<const scalar_t> k, Global<const scalar_t> v,
                   Global<const Anchored<T>> carries, Global<scalar_t> y, Shape shape) {
  for (int64_t task = blockIdx.x; task < shape.tasks(); task += gridDim.x) {
    const Tile<scalar_t> tile(shape, task);
    const Segment<scalar_t> segment(shape, tile);
    const BlockSums<scalar_t> sums(shape, 2, segment);
    load_tile<scalar_t>(k, shared_at<scalar_t>(0), shape, tile, -INFINITY);
    load_tile<scalar_t>(v, shared_at<scalar_t>(Block<scalar_t>::tensor_bytes(shape.segments)), shape, tile, 0);
    const Channel<T> channel = load_channel<scalar_t>(w, u, tile, segment.channel);
    __syncthreads();
    const KeyRange<T> range = key_range(segment);
    bool fast = is_fast(segment, range.largest, range.smallest, channel);
    if (fast) {
      sum_tokens(FastScan<T>(channel, range.largest), segment, sums);
    } else {
      sum_tokens(SafeScan<T>(channel), segment, sums);
    }
    __syncthreads();
    const Anchored<T> before =
        sums.before(segment.index, entering<scalar_t>(carries, shape, tile, segment.channel, 0), channel.w);
    const Anchored<T> after =
        sums.after(segment.index, entering<scalar_t>(carries, shape, tile, segment.channel, 1), channel.w);
    const T reference = reference_of(range.largest, before, after, channel.w);
    fast = is_fast(segment, reference, range.smallest, channel);
    if (fast) {
      write_outputs(FastScan<T>(channel, reference), segment, before, after);
    } else {
      write_outputs(SafeScan<T>(channel), segment, before, after);
    }
    __syncthreads();
    store_tile<scalar_t>(shared_at<const scalar_t>(0), y, shape, tile);
    __syncthreads();
  }
}

// Gradients of k and v and, for each image and tile, of w and u (2, B * tiles, C). With only_sums nothing but the sums
// of gradients that leave each tile: scanned over the tiles, they are the `gradient_carries` of the second pass.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kBackwardBlocks)
    backward_kernel(Global<const T> w, Global<const T> u, Global<const scalar_t> k, Global<const scalar_t> v,
                    Global<const scalar_t> grad, Global<const Anchored<T>> carries,
                    Global<const Anchored<T>> gradient_carries, Global<Anchored<T>> out, Global<scalar_t> grad_k,
                    Global<scalar_t> grad_v, Global<T> grad_wu, Shape shape, bool only_sums) {
  using B = Block<scalar_t>;
  for (int64_t task = blockIdx.x; task < shape.tasks(); task += gridDim.x) {
    const Tile<scalar_t> tile(shape, task);
    const Segment<scalar_t> segment(shape, tile);
    const BlockSums<scalar_t> sums(shape, 3, segment);
    const int tensor = B::tensor_bytes(shape.segments);
    load_tile<scalar_t>(k, shared_at<scalar_t>(0), shape, tile, -INFINITY);
    load_tile<scalar_t>(v, shared_at<scalar_t>(tensor), shape, tile, 0);
    load_tile<scalar_t>(grad, shared_at<scalar_t>(2 * tensor), shape, tile, 0);
    const Channel<T> channel = load_channel<scalar_t>(w, u, tile, segment.channel);
    __syncthreads();
    const KeyRange<T> range = key_range(segment);
    bool fast = is_fast(segment, range.largest, range.smallest, channel);
    FastScan<T> fast_scan(channel, range.largest);
    SafeScan<T> safe_scan(channel);
    if (fast) {
      sum_tokens(fast_scan, segment, sums);
    } else {
      sum_tokens(safe_scan, segment, sums);
    }
    __syncthreads();
    const Anchored<T> before =
        sums.before(segment.index, entering<scalar_t>(carries, shape, tile, segment.channel, 0), channel.w);
    const Anchored<T> after =
        sums.after(segment.index, entering<scalar_t>(carries, shape, tile, segment.channel, 1), channel.w);
    __syncthreads();  // before the sums of gradients take the place of those of tokens
    Gradients<FastScan<T>, scalar_t> fast_gradients;
    Gradients<SafeScan<T>, scalar_t> safe_gradients;
    fast_scan.reference = reference_of(range.largest, before, after, channel.w);
    fast = is_fast(segment, fast_scan.reference, range.smallest, channel);
    if (fast) {
      find_gradients(fast_scan, segment, before, after, fast_gradients, sums);
    } else {
      find_gradients(safe_scan, segment, before, after, safe_gradients, sums);
    }
    __syncthreads();
    if (only_sums) {
      write_tile_sums(sums, segment, out, shape, tile, channel.w);
    } else {
      const Anchored<T> gradients_before =
          sums.before(segment.index, entering<scalar_t>(gradient_carries, shape, tile, segment.channel, 0), channel.w);
      const Anchored<T> gradients_after =
          sums.after(segment.index, entering<scalar_t>(gradient_carries, shape, tile, segment.channel, 1), channel.w);
      T grad_w, grad_u;
      if (fast) {
        write_gradients(fast_scan, segment, before, after, gradients_before, gradients_after, fast_gradients, grad_w,
                        grad_u);
      } else {
        write_gradients(safe_scan, segment, before, after, gradients_before, gradients_after, safe_gradients, grad_w,
                        grad_u);
      }
      __syncthreads();
      sums.write(segment.index, {grad_w, grad_u, 0, 0}, nothing<T>());
      store_tile<scalar_t>(shared_at<const scalar_t>(0), grad_k, shape, tile);
      store_tile<scalar_t>(shared_at<const scalar_t>(tensor), grad_v, shape, tile);
      __syncthreads();
      if (segment.index == 0 && segment.channel < tile.channels) {
        T total_w = 0, total_u = 0;
        for (int other = 0; other < shape.segments; ++other) {
          const Anchored<T> part = sums.prefix[other * B::kChannels + segment.channel];
          total_w += part.n;
          total_u += part.d;
        }
        grad_wu[sums_index(shape, tile, segment.channel, 0)] = total_w;
        grad_wu[sums_index(shape, tile, segment.channel, 1)] = total_u;
      }
    }
    __syncthreads();
  }
}

// ---- Host functions ----

// A workspace of sums, (2, B, tiles, C) of four numbers each.
template <typename T>
Tensor empty_sums(const Shape& shape, const Tensor& w) {
  return torch::stable::new_empty(w, {2, shape.batch, shape.tiles, shape.channels, 4});
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
void carry(const Context& context, const Shape& shape, const Tensor& w, const Tensor& sums) {
  launch(context, carry_kernel<T>, divide_up(2 * shape.batch * shape.channels, kCarryThreads), dim3(kCarryThreads), 0,
         global<const T>(w), global<Anchored<T>>(sums), shape.batch, shape.tiles, shape.channels,
         shape.segments * Block<scalar_t>::kLength);
}

// What enters each tile; undefined where there is one tile only.
template <typename scalar_t, typename T = accumulate_t<scalar_t>>
Tensor token_carries(const Context& context, const Shape& shape, const Tensor& w, const Tensor& u, const Tensor& k,
                     const Tensor& v) {
  using B = Block<scalar_t>;
  Tensor sums = empty_sums<T>(shape, w);
  launch(context, sums_kernel<scalar_t>, shape.tasks(), dim3(shape.segments * B::kChannels),
         B::shared_bytes(shape.segments, 2), global<const T>(w), global<const T>(u), global<const scalar_t>(k),
         global<const scalar_t>(v), global<Anchored<T>>(sums), shape);
  carry<scalar_t>(context, shape, w, sums);
  return sums;
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
void forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& y) {
  using B = Block<scalar_t>;
  const Context context(k);
  const int64_t channels = k.size(2);
  const Shape shape = make_shape<scalar_t>(k.size(0), k.size(1), channels, 2,
                                           is_vectorizable(k, channels) && is_vectorizable(v, channels));
  const Tensor carries = shape.tiles > 1 ? token_carries<scalar_t>(context, shape, w, u, k, v) : w;
  launch(context, forward_kernel<scalar_t>, shape.tasks(), dim3(shape.segments * B::kChannels),
         B::shared_bytes(shape.segments, 2), global<const T>(w), global<const T>(u), global<const scalar_t>(k),
         global<const scalar_t>(v), global<const Anchored<T>>(carries), global<scalar_t>(y), shape);
}

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
void backward(const Tensor& grad, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
              const Tensor& grad_w, const Tensor& grad_u, const Tensor& grad_k, const Tensor& grad_v) {
  using B = Block<scalar_t>;
  const Context context(k);
  const int64_t channels = k.size(2);
  const bool vectorized =
      is_vectorizable(k, channels) && is_vectorizable(v, channels) && is_vectorizable(grad, channels);
  const Shape shape = make_shape<scalar_t>(k.size(0), k.size(1), channels, 3, vectorized);
  const auto run = [&](const Tensor& carries, const Tensor& gradient_carries, const Tensor& sums,
                       const Tensor& partials, bool only_sums) {
    launch(context, backward_kernel<scalar_t>, shape.tasks(), dim3(shape.segments * B::kChannels),
           B::shared_bytes(shape.segments, 3), global<const T>(w), global<const T>(u), global<const scalar_t>(k),
           global<const scalar_t>(v), global<const scalar_t>(grad), global<const Anchored<T>>(carries),
           global<const Anchored<T>>(gradient_carries), global<Anchored<T>>(sums), global<scalar_t>(grad_k),
           global<scalar_t>(grad_v), global<T>(partials), shape, only_sums);
  };
  const Tensor none = torch::stable::new_empty(w, {0});
  const Tensor partials = torch::stable::new_empty(w, {2, shape.batch * shape.tiles, channels});
  if (shape.tiles == 1) {
    run(none, none, none, partials, false);
  } else {
    const Tensor carries = token_carries<scalar_t>(context, shape, w, u, k, v);
    const Tensor gradient_carries = empty_sums<T>(shape, w);
    run(carries, none, gradient_carries, none, true);
    carry<scalar_t>(context, shape, w, gradient_carries);
    run(carries, gradient_carries, none, partials, false);
  }
  reduce_rows<T>(context, partials, {grad_w, grad_u}, shape.batch * shape.tiles, channels);
}

void check(const char* op, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_device(op, "k", k);
  check_bi_wkv(op, w, u, k, v);
}

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check("bi_wkv", w, u, k, v);
  const Tensor w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor y = torch::stable::empty_like(k_);
  if (k_.numel() == 0) return y;
  THO_DISPATCH_V2(k_.scalar_type(), "bi_wkv", AT_WRAP([&] { forward<scalar_t>(w_, u_, k_, v_, y); }), ScalarType::Float,
                  ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bi_wkv_backward(const Tensor& grad, const Tensor& w, const Tensor& u,
                                                           const Tensor& k, const Tensor& v) {
  check("_bi_wkv_backward", w, u, k, v);
  check_same("_bi_wkv_backward", "grad", grad, "k", k);
  const Tensor g = contiguous(grad), w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor grad_k = torch::stable::empty_like(k_), grad_v = torch::stable::empty_like(k_);
  Tensor grad_w = torch::stable::empty_like(w_), grad_u = torch::stable::empty_like(u_);
  if (k_.numel() == 0) {
    torch::stable::zero_(grad_w);
    torch::stable::zero_(grad_u);
  } else {
    THO_DISPATCH_V2(k_.scalar_type(), "_bi_wkv_backward",
                    AT_WRAP([&] { backward<scalar_t>(g, w_, u_, k_, v_, grad_w, grad_u, grad_k, grad_v); }),
                    ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  }
  return {grad_w, grad_u, grad_k, grad_v};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) {
  m.impl("bi_wkv", TORCH_BOX(&vrwkv::bi_wkv));
  m.impl("_bi_wkv_backward", TORCH_BOX(&vrwkv::bi_wkv_backward));
}
