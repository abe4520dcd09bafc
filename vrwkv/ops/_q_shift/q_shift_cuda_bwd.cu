// The gradient of Q-Shift fused with its mixes, on CUDA; that of Q-Shift alone is the shift the other way. The traffic
// stands in README.md.
#include <tuple>

#include "q_shift_cuda.cuh"

namespace vrwkv {
namespace {

// grad_x, which collects from the token and from the one that reads it, and for each run of tokens the gradients of the
// mixes: partials (mixes, runs, C). With `add`, grad_x is added to: a further launch for further mixes.
template <typename scalar_t, int V, int N, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    mix_backward_kernel(Global<const scalar_t> x, Mixes<scalar_t> mixes, Global<scalar_t> grad_x,
                        Global<acc_t> partials, Grid grid, Plan plan, bool add) {
  using L = Lane<scalar_t, V>;
  const Shared<acc_t> sums = shared_at<acc_t>(0);  // (rows, lanes, V)
  const int own_sum = (threadIdx.y * plan.lanes + threadIdx.x) * V;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    acc_t mix[N][V], grad_mix[N][V];
#pragma unroll
    for (int m = 0; m < N; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) grad_mix[m][i] = 0;
    }
    if (part.active) {
      L lane(grid, part.channel);
      load_mixes<acc_t>(mixes.mix, N, part.channel, mix);
      Place place = place_of(grid, part.begin);
#pragma unroll 1
      for (; place.token < part.end; advance(place, grid, plan)) {  // count: tokens
        // Or the moves of a vector that a bound cuts would hold registers across the loop.
        lane.groups = computed_here(lane.groups);
        const int64_t at = place.token * grid.channels + part.channel;
        // All loads before their use: they go to memory together.
        const typename L::Values own = lane.own(x, grid, place), other = lane.shifted(x, grid, place, 1);
        typename L::Values grads[N], readers[N], before{};
#pragma unroll
        for (int m = 0; m < N; ++m) {
          grads[m] = lane.own(mixes.grad[m], grid, place);
          readers[m] = lane.shifted(mixes.grad[m], grid, place, -1);
        }
        if (add) before = vector_at<typename L::Values>(grad_x + at);
        acc_t sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = static_cast<acc_t>(before.values[i]);
#pragma unroll
        for (int m = 0; m < N; ++m) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const acc_t g = static_cast<acc_t>(grads[m].values[i]), r = static_cast<acc_t>(readers[m].values[i]);
            sum[i] += fma(g - r, mix[m][i], r);
            grad_mix[m][i] =
                fma(g, static_cast<acc_t>(own.values[i]) - static_cast<acc_t>(other.values[i]), grad_mix[m][i]);
          }
        }
        typename L::Values result;
#pragma unroll
        for (int i = 0; i < V; ++i) result.values[i] = static_cast<scalar_t>(sum[i]);
        vector_at<typename L::Values>(grad_x + at) = result;
      }
    }
#pragma unroll
    for (int m = 0; m < N; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[own_sum + i] = grad_mix[m][i];
      __syncthreads();
      if (threadIdx.y == 0 && part.active) {  // count: 32 / threads
#pragma unroll
        for (int i = 0; i < V; ++i) {
          acc_t total = 0;
#pragma unroll 4
          for (int row = 0; row < plan.rows; ++row) {  // count: rows, unrolled 4
            total += sums[(row * plan.lanes + threadIdx.x) * V + i];
          }
          partials[(m * plan.runs + part.run) * grid.channels + part.channel + i] = total;
        }
      }
      __syncthreads();  // before the sums of the next mix
    }
  }
}

// Calls function(std::integral_constant<int, N>) with the number of mixes of a launch.
template <typename Function>
void with_count(size_t mixes, const Function& function) {
  if (mixes == 1) return function(std::integral_constant<int, 1>());
  if (mixes == 2) return function(std::integral_constant<int, 2>());
  if (mixes == 3) return function(std::integral_constant<int, 3>());
  function(std::integral_constant<int, kMaxMixes>());
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void mix_backward(const Grid& grid, const std::vector<Tensor>& grads, const Tensor& x, const std::vector<Tensor>& mixes,
                  const Tensor& grad_x, const std::vector<Tensor>& grad_mixes) {
  const Context context(x);
  // 64 bits at a time in half precision: 128 would take registers from too many threads.
  with_width<scalar_t, std::min(kVector<scalar_t>, 4)>(x, grid.channels, [&](auto width) {
    const Plan plan = make_plan(grid, width());
    const Tensor partials = torch::stable::new_empty(mixes[0], {kMaxMixes, plan.runs, grid.channels});
    for (size_t first = 0; first < mixes.size(); first += kMaxMixes) {
      with_count(mixes.size() - first, [&](auto count) {
        Mixes<scalar_t> part{};
        for (int m = 0; m < count(); ++m) {
          part.mix[m] = global<const acc_t>(mixes[first + m]);
          part.grad[m] = global<const scalar_t>(grads[first + m]);
        }
        launch(context, mix_backward_kernel<scalar_t, width(), count()>, plan.tasks(), dim3(plan.lanes, plan.rows),
               plan.lanes * plan.rows * width() * sizeof(acc_t), global<const scalar_t>(x), part,
               global<scalar_t>(grad_x), global<acc_t>(partials), grid, plan, first > 0);
        const auto out = grad_mixes.begin() + first;
        reduce_rows<acc_t>(context, partials, std::vector<Tensor>(out, out + count()), plan.runs, grid.channels);
      });
    }
  });
}

std::tuple<Tensor, std::vector<Tensor>> q_shift_mix_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                             const std::vector<Tensor>& mixes, int64_t height,
                                                             int64_t width, int64_t shift_pixel, double channel_gamma,
                                                             int64_t heads) {
  check_q_shift_mix_backward(grads, x, mixes, height, width, channel_gamma, heads);
  const Tensor x_ = aligned(x);
  const std::vector<Tensor> grads_ = aligned_all(grads), mixes_ = contiguous_all(mixes);
  Tensor grad_x = torch::stable::empty_like(x_);
  std::vector<Tensor> grad_mixes = empty_like_all(mixes_);
  if (x_.numel() == 0 || mixes.empty()) {
    torch::stable::zero_(grad_x);
    for (Tensor& grad : grad_mixes) torch::stable::zero_(grad);
    return {grad_x, grad_mixes};
  }
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma, heads);
  dispatch_floating(x_.scalar_type(),
                    [&](auto zero) { mix_backward<decltype(zero)>(grid, grads_, x_, mixes_, grad_x, grad_mixes); });
  return {grad_x, grad_mixes};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("_q_shift_mix_backward", TORCH_BOX(&vrwkv::q_shift_mix_backward)); }
