// Q-Shift on CUDA, alone and fused with its mixes. The definition stands in __init__.py, the traffic in README.md.
#include <tuple>
#include <vector>

#include "../common/reduce_rows.cuh"
#include "q_shift_checks.h"

namespace vrwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxMixes = kMaxSums;  // of one launch
constexpr int kStay = 4;             // the group of channels that are not moved

// ---- Device code ----

// The grid of tokens and where each group of channels comes from.
struct Grid {
  int64_t pixels, height, width, channels;  // pixels = B * H * W
  int64_t bounds[kStay];                    // first channel past each moved group
  int64_t down[kStay], right[kStay];        // from a token to the one that it takes its value from
};

// How pixels and channels fall to threads: `lanes` threads share a pixel, each with one vector of channels; the block
// steps through its run of pixels `rows` at a time.
struct Plan {
  int lanes, rows;
  int64_t groups, runs, run;        // groups of lanes * V channels, runs of `run` pixels
  int64_t step_rows, step_columns;  // what `rows` pixels are on the grid

  __host__ __device__ int64_t tasks() const { return groups * runs; }
};

struct Place {
  int64_t pixel, row, column;
};

__device__ __forceinline__ Place place_of(const Grid& grid, int64_t pixel) {
  return {pixel, pixel / grid.width % grid.height, pixel % grid.width};
}

// `rows` pixels on, without a division.
__device__ __forceinline__ void advance(Place& place, const Grid& grid, const Plan& plan) {
  place.pixel += plan.rows;
  place.row += plan.step_rows;
  place.column += plan.step_columns;
  if (place.column >= grid.width) {
    place.column -= grid.width;
    place.row += 1;
  }
  if (place.row >= grid.height) place.row -= grid.height;
}

__device__ __forceinline__ int group_of(const Grid& grid, int64_t channel) {
  int group = 0;
#pragma unroll
  for (int i = 0; i < kStay; ++i) group += channel >= grid.bounds[i];
  return group;
}

// The move of one group, no move for channels that stay.
struct Move {
  int64_t down, right;
};

__device__ __forceinline__ Move move_of(const Grid& grid, int group) {
  Move move{0, 0};
#pragma unroll
  for (int i = 0; i < kStay; ++i) {
    if (i == group) move = {grid.down[i], grid.right[i]};
  }
  return move;
}

// The pixel that lies `move` away, -1 outside the grid. `direction` -1 asks for the pixel that reads this one.
__device__ __forceinline__ int64_t moved(const Grid& grid, const Place& place, const Move& move, int direction) {
  const int64_t row = place.row + direction * move.down, column = place.column + direction * move.right;
  const bool inside = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
  return inside ? place.pixel + direction * (move.down * grid.width + move.right) : -1;
}

// One thread's vector of V channels.
template <typename scalar_t, int V>
struct Lane {
  using Values = Vector<scalar_t, V>;
  int64_t channel;
  bool uniform;  // all of one group
  Move move;     // if so

  __device__ __forceinline__ Lane(const Grid& grid, int64_t first) : channel(first) {
    const int group = group_of(grid, first);
    uniform = V == 1 || group == group_of(grid, first + V - 1);
    move = move_of(grid, group);
  }

  __device__ __forceinline__ Values own(Global<const scalar_t> x, const Grid& grid, const Place& place) const {
    return vector_at<Values>(x + (place.pixel * grid.channels + channel));
  }

  // The values that are shifted here (direction 1), or shifted from here (direction -1).
  __device__ __forceinline__ Values shifted(Global<const scalar_t> x, const Grid& grid, const Place& place,
                                            int direction) const {
    Values values;
    if (uniform) {
      const int64_t source = moved(grid, place, move, direction);
      if (source >= 0) return vector_at<Values>(x + (source * grid.channels + channel));
#pragma unroll
      for (int i = 0; i < V; ++i) values.values[i] = 0;
      return values;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t source = moved(grid, place, move_of(grid, group_of(grid, channel + i)), direction);
      values.values[i] = 0;
      if (source >= 0) values.values[i] = x[source * grid.channels + channel + i];
    }
    return values;
  }
};

// This thread's part of a task: a lane and every `rows`-th pixel of a run.
struct Part {
  int64_t channel, begin, end, run;
  bool active;  // whether the lane has channels

