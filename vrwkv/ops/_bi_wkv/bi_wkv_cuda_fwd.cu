// Bi-WKV on CUDA, forward. The formula stands in __init__.py, the algorithm and its traffic in README.md.
#include "../common/cuda_utils.cuh"
#include "bi_wkv_checks.h"
#include "bi_wkv_sums.cuh"

namespace vrwkv {
namespace {

// y, in place of the keys, from the sums of `tokens` around the segment.
template <typename Scan, typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_outputs(const Scan& scan, const Segment<scalar_t>& segment,
                                              const Around<acc_t>& tokens) {
  using B = Block<scalar_t>;
  const int length = length_of<Scan>(segment);
  typename Scan::Sum suffixes[B::kLength], suffix = scan.enter(tokens.after), prefix = scan.enter(tokens.before);
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = length - 1; i >= 0; --i) {
    suffixes[i] = suffix;
    suffix = scan.advanced(suffix, scan.token(segment.key(i), segment.value(i)));
  }
  forget_loads();
#pragma unroll(kUnroll<Scan, scalar_t>)
  for (int i = 0; i < length; ++i) {
    const acc_t key = segment.key(i), v = segment.value(i);
    const typename Scan::Sum total = scan.total(prefix, suffixes[i], key, v);
    prefix = scan.advanced(prefix, scan.token(key, v));
    segment.k[i * B::kChannels] = static_cast<scalar_t>(total.num * reciprocal(total.den));
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    forward_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering, Global<scalar_t> y, Tiling tiling) {
  for (int64_t task = blockIdx.x; task < tiling.tasks(); task += gridDim.x) {
    const Tile<scalar_t> tile(tiling, task);
    const Segment<scalar_t> segment(tiling, tile);
    const BlockSums<scalar_t> sums(tiling, 2, segment);
    load_tokens(in, tiling, tile);
    const Channel<acc_t> channel = load_channel(in, tile, segment.channel);
    __syncthreads();
    const KeyRange<acc_t> range = key_range(segment);
    sum_segments(segment, channel, range, sums);
    __syncthreads();
    const Around<acc_t> tokens = around(segment, sums, entering, tiling, tile, channel.w);
    const acc_t reference = reference_of(range.largest, tokens.before, tokens.after, channel.w);
    if (is_fast(segment, reference, range.smallest, channel)) {
      write_outputs(FastScan<acc_t>(channel, reference), segment, tokens);
    } else {
      write_outputs(SafeScan<acc_t>(channel), segment, tokens);
    }
    __syncthreads();
    store_tile<scalar_t>(shared_at<const scalar_t>(0), y, tiling, tile);
    __syncthreads();  // before the next task overwrites shared memory
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& y) {
  using B = Block<scalar_t>;
  const Context context(k);
  const int64_t channels = k.size(2);
  const Tiling tiling = make_tiling<scalar_t>(k.size(0), k.size(1), channels, 2, has_vector_rows(k, channels));
  const Inputs<scalar_t> in = make_inputs<scalar_t>(w, u, k, v);
  const Tensor entering = entering_sums(context, tiling, in, w);
  launch(context, forward_kernel<scalar_t>, tiling.tasks(), dim3(tiling.segments * B::kChannels),
         B::shared_bytes(tiling.segments, 2), in, global<const ScaledSum<acc_t>>(entering), global<scalar_t>(y),
         tiling);
}

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_bi_wkv("bi_wkv", w, u, k, v);
  const Tensor w_ = contiguous(w), u_ = contiguous(u), k_ = aligned(k), v_ = aligned(v);
  Tensor y = torch::stable::empty_like(k_);
  if (k_.numel() == 0) return y;
  dispatch_floating(k_.scalar_type(), [&](auto zero) { forward<decltype(zero)>(w_, u_, k_, v_, y); });
  return y;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("bi_wkv", TORCH_BOX(&vrwkv::bi_wkv)); }
