// Q-Shift on CUDA, alone and fused with its mixes. The definition stands in __init__.py, the traffic in README.md.
#include "q_shift_cuda.cuh"

namespace vrwkv {
namespace {

template <typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(Global<const scalar_t> x, Global<scalar_t> y, Grid grid, Plan plan) {
  using L = Lane<scalar_t, V>;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    if (!part.active) continue;
    L lane(grid, part.channel);
    Place place = place_of(grid, part.begin);
#pragma unroll 1
    for (; place.token < part.end; advance(place, grid, plan)) {  // count: tokens
      // Or the moves of a vector that a bound cuts would hold registers across the loop.
      lane.groups = computed_here(lane.groups);
      const typename L::Values values = lane.shifted(x, grid, place, 1);
      vector_at<typename L::Values>(y + (place.token * grid.channels + part.channel)) = values;
    }
  }
}

template <typename scalar_t, int V, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    mix_kernel(Global<const scalar_t> x, Mixes<scalar_t> mixes, Grid grid, Plan plan) {
  using L = Lane<scalar_t, V>;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    if (!part.active) continue;
    const L lane(grid, part.channel);
    acc_t mix[kMaxMixes][V];
    load_mixes<acc_t>(mixes.mix, mixes.count, part.channel, mix);
    Place place = place_of(grid, part.begin);
#pragma unroll 1
    for (; place.token < part.end; advance(place, grid, plan)) {  // count: tokens
      const typename L::Values own = lane.own(x, grid, place), other = lane.shifted(x, grid, place, 1);
#pragma unroll
      for (int m = 0; m < kMaxMixes; ++m) {  // count: mixes, unrolled 4
        if (m >= mixes.count) break;
        typename L::Values mixed;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const acc_t from = static_cast<acc_t>(other.values[i]);
          mixed.values[i] = static_cast<scalar_t>(fma(static_cast<acc_t>(own.values[i]) - from, mix[m][i], from));
        }
        vector_at<typename L::Values>(mixes.out[m] + (place.token * grid.channels + part.channel)) = mixed;
      }
    }
  }
}

template <typename scalar_t>
void shift(const Grid& grid, const Tensor& x, const Tensor& y) {
  const Context context(x);
  with_width<scalar_t, kVector<scalar_t>>(x, grid.channels, [&](auto width) {
    const Plan plan = make_plan(grid, width());
    launch(context, shift_kernel<scalar_t, width()>, plan.tasks(), dim3(plan.lanes, plan.rows), 0,
           global<const scalar_t>(x), global<scalar_t>(y), grid, plan);
  });
}

template <typename scalar_t>
void mix(const Grid& grid, const Tensor& x, const std::vector<Tensor>& mixes, const std::vector<Tensor>& outs) {
  const Context context(x);
  with_width<scalar_t, kVector<scalar_t>>(x, grid.channels, [&](auto width) {
    const Plan plan = make_plan(grid, width());
    for (size_t first = 0; first < mixes.size(); first += kMaxMixes) {
      Mixes<scalar_t> part{};
      part.count = static_cast<int>(std::min<size_t>(mixes.size() - first, kMaxMixes));
      for (int m = 0; m < part.count; ++m) {
        part.mix[m] = global<const accumulate_t<scalar_t>>(mixes[first + m]);
        part.out[m] = global<scalar_t>(outs[first + m]);
      }
      launch(context, mix_kernel<scalar_t, width()>, plan.tasks(), dim3(plan.lanes, plan.rows), 0,
             global<const scalar_t>(x), part, grid, plan);
    }
  });
}

Tensor q_shift(const Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,
               int64_t heads) {
  check_q_shift("q_shift", x, height, width, channel_gamma, heads);
  const Tensor x_ = aligned(x);
  Tensor y = torch::stable::empty_like(x_);
  if (x_.numel() == 0) return y;
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma, heads);
  dispatch_floating(x_.scalar_type(), [&](auto zero) { shift<decltype(zero)>(grid, x_, y); });
  return y;
}

std::vector<Tensor> q_shift_mix(const Tensor& x, const std::vector<Tensor>& mixes, int64_t height, int64_t width,
                                int64_t shift_pixel, double channel_gamma, int64_t heads) {
  check_q_shift_mix("q_shift_mix", x, mixes, height, width, channel_gamma, heads);
  const Tensor x_ = aligned(x);
  const std::vector<Tensor> mixes_ = contiguous_all(mixes);
  const std::vector<Tensor> outs = empty_like_all(std::vector<Tensor>(mixes.size(), x_));
  if (x_.numel() == 0) return outs;
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma, heads);
  dispatch_floating(x_.scalar_type(), [&](auto zero) { mix<decltype(zero)>(grid, x_, mixes_, outs); });
  return outs;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) {
  m.impl("q_shift", TORCH_BOX(&vrwkv::q_shift));
  m.impl("q_shift_mix", TORCH_BOX(&vrwkv::q_shift_mix));
}
