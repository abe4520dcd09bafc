// Bi-WKV on CUDA, backward. The algorithm and its traffic stand in README.md: a_t = grad_t / D_t and b_t = a_t y_t,
// whose sums run over the tokens as those of keys and values do.
#include <tuple>

#include "../common/reduce_rows.cuh"
#include "bi_wkv_checks.h"
#include "bi_wkv_sums.cuh"

namespace vrwkv {
namespace {

// ---- One thread, one segment ----

// What is kept of a segment while its sums of a and b travel through the block.
template <typename Scan, typename scalar_t>
struct SegmentAb {
  typename Scan::Sum each[Block<scalar_t>::kLength];  // (a_t, b_t)
  typename Scan::Sum split;                           // e^-w per step over the prefixes P_t of the segment
  accumulate_t<scalar_t> grad_w;
};

// a and b, their sums, and the part of grad_w from pairs i < t with t in this segment.
template <typename Scan, typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void find_segment_ab(const Scan& scan, const Segment<scalar_t>& segment,
                                                const Around<acc_t>& tokens, SegmentAb<Scan, scalar_t>& ab,
                                                const BlockSums<scalar_t>& sums) {
  const int length = length_of<Scan>(segment);
  typename Scan::Sum suffix = scan.enter(tokens.after), prefix = scan.enter(tokens.before);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    ab.each[i] = suffix;  // until a and b take its place
    suffix = scan.advanced(suffix, scan.token(segment.key(i), segment.value(i)));
  }
  ab.split = scan.zero();
  ab.grad_w = 0;
  typename Scan::Sum to_end = scan.zero(), to_start = scan.zero();
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const acc_t key = segment.key(i), v = segment.value(i);
    typename Scan::Sum here = scan.ab(scan.total(prefix, ab.each[i], key, v), segment.gradient(i));
    if (Scan::kFast && i >= segment.tokens) here = scan.zero();
    ab.each[i] = here;
    ab.grad_w -= scan.product(ab.split, here);
    ab.split = scan.split(ab.split, prefix);
    prefix = scan.advanced(prefix, scan.token(key, v));
    to_end = scan.advanced(to_end, here);
  }
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) to_start = scan.advanced(to_start, ab.each[i]);
  sums.write(segment.index, scan.leave_ab(to_end), scan.leave_ab(to_start));
}

// Gradients of k and v in their place, and this segment's share of those of w and u, from the sums of tokens around the
// segment and those of a and b.
template <typename Scan, typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_gradients(const Scan& scan, const Segment<scalar_t>& segment,
                                                const Around<acc_t>& tokens, const Around<acc_t>& around_ab,
                                                const SegmentAb<Scan, scalar_t>& ab, acc_t& grad_w, acc_t& grad_u) {
  using B = Block<scalar_t>;
  using Sum = typename Scan::Sum;
  const int length = length_of<Scan>(segment);
  Sum suffixes[B::kLength], to_start = scan.enter_ab(around_ab.after), to_end = scan.enter_ab(around_ab.before);
  Sum suffix = scan.enter(tokens.after), split = scan.zero();
  // Pairs i < t with t beyond this segment.
  grad_w = ab.grad_w - scan.product(ab.split, to_start);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    grad_w -= scan.product(split, ab.each[i]);  // pairs i > t
    split = scan.split(split, suffix);
    suffix = scan.advanced(suffix, scan.token(segment.key(i), segment.value(i)));
    suffixes[i] = to_start;
    to_start = scan.advanced(to_start, ab.each[i]);
  }
  grad_w -= scan.product(split, to_end);
  grad_u = 0;
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const acc_t key = segment.key(i), v = segment.value(i);
    const Sum own = scan.own(ab.each[i]);
    const Sum all = scan.added(scan.added(to_end, suffixes[i]), own);
    const acc_t scale = scan.scale(key, all);
    grad_u += (v * own.num - own.den) * scan.scale(key, own);
    to_end = scan.advanced(to_end, ab.each[i]);
    segment.k[i * B::kChannels] = static_cast<scalar_t>((v * all.num - all.den) * scale);
    segment.v[i * B::kChannels] = static_cast<scalar_t>(all.num * scale);
  }
}

