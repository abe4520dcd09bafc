// What the forward and the backward kernels of Q-Shift on CUDA share: how tokens and channels fall to threads, and
// where a token takes its values from.
#pragma once

#include <vector>

#include "../common/reduce_rows.cuh"
#include "q_shift_checks.h"

namespace vrwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxMixes = kMaxSums;  // of one launch
constexpr int kMoved = 4;            // groups of the channels of a head that move; the fifth stays

// ---- Device code ----

// The grid of tokens and where each group of channels comes from.
struct Grid {
  int64_t tokens, height, width, channels;  // tokens = B * H * W
  int64_t head, bounds[kMoved];             // channels of a head, its first channel past each moved group
  int64_t down[kMoved], right[kMoved];      // from a token to the one that it takes its value from
};

// How tokens and channels fall to threads: `lanes` threads share a token, each with one vector of channels; the block
// steps through its run of tokens `rows` at a time.
struct Plan {
  int lanes, rows;
  int64_t groups, runs, run;        // groups of lanes * V channels, runs of `run` tokens
  int64_t step_rows, step_columns;  // what `rows` tokens are on the grid

  __host__ __device__ int64_t tasks() const { return groups * runs; }
};

struct Place {
  int64_t token, row, column;
};

__device__ __forceinline__ Place place_of(const Grid& grid, int64_t token) {
  return {token, token / grid.width % grid.height, token % grid.width};
}

// `rows` tokens on, without a division.
__device__ __forceinline__ void advance(Place& place, const Grid& grid, const Plan& plan) {
  place.token += plan.rows;
  place.row += plan.step_rows;
  place.column += plan.step_columns;
  if (place.column >= grid.width) {
    place.column -= grid.width;
    place.row += 1;
  }
  if (place.row >= grid.height) place.row -= grid.height;
}

// `channel` of a head.
__device__ __forceinline__ int group_of(const Grid& grid, int64_t channel) {
  int group = 0;
#pragma unroll
  for (int i = 0; i < kMoved; ++i) group += channel >= grid.bounds[i];
  return group;
}

// The move of one group, no move for channels that stay.
struct Move {
  int64_t down, right;
};

__device__ __forceinline__ Move move_of(const Grid& grid, int group) {
  Move move{0, 0};
#pragma unroll
  for (int i = 0; i < kMoved; ++i) {
    if (i == group) move = {grid.down[i], grid.right[i]};
  }
  return move;
}

// The token that lies `move` away, -1 outside the grid. `direction` -1 asks for the token that reads this one.
__device__ __forceinline__ int64_t source_of(const Grid& grid, const Place& place, const Move& move, int direction) {
  const int64_t row = place.row + direction * move.down, column = place.column + direction * move.right;
  const bool inside = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
  return inside ? place.token + direction * (move.down * grid.width + move.right) : -1;
}

// One thread's vector of V channels.
template <typename scalar_t, int V>
struct Lane {
  using Values = Vector<scalar_t, V>;
  int64_t channel;
  int groups;    // of the channels, four bits each
  bool uniform;  // all of one group
  Move move;     // if so

  __device__ __forceinline__ Lane(const Grid& grid, int64_t first) : channel(first), groups(0), uniform(true) {
    int64_t in_head = first % grid.head;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      groups |= group_of(grid, in_head) << (4 * i);
      uniform = uniform && group(i) == group(0);
      if (++in_head == grid.head) in_head = 0;
    }
    move = move_of(grid, group(0));
  }

  __device__ __forceinline__ int group(int i) const { return groups >> (4 * i) & 7; }

  __device__ __forceinline__ Values own(Global<const scalar_t> x, const Grid& grid, const Place& place) const {
    return vector_at<Values>(x + (place.token * grid.channels + channel));
  }

  // The values that are shifted here (direction 1), or shifted from here (direction -1).
  __device__ __forceinline__ Values shifted(Global<const scalar_t> x, const Grid& grid, const Place& place,
                                            int direction) const {
    Values values;
    if (uniform) {
      const int64_t source = source_of(grid, place, move, direction);
      if (source >= 0) return vector_at<Values>(x + (source * grid.channels + channel));
#pragma unroll
      for (int i = 0; i < V; ++i) values.values[i] = 0;
      return values;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {  // count: 0
      const int64_t source = source_of(grid, place, move_of(grid, group(i)), direction);
      values.values[i] = 0;
      if (source >= 0) values.values[i] = x[source * grid.channels + channel + i];
    }
    return values;
  }
};

