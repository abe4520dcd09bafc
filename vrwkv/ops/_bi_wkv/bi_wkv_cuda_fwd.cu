// Bi-WKV on CUDA, forward. The formula stands in __init__.py, the algorithm and its traffic in README.md.
#include "../common/cuda_utils.cuh"
#include "bi_wkv_checks.h"
#include "bi_wkv_sums.cuh"

namespace vrwkv {
namespace {

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kForwardBlocks)
    forward_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering, Global<scalar_t> y, Tiling tiling) {
  each_tile<scalar_t, true>(tiling, [&](const Tile& tile) {
    const Part<scalar_t, false> part(in, tiling, tile);
    const auto& [segment, memory, channel, fast, loaded] = part;
    FastSegment<scalar_t> tokens{};
    if (fast) {
      weigh(loaded, memory, segment, largest_entering(entering, tiling, tile, segment, channel.w), tokens);
      tokens.sum_tokens_around(memory.tokens, segment.index);
    } else {  // count: 0
      SafeSegment<scalar_t>(in, tiling, tile, segment).sum_tokens(memory.tokens);
    }
    __syncthreads();
    if (fast) {
      tokens.add_entering(memory, find_entering(in, memory.tokens, memory, entering, tiling, tile, segment, acc_t(1)));
      tokens.write_outputs(Tokens<scalar_t>(tiling, tile, segment, fast), y);
    } else {  // count: 0
      const SafeSegment<scalar_t> safe(in, tiling, tile, segment);
      safe.write_outputs(safe.around(memory.tokens, load_entering(entering, tiling, tile, segment)), y);
    }
    __syncthreads();  // before the next tile overwrites shared memory
  });
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& y) {
  using B = Block<scalar_t>;
  const Context context(k);
  const Tiling tiling = make_tiling<scalar_t>(k.size(0), k.size(1), k.size(2));
  const Inputs<scalar_t> in = make_inputs<scalar_t>(w, u, k, v);
  const Tensor entering = entering_sums(context, tiling, in, w);
  launch(context, forward_kernel<scalar_t>, tiling.tasks(), dim3(tiling.segments * B::kChannels),
         B::shared_bytes(tiling.segments, 1), in, global<const ScaledSum<acc_t>>(entering), global<scalar_t>(y),
         tiling);
}

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_bi_wkv("bi_wkv", w, u, k, v);
  const Tensor w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor y = torch::stable::empty_like(k_);
  if (k_.numel() == 0) return y;
  dispatch_floating(k_.scalar_type(), [&](auto zero) { forward<decltype(zero)>(w_, u_, k_, v_, y); });
  return y;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("bi_wkv", TORCH_BOX(&vrwkv::bi_wkv)); }