// ---- Kernels ----

// One thread's part of a task of either kernel, up to the sums of tokens that enter its segment.
template <typename scalar_t>
struct Task {
  using acc_t = accumulate_t<scalar_t>;
  Tile<scalar_t> tile;
  Segment<scalar_t> segment;
  BlockSums<scalar_t> sums;
  Channel<acc_t> channel;
  Around<acc_t> tokens;
  FastScan<acc_t> fast_scan;
  SafeScan<acc_t> safe_scan;
  bool fast;

  __device__ __forceinline__ Task(const Inputs<scalar_t>& in, Global<const ScaledSum<acc_t>> entering,
                                  const Tiling& tiling, int64_t task)
      : tile(tiling, task),
        segment(tiling, tile),
        sums(tiling, 3, segment),
        channel(load_channel(in, tile, segment.channel)),
        fast_scan(channel, 0),
        safe_scan(channel) {
    load_tokens(in, tiling, tile);
    load_tile<scalar_t>(in.grad, shared_at<scalar_t>(2 * Block<scalar_t>::tensor_bytes(tiling.segments)), tiling, tile,
                        0);
    __syncthreads();
    const KeyRange<acc_t> range = key_range(segment);
    sum_segments(segment, channel, range, sums);
    __syncthreads();
    tokens = around(segment, sums, entering, tiling, tile, channel.w);
    __syncthreads();  // before the sums of a and b take the place of those of tokens
    fast_scan.reference = reference_of(range.largest, tokens.before, tokens.after, channel.w);
    fast = is_fast(segment, fast_scan.reference, range.smallest, channel);
  }

  // Leaves the sums of a and b of the block's segments in `sums`. What is kept of them are variables of the kernel: as
  // members they would take the whole task to local memory, where safe_ab has to lie.
  __device__ __forceinline__ void find_ab(SegmentAb<FastScan<acc_t>, scalar_t>& fast_ab,
                                          SegmentAb<SafeScan<acc_t>, scalar_t>& safe_ab) const {
    if (fast) {
      find_segment_ab(fast_scan, segment, tokens, fast_ab, sums);
    } else {
      find_segment_ab(safe_scan, segment, tokens, safe_ab, sums);
    }
    __syncthreads();
  }
};

// The sums of a and b that leave each tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kBackwardBlocks)
    sum_ab_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering, Global<ScaledSum<acc_t>> leaving,
                  Tiling tiling) {
  for (int64_t i = blockIdx.x; i < tiling.tasks(); i += gridDim.x) {
    const Task<scalar_t> task(in, entering, tiling, i);
    SegmentAb<FastScan<acc_t>, scalar_t> fast_ab;
    SegmentAb<SafeScan<acc_t>, scalar_t> safe_ab;
    task.find_ab(fast_ab, safe_ab);
    store_tile_sums(task.sums, task.segment, leaving, tiling, task.tile, task.channel.w);
    __syncthreads();  // before the next task overwrites shared memory
  }
}