  __device__ __forceinline__ Part(const Grid& grid, const Plan& plan, int64_t task, int width) {
    channel = (task % plan.groups * plan.lanes + threadIdx.x) * width;
    run = task / plan.groups;
    begin = run * plan.run + threadIdx.y;
    end = (run + 1) * plan.run < grid.pixels ? (run + 1) * plan.run : grid.pixels;
    active = channel < grid.channels;
  }
};

// The mixes of one launch and the tensors that go with them.
template <typename scalar_t>
struct Mixes {
  using T = accumulate_t<scalar_t>;
  int count;
  Global<const T> mix[kMaxMixes];
  Global<scalar_t> out[kMaxMixes];         // forward
  Global<const scalar_t> grad[kMaxMixes];  // backward
};

template <typename T, int V>
__device__ __forceinline__ void load_mixes(const Global<const T>* mix, int count, int64_t channel,
                                           T (&values)[kMaxMixes][V]) {
#pragma unroll
  for (int m = 0; m < kMaxMixes; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) values[m][i] = m < count ? mix[m][channel + i] : T(0);
  }
}

// ---- Kernels ----

template <typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(Global<const scalar_t> x, Global<scalar_t> y, Grid grid, Plan plan) {
  using L = Lane<scalar_t, V>;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    if (!part.active) continue;
    const L lane(grid, part.channel);
    Place place = place_of(grid, part.begin);
    for (; place.pixel < part.end; advance(place, grid, plan)) {
      const typename L::Values values = lane.shifted(x, grid, place, 1);
      vector_at<typename L::Values>(y + (place.pixel * grid.channels + part.channel)) = values;
    }
  }
}

template <typename scalar_t, int V, typename T = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    mix_kernel(Global<const scalar_t> x, Mixes<scalar_t> mixes, Grid grid, Plan plan) {
  using L = Lane<scalar_t, V>;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    if (!part.active) continue;
    const L lane(grid, part.channel);
    T mix[kMaxMixes][V];
    load_mixes<T, V>(mixes.mix, mixes.count, part.channel, mix);
    Place place = place_of(grid, part.begin);
    for (; place.pixel < part.end; advance(place, grid, plan)) {
      const typename L::Values own = lane.own(x, grid, place), other = lane.shifted(x, grid, place, 1);
#pragma unroll
      for (int m = 0; m < kMaxMixes; ++m) {
        if (m >= mixes.count) break;
        typename L::Values mixed;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const T from = static_cast<T>(other.values[i]);
          mixed.values[i] = static_cast<scalar_t>(fma(static_cast<T>(own.values[i]) - from, mix[m][i], from));
        }
        vector_at<typename L::Values>(mixes.out[m] + (place.pixel * grid.channels + part.channel)) = mixed;
      }
    }
  }
}

// grad_x, which collects from the pixel and from the one that reads it, and for each run of pixels the gradients of the
// mixes: partials (mixes, runs, C). With `add`, grad_x is added to: a further launch for further mixes.
template <typename scalar_t, int V, typename T = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    mix_backward_kernel(Global<const scalar_t> x, Mixes<scalar_t> mixes, Global<scalar_t> grad_x, Global<T> partials,
                        Grid grid, Plan plan, bool add) {
  using L = Lane<scalar_t, V>;
  const Shared<T> sums = shared_at<T>(0);  // (rows, lanes, V)
  const int own_sum = (threadIdx.y * plan.lanes + threadIdx.x) * V;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const Part part(grid, plan, task, V);
    T mix[kMaxMixes][V], grad_mix[kMaxMixes][V];
#pragma unroll
    for (int m = 0; m < kMaxMixes; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) grad_mix[m][i] = 0;
    }
    if (part.active) {
      const L lane(grid, part.channel);
      load_mixes<T, V>(mixes.mix, mixes.count, part.channel, mix);
      Place place = place_of(grid, part.begin);
      for (; place.pixel < part.end; advance(place, grid, plan)) {
        const int64_t at = place.pixel * grid.channels + part.channel;
        const typename L::Values own = lane.own(x, grid, place), other = lane.shifted(x, grid, place, 1);
        T sum[V];
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = 0;
        if (add) {
          const typename L::Values before = vector_at<typename L::Values>(grad_x + at);
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] = static_cast<T>(before.values[i]);
        }
#pragma unroll
        for (int m = 0; m < kMaxMixes; ++m) {
          if (m >= mixes.count) break;
          const typename L::Values grad = lane.own(mixes.grad[m], grid, place);
          const typename L::Values reader = lane.shifted(mixes.grad[m], grid, place, -1);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const T g = static_cast<T>(grad.values[i]), r = static_cast<T>(reader.values[i]);
            sum[i] += fma(g - r, mix[m][i], r);
            grad_mix[m][i] = fma(g, static_cast<T>(own.values[i]) - static_cast<T>(other.values[i]), grad_mix[m][i]);
          }
        }
        typename L::Values result;