// This thread's part of a task: a lane and every `rows`-th token of a run.
struct Part {
  int64_t channel, begin, end, run;
  bool active;  // whether the lane has channels

  __device__ __forceinline__ Part(const Grid& grid, const Plan& plan, int64_t task, int width) {
    channel = (task % plan.groups * plan.lanes + threadIdx.x) * width;
    run = task / plan.groups;
    begin = run * plan.run + threadIdx.y;
    end = (run + 1) * plan.run < grid.tokens ? (run + 1) * plan.run : grid.tokens;
    active = channel < grid.channels;
  }
};

// The mixes of one launch and the tensors that go with them.
template <typename scalar_t>
struct Mixes {
  using acc_t = accumulate_t<scalar_t>;
  int count;  // forward; known to the compiler in the backward pass
  Global<const acc_t> mix[kMaxMixes];
  Global<scalar_t> out[kMaxMixes];         // forward
  Global<const scalar_t> grad[kMaxMixes];  // backward
};

template <typename acc_t, int N, int V>
__device__ __forceinline__ void load_mixes(const Global<const acc_t>* mix, int count, int64_t channel,
                                           acc_t (&values)[N][V]) {
#pragma unroll
  for (int m = 0; m < N; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) values[m][i] = m < count ? mix[m][channel + i] : acc_t(0);
  }
}

// ---- Host functions ----

Grid make_grid(const Tensor& x, int64_t height, int64_t width, int64_t shift, double gamma, int64_t heads) {
  const int64_t channels = x.size(2), head = channels / heads;
  Grid grid{x.size(0) * x.size(1), height, width, channels, head, {}, {0, 0, -shift, shift}, {-shift, shift, 0, 0}};
  for (int i = 0; i < kMoved; ++i) grid.bounds[i] = static_cast<int64_t>(head * gamma * (i + 1));
  return grid;
}

// As many tokens to a thread as leave enough blocks to fill a device, of any size: the plan, and with it the order of
// sums, depends on shapes alone. Each token more loads the mixes for one more.
Plan make_plan(const Grid& grid, int width) {
  constexpr int64_t kTokensPerThread = 16, kEnoughBlocks = 296;  // two for each of 148 multiprocessors
  const int64_t vectors = divide_up(grid.channels, width);
  Plan plan{};
  plan.groups = divide_up(vectors, 32);
  plan.lanes = static_cast<int>(divide_up(vectors, plan.groups));
  plan.rows = kThreads / plan.lanes;
  plan.run = plan.rows * kTokensPerThread;
  while (plan.run > plan.rows && plan.groups * divide_up(grid.tokens, plan.run) < kEnoughBlocks) plan.run /= 2;
  plan.runs = divide_up(grid.tokens, plan.run);
  plan.step_rows = plan.rows / grid.width % grid.height;
  plan.step_columns = plan.rows % grid.width;
  return plan;
}

// Calls function(std::integral_constant<int, V>) with V channels to a thread, Widest where the rows of `x` allow that.
template <typename scalar_t, int Widest, typename Function>
void with_width(const Tensor& x, int64_t channels, const Function& function) {
  if (has_vector_rows(x, channels)) {
    function(std::integral_constant<int, Widest>());
  } else {
    function(std::integral_constant<int, 1>());
  }
}

std::vector<Tensor> empty_like_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::empty_like(tensor));
  return result;
}

}  // namespace
}  // namespace vrwkv