// Gradients of k and v and, for each image and tile, of w and u: partials (2, B * tiles, C).
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kBackwardBlocks)
    backward_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering,
                    Global<const ScaledSum<acc_t>> entering_ab, Global<scalar_t> grad_k, Global<scalar_t> grad_v,
                    Global<acc_t> partials, Tiling tiling) {
  using B = Block<scalar_t>;
  for (int64_t i = blockIdx.x; i < tiling.tasks(); i += gridDim.x) {
    const Task<scalar_t> task(in, entering, tiling, i);
    const Tile<scalar_t>& tile = task.tile;
    const Segment<scalar_t>& segment = task.segment;
    const BlockSums<scalar_t>& sums = task.sums;
    SegmentAb<FastScan<acc_t>, scalar_t> fast_ab;
    SegmentAb<SafeScan<acc_t>, scalar_t> safe_ab;
    task.find_ab(fast_ab, safe_ab);
    const Around<acc_t> around_ab = around(segment, sums, entering_ab, tiling, tile, task.channel.w);
    acc_t grad_w, grad_u;
    if (task.fast) {
      write_gradients(task.fast_scan, segment, task.tokens, around_ab, fast_ab, grad_w, grad_u);
    } else {
      write_gradients(task.safe_scan, segment, task.tokens, around_ab, safe_ab, grad_w, grad_u);
    }
    __syncthreads();
    sums.write(segment.index, {grad_w, grad_u, 0, 0}, nothing<acc_t>());
    store_tile<scalar_t>(shared_at<const scalar_t>(0), grad_k, tiling, tile);
    store_tile<scalar_t>(shared_at<const scalar_t>(B::tensor_bytes(tiling.segments)), grad_v, tiling, tile);
    __syncthreads();
    if (segment.index == 0 && segment.channel < tile.channels) {
      acc_t total_w = 0, total_u = 0;
      for (int other = 0; other < tiling.segments; ++other) {
        const ScaledSum<acc_t> part = sums.prefix[other * B::kChannels + segment.channel];
        total_w += part.num;
        total_u += part.den;
      }
      partials[sums_index(tiling, tile, segment.channel, 0)] = total_w;
      partials[sums_index(tiling, tile, segment.channel, 1)] = total_u;
    }
    __syncthreads();  // before the next task overwrites shared memory
  }
}

// ---- Host functions ----

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void backward(const Tensor& grad, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
              const Tensor& grad_w, const Tensor& grad_u, const Tensor& grad_k, const Tensor& grad_v) {
  const Context context(k);
  const int64_t channels = k.size(2);
  const Tiling tiling = make_tiling<scalar_t>(k.size(0), k.size(1), channels, 3, has_vector_rows(k, channels));
  const dim3 threads(tiling.segments * Block<scalar_t>::kChannels);
  const int shared_bytes = Block<scalar_t>::shared_bytes(tiling.segments, 3);
  Inputs<scalar_t> in = make_inputs<scalar_t>(w, u, k, v);
  in.grad = global<const scalar_t>(grad);

  const Tensor entering = entering_sums(context, tiling, in, w);
  Tensor entering_ab = entering;  // not read either, with one tile
  if (tiling.tiles > 1) {
    entering_ab = empty_sums(tiling, w);
    launch(context, sum_ab_kernel<scalar_t>, tiling.tasks(), threads, shared_bytes, in,
           global<const ScaledSum<acc_t>>(entering), global<ScaledSum<acc_t>>(entering_ab), tiling);
    merge_tiles<scalar_t>(context, tiling, w, entering_ab);
  }
  const Tensor partials = torch::stable::new_empty(w, {2, tiling.batch * tiling.tiles, channels});
  launch(context, backward_kernel<scalar_t>, tiling.tasks(), threads, shared_bytes, in,
         global<const ScaledSum<acc_t>>(entering), global<const ScaledSum<acc_t>>(entering_ab),
         global<scalar_t>(grad_k), global<scalar_t>(grad_v), global<acc_t>(partials), tiling);
  reduce_rows<acc_t>(context, partials, {grad_w, grad_u}, tiling.batch * tiling.tiles, channels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bi_wkv_backward(const Tensor& grad, const Tensor& w, const Tensor& u,
                                                           const Tensor& k, const Tensor& v) {
  check_bi_wkv_backward(grad, w, u, k, v);
  const Tensor grad_ = aligned(grad), w_ = contiguous(w), u_ = contiguous(u), k_ = aligned(k), v_ = aligned(v);
  Tensor grad_k = torch::stable::empty_like(k_), grad_v = torch::stable::empty_like(k_);
  Tensor grad_w = torch::stable::empty_like(w_), grad_u = torch::stable::empty_like(u_);
  if (k_.numel() == 0) {
    torch::stable::zero_(grad_w);
    torch::stable::zero_(grad_u);
    return {grad_w, grad_u, grad_k, grad_v};
  }
  dispatch_floating(k_.scalar_type(), [&](auto zero) {
    backward<decltype(zero)>(grad_, w_, u_, k_, v_, grad_w, grad_u, grad_k, grad_v);
  });
  return {grad_w, grad_u, grad_k, grad_v};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("_bi_wkv_backward", TORCH_BOX(&vrwkv::bi_wkv_backward)); }
