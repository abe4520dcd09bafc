// Bi-WKV on CUDA, backward. The algorithm and its traffic stand in README.md: a_t = grad_t / D_t and b_t = a_t y_t,
// whose sums run over the tokens as those of keys and values do.
#include <tuple>

#include "../common/reduce_rows.cuh"
#include "bi_wkv_checks.h"
#include "bi_wkv_fast_bwd.cuh"
#include "bi_wkv_safe_bwd.cuh"
#include "bi_wkv_sums.cuh"

namespace vrwkv {
namespace {

// ---- Kernels ----

// One thread's part of a tile of either kernel, up to the sums of a and b that leave its segment.
template <typename scalar_t>
struct Task : Part<scalar_t, true> {
  using acc_t = accumulate_t<scalar_t>;
  using Base = Part<scalar_t, true>;
  using Base::channel, Base::fast, Base::loaded, Base::memory, Base::segment;
  const Inputs<scalar_t>& in;
  const Tiling& tiling;
  const Tile& tile;
  FastSegment<scalar_t> tokens{};
  FastGradients<scalar_t> gradients{};

  // `safe_gradients` is a variable of the kernel: as a member it would take the whole task to local memory.
  __device__ __forceinline__ Task(const Inputs<scalar_t>& in, Global<const ScaledSum<acc_t>> entering,
                                  const Tiling& tiling, const Tile& tile, SafeGradients<scalar_t>& safe_gradients)
      : Base(in, tiling, tile), in(in), tiling(tiling), tile(tile) {
    if (fast) {
      weigh(loaded, memory, segment, largest_entering(entering, tiling, tile, segment, channel.w), tokens);
      tokens.sum_tokens(memory.tokens, segment.index);
    } else {  // count: 0
      SafeSegment<scalar_t>(in, tiling, tile, segment).sum_tokens(memory.tokens);
    }
    __syncthreads();
    if (fast) {
      gradients.find_ab(tokens, loaded, memory, into_segment(memory.tokens, entering, acc_t(1)), segment.index);
    } else {  // count: 0
      const SafeSegment<scalar_t> safe(in, tiling, tile, segment);
      safe_gradients.find_ab(safe, safe.around(memory.tokens, load_entering(entering, tiling, tile, segment)),
                             memory.ab);
    }
    __syncthreads();
  }

  __device__ __forceinline__ Tokens<scalar_t> places() const { return {tiling, tile, segment, fast}; }
  __device__ __forceinline__ Around<Sum<acc_t>> into_segment(const BlockSums<scalar_t>& sums,
                                                             Global<const ScaledSum<acc_t>> entering,
                                                             acc_t sign) const {
    return find_entering(in, sums, memory, entering, tiling, tile, segment, sign);
  }
};

// The sums of a and b that leave each tile, where there are several.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kBackwardBlocks)
    sum_ab_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering, Global<ScaledSum<acc_t>> leaving,
                  Tiling tiling) {
  each_tile<scalar_t, true>(tiling, [&](const Tile& tile) {
    SafeGradients<scalar_t> safe_gradients;
    const Task<scalar_t> task(in, entering, tiling, tile, safe_gradients);
    store_tile_sums(task.memory, task.memory.ab, task.segment, leaving, tiling, tile, task.fast, acc_t(-1),
                    task.channel.w);
    __syncthreads();  // before the next tile overwrites shared memory
  });
}

// Gradients of k and v and, for each image and tile, of w and u: partials (2, B * tiles, C).
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(Block<scalar_t>::kMaxThreads, Block<scalar_t>::kBackwardBlocks)
    backward_kernel(Inputs<scalar_t> in, Global<const ScaledSum<acc_t>> entering,
                    Global<const ScaledSum<acc_t>> entering_ab, Global<scalar_t> grad_k, Global<scalar_t> grad_v,
                    Global<acc_t> partials, Tiling tiling) {
  each_tile<scalar_t, false>(tiling, [&](const Tile& tile) {
    SafeGradients<scalar_t> safe_gradients;
    const Task<scalar_t> task(in, entering, tiling, tile, safe_gradients);
    const Segment<scalar_t>& segment = task.segment;
    const Memory<scalar_t>& memory = task.memory;
    Sum<acc_t> shares;
    if (task.fast) {
      const Around<Sum<acc_t>> ab = task.into_segment(memory.ab, entering_ab, acc_t(-1));
      task.gradients.write_gradients(task.tokens, ab, task.places(), grad_k, grad_v);
      shares = task.gradients.shares(task.tokens, ab);
    } else {  // count: 0
      const SafeSegment<scalar_t> safe(in, tiling, tile, segment);
      shares = safe_gradients.write_gradients(
          safe, safe.around(memory.tokens, load_entering(entering, tiling, tile, segment)),
          safe.around(memory.ab, load_entering(entering_ab, tiling, tile, segment)), grad_k, grad_v);
    }
    __syncthreads();
    memory.tokens.write(segment.index, shares, shares);
    __syncthreads();
    if (segment.index == 0 && segment.exists(tile)) {  // count: 2 / segments
      Sum<acc_t> total{0, 0};
#pragma unroll 4
      for (int other = 0; other < tiling.segments; ++other) {  // count: segments, unrolled 4
        total = total.plus(memory.tokens.read(other, 0));
      }
      const SumsPlace place(tiling, tile, segment.channel);
      partials[place.to_end] = total.num;
      partials[place.to_start()] = total.den;
    }
    __syncthreads();  // before the next tile overwrites shared memory
  });
}

// ---- Host functions ----

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void backward(const Tensor& grad, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
              const Tensor& grad_w, const Tensor& grad_u, const Tensor& grad_k, const Tensor& grad_v) {
  const Context context(k);
  const int64_t channels = k.size(2);
  const Tiling tiling = make_tiling<scalar_t>(k.size(0), k.size(1), channels);
  const dim3 threads(tiling.segments * Block<scalar_t>::kChannels);
  const int shared_bytes = Block<scalar_t>::shared_bytes(tiling.segments, 2);
  Inputs<scalar_t> in = make_inputs<scalar_t>(w, u, k, v);
  in.grad = global<const scalar_t>(grad);

  const Tensor entering = entering_sums(context, tiling, in, w);
  Tensor entering_ab = entering;  // not read either, with one tile
  if (tiling.tiles > 1) {
    entering_ab = empty_sums(tiling, w);
    launch(context, sum_ab_kernel<scalar_t>, tiling.tasks(), threads, shared_bytes, in,
           global<const ScaledSum<acc_t>>(entering), global<ScaledSum<acc_t>>(entering_ab), tiling);
    scan_tiles<scalar_t>(context, tiling, w, entering_ab);
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
  const Tensor grad_ = contiguous(grad), w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
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