#pragma unroll
        for (int i = 0; i < V; ++i) result.values[i] = static_cast<scalar_t>(sum[i]);
        vector_at<typename L::Values>(grad_x + at) = result;
      }
    }
#pragma unroll
    for (int m = 0; m < kMaxMixes; ++m) {
      if (m >= mixes.count) break;
#pragma unroll
      for (int i = 0; i < V; ++i) sums[own_sum + i] = grad_mix[m][i];
      __syncthreads();
      if (threadIdx.y == 0 && part.active) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          T total = 0;
          for (int row = 0; row < plan.rows; ++row) total += sums[(row * plan.lanes + threadIdx.x) * V + i];
          partials[(m * plan.runs + part.run) * grid.channels + part.channel + i] = total;
        }
      }
      __syncthreads();  // before the sums of the next mix
    }
  }
}

// ---- Host functions ----

Grid make_grid(const Tensor& x, int64_t height, int64_t width, int64_t shift, double gamma) {
  const int64_t channels = x.size(2);
  Grid grid{x.size(0) * x.size(1), height, width, channels, {}, {0, 0, -shift, shift}, {-shift, shift, 0, 0}};
  for (int i = 0; i < kStay; ++i) grid.bounds[i] = static_cast<int64_t>(channels * gamma * (i + 1));
  return grid;
}

// Enough runs of pixels to fill a device, long enough to load each mix once for many pixels.
Plan make_plan(const Grid& grid, int width) {
  constexpr int64_t kPixelsPerThread = 16;
  const int64_t vectors = divide_up(grid.channels, width);
  Plan plan{};
  plan.lanes = static_cast<int>(std::min<int64_t>(vectors, 32));
  plan.rows = kThreads / plan.lanes;
  plan.groups = divide_up(vectors, plan.lanes);
  plan.run = plan.rows * kPixelsPerThread;
  plan.runs = divide_up(grid.pixels, plan.run);
  plan.step_rows = plan.rows / grid.width % grid.height;
  plan.step_columns = plan.rows % grid.width;
  return plan;
}

// Calls function(std::integral_constant<int, V>) with V channels to a thread, Widest where all `tensors` allow that.
template <typename scalar_t, int Widest, typename Function>
void with_width(const std::vector<Tensor>& tensors, int64_t channels, const Function& function) {
  const bool vectorized = std::all_of(tensors.begin(), tensors.end(),
                                      [&](const Tensor& tensor) { return is_vectorizable(tensor, channels); });
  if (vectorized) {
    function(std::integral_constant<int, Widest>());
  } else {
    function(std::integral_constant<int, 1>());
  }
}

template <typename scalar_t>
void shift(const Grid& grid, const Tensor& x, const Tensor& y) {
  const Context context(x);
  with_width<scalar_t, kVector<scalar_t>>({x, y}, grid.channels, [&](auto width) {
    const Plan plan = make_plan(grid, width());
    launch(context, shift_kernel<scalar_t, width()>, plan.tasks(), dim3(plan.lanes, plan.rows), 0,
           global<const scalar_t>(x), global<scalar_t>(y), grid, plan);
  });
}

std::vector<Tensor> all_of(std::vector<Tensor> tensors, const std::vector<Tensor>& more) {
  tensors.insert(tensors.end(), more.begin(), more.end());
  return tensors;
}

template <typename scalar_t>
void mix(const Grid& grid, const Tensor& x, const std::vector<Tensor>& mixes, const std::vector<Tensor>& outs) {
  const Context context(x);
  with_width<scalar_t, kVector<scalar_t>>(all_of({x}, outs), grid.channels, [&](auto width) {
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

template <typename scalar_t, typename T = accumulate_t<scalar_t>>
void mix_backward(const Grid& grid, const std::vector<Tensor>& grads, const Tensor& x, const std::vector<Tensor>& mixes,
                  const Tensor& grad_x, const std::vector<Tensor>& grad_mixes) {
  const Context context(x);
  // 64 bits at a time in half precision: 128 would take registers from too many threads.
  with_width<scalar_t, std::min(kVector<scalar_t>, 4)>(all_of({x, grad_x}, grads), grid.channels, [&](auto width) {
    const Plan plan = make_plan(grid, width());
    const Tensor partials = torch::stable::new_empty(mixes[0], {kMaxMixes, plan.runs, grid.channels});
    for (size_t first = 0; first < mixes.size(); first += kMaxMixes) {
      Mixes<scalar_t> part{};
      part.count = static_cast<int>(std::min<size_t>(mixes.size() - first, kMaxMixes));
      for (int m = 0; m < part.count; ++m) {
        part.mix[m] = global<const T>(mixes[first + m]);
        part.grad[m] = global<const scalar_t>(grads[first + m]);
      }
      launch(context, mix_backward_kernel<scalar_t, width()>, plan.tasks(), dim3(plan.lanes, plan.rows),
             plan.lanes * plan.rows * width() * sizeof(T), global<const scalar_t>(x), part, global<scalar_t>(grad_x),
             global<T>(partials), grid, plan, first > 0);
      const auto out = grad_mixes.begin() + first;
      reduce_rows<T>(context, partials, std::vector<Tensor>(out, out + part.count), plan.runs, grid.channels);
    }
  });
}

void check(const char* op, const Tensor& x, const std::vector<Tensor>& mixes, int64_t height, int64_t width,
           double channel_gamma) {
  check_device(op, "x", x);
  check_shift(op, x, mixes, height, width, channel_gamma);
}

std::vector<Tensor> empty_like_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::empty_like(tensor));
  return result;
}

Tensor q_shift(const Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma) {
  check("q_shift", x, {}, height, width, channel_gamma);
  const Tensor x_ = contiguous(x);
  Tensor y = torch::stable::empty_like(x_);
  if (x_.numel() == 0) return y;
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma);
  THO_DISPATCH_V2(x_.scalar_type(), "q_shift", AT_WRAP([&] { shift<scalar_t>(grid, x_, y); }), ScalarType::Float,
                  ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return y;
}

std::vector<Tensor> q_shift_mix(const Tensor& x, const std::vector<Tensor>& mixes, int64_t height, int64_t width,
                                int64_t shift_pixel, double channel_gamma) {
  check("q_shift_mix", x, mixes, height, width, channel_gamma);
  const Tensor x_ = contiguous(x);
  const std::vector<Tensor> mixes_ = contiguous_all(mixes);
  const std::vector<Tensor> outs = empty_like_all(std::vector<Tensor>(mixes.size(), x_));
  if (x_.numel() == 0) return outs;
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma);
  THO_DISPATCH_V2(x_.scalar_type(), "q_shift_mix", AT_WRAP([&] { mix<scalar_t>(grid, x_, mixes_, outs); }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return outs;
}

std::tuple<Tensor, std::vector<Tensor>> q_shift_mix_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                             const std::vector<Tensor>& mixes, int64_t height,
                                                             int64_t width, int64_t shift_pixel, double channel_gamma) {
  constexpr const char* kName = "_q_shift_mix_backward";
  check(kName, x, mixes, height, width, channel_gamma);
  check_gradients(kName, grads, x, mixes);
  const Tensor x_ = contiguous(x);
  const std::vector<Tensor> grads_ = contiguous_all(grads), mixes_ = contiguous_all(mixes);
  Tensor grad_x = torch::stable::empty_like(x_);
  std::vector<Tensor> grad_mixes = empty_like_all(mixes_);
  if (x_.numel() == 0 || mixes.empty()) {
    torch::stable::zero_(grad_x);
    for (Tensor& grad : grad_mixes) torch::stable::zero_(grad);
    return {grad_x, grad_mixes};
  }
  const Grid grid = make_grid(x_, height, width, shift_pixel, channel_gamma);
  THO_DISPATCH_V2(x_.scalar_type(), kName,
                  AT_WRAP([&] { mix_backward<scalar_t>(grid, grads_, x_, mixes_, grad_x, grad_mixes); }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return {grad_x, grad_mixes};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) {
  m.impl("q_shift", TORCH_BOX(&vrwkv::q_shift));
  m.impl("q_shift_mix", TORCH_BOX(&vrwkv::q_shift_mix));
  m.impl("_q_shift_mix_backward", TORCH_BOX(&vrwkv::q_shift_mix_backward));
}
