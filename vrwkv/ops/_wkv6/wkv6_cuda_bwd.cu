// The RWKV-6 recurrence on CUDA, backward. The algorithm stands in README.md.
#include <tuple>

#include "../common/cuda_utils.cuh"
#include "../common/reduce_rows.cuh"
#include "wkv6_checks.h"
#include "wkv6_cuda.h"
#include "wkv6_cuda_chunk.cuh"

namespace vrwkv {
namespace {

template <typename scalar_t>
struct BackwardInputs {
  Global<const scalar_t> grad, r, k, v, w;
  Global<const accumulate_t<scalar_t>> u;
  Global<const accumulate_t<scalar_t>> states, grad_states;  // of k and v; of r and grad
};

// Gradients; that of u for each chunk, (B * chunks, H, N).
template <typename scalar_t>
struct BackwardOutputs {
  Global<scalar_t> r, k, w;
  Global<accumulate_t<scalar_t>> partial_u;
};

// ---- Shared memory ----

// Borders beyond which a group's tokens have other groups on their side: those of the largest blocks and of the chunk.
constexpr int kFarBorders = 4;
template <typename scalar_t>
constexpr int kPairStride = kChunk<scalar_t> + 4;

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct Memory {
  // Two tiles (tokens, columns); pairs (tokens, tokens): p_ij = grad_i . v_j; sums over groups, one for each thread, of
  // logs and for each far border of their gradients; what decays from end to end of the chunk receive.
  static constexpr int kTile = kChunk<scalar_t> * kStride;
  static constexpr int kPairs = 2 * kTile, kSums = kPairs + kChunk<scalar_t> * kPairStride<scalar_t>;
  static constexpr int kGradSums = kSums + kThreads, kThrough = kGradSums + kFarBorders * kThreads;
  static constexpr int kElements = kThrough + kColumns;

  static __device__ __forceinline__ Shared<acc_t> at(int element) {
    return shared_at<acc_t>(element * static_cast<int>(sizeof(acc_t)));
  }

  Shared<acc_t> left = at(0), right = at(kTile), pairs = at(kPairs), sums = at(kSums), through = at(kThrough);

  __device__ __forceinline__ Shared<acc_t> grad_sums(int border) const { return at(kGradSums + border * kThreads); }
};

// ---- Products ----

template <typename scalar_t>
constexpr int kNarrow = kTilesOf<scalar_t, kColumns>;

template <typename scalar_t>
using NarrowTiles = accumulate_t<scalar_t>[kNarrow<scalar_t>][4];

template <typename scalar_t>
__device__ __forceinline__ void store_products(const NarrowTiles<scalar_t>& products, const TileColumns& tiles,
                                               Shared<accumulate_t<scalar_t>> to) {
  each_element<kNarrow<scalar_t>>(tiles, [&](int tile, int element, int i, int n) {
    to[(first_row<scalar_t>() + i) * kStride + n] = products[tile][element];
  });
}

// The gradients of r and k, each times the decays to the start and to the end of the chunk, through the states.
template <typename scalar_t>
struct StateProducts {
  NarrowTiles<scalar_t> r[2] = {}, k[2] = {};

  __device__ __forceinline__ void store(int side, const TileColumns& tiles) const {
    const Memory<scalar_t> memory;
    store_products<scalar_t>(r[side], tiles, memory.right);
    store_products<scalar_t>(k[side], tiles, memory.left);
  }
};

// Adds the part of up to 32 columns of grad and v, which lie in the tiles, from `first_value` on.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void add_state_products(const BackwardInputs<scalar_t>& in, const Shape& shape,
                                                   const Chunk<scalar_t>& chunk, int64_t first, int64_t first_value,
                                                   const TileColumns& tiles, StateProducts<scalar_t>& products) {
  const Memory<scalar_t> memory;
  const int row = first_row<scalar_t>(), values = left_of(shape.width, first_value, kColumns);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int64_t start = chunk.state(side, shape.width) + first * shape.width + first_value;
    const auto multiply_by = [&](Shared<acc_t> tile, Global<const acc_t> state, NarrowTiles<scalar_t>& to) {
      // with: depth = 32, copies = 2
      multiply<scalar_t>(
          to, values, tiles, [&](int i, int m) -> acc_t { return tile[(row + i) * kStride + m]; },
          [&](int m, int n) -> acc_t { return state[n * shape.width + m]; });
    };
    multiply_by(memory.left, in.states + start, products.r[side]);
    multiply_by(memory.right, in.grad_states + start, products.k[side]);
  }
}

// p_ij of all tokens of the chunk, and what the states give.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void find_pairs(const BackwardInputs<scalar_t>& in, const Shape& shape,
                                           const Chunk<scalar_t>& chunk, int64_t first, const TileColumns& tiles,
                                           StateProducts<scalar_t>& products) {
  constexpr int kTiles = kTilesOf<scalar_t, kChunk<scalar_t>>;
  const Memory<scalar_t> memory;
  const int row = first_row<scalar_t>();
  const TileColumns tokens = tiles_of<scalar_t>(kChunk<scalar_t>);
  acc_t pairs[kTiles][4] = {};
  for (int64_t first_value = 0; first_value < shape.width; first_value += kColumns) {  // count: 2
    // with: width = 32
    load_tile(in.grad, chunk, first_value, kColumns, memory.left, kStride);
    // with: width = 32
    load_tile(in.v, chunk, first_value, kColumns, memory.right, kStride);
    __syncthreads();
    // with: depth = 32, copies = 2
    multiply<scalar_t>(
        pairs, left_of(shape.width, first_value, kColumns), tokens,
        [&](int i, int m) -> acc_t { return memory.left[(row + i) * kStride + m]; },
        [&](int m, int j) -> acc_t { return memory.right[j * kStride + m]; });
    if (shape.chunks > 1) add_state_products(in, shape, chunk, first, first_value, tiles, products);
    __syncthreads();
  }
  each_element<kTiles>(tokens, [&](int tile, int element, int i, int j) {
    memory.pairs[(row + i) * kPairStride<scalar_t> + j] = pairs[tile][element];
  });
}

// The gradients of decayed receptances from the decayed keys in `tile`, through the pairs that meet where blocks of
// `half` tokens are joined; with kTransposed those of the keys from the receptances.
template <typename scalar_t, bool kTransposed, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void multiply_pairs(Shared<acc_t> tile, int half, const TileColumns& tiles,
                                               NarrowTiles<scalar_t>& products) {
  const Memory<scalar_t> memory;
  const int row = first_row<scalar_t>();
  const int other = half < kTileRows ? row : (row & ~(half - 1)) ^ half;  // the first token of those that it may meet
  // with: depth = 56 / 3, copies = 2
  multiply<scalar_t>(
      products, half < kTileRows ? kTileRows : half, tiles,
      [&](int i, int j) -> acc_t {
        const int first = row + i, second = other + j;
        const int at = kTransposed ? second * kPairStride<scalar_t> + first : first * kPairStride<scalar_t> + second;
        return meet(first, second, half) ? acc_t(memory.pairs[at]) : acc_t(0);
      },
      [&](int j, int n) -> acc_t { return tile[(other + j) * kStride + n]; });
}

// ---- One column ----

// A thread's tokens of one column and their gradients.
template <typename scalar_t>
struct Gradients : Group<scalar_t> {
  using typename Group<scalar_t>::acc_t;
  using typename Group<scalar_t>::Values;
  using Group<scalar_t>::kLength;
  Values r, k, logs, grad_r = {}, grad_k = {}, grad_logs = {};

  // Adds what the gradients in the tiles give: right of r times `factors`, left of k times them. Returns the group's
  // sum of gradients of the exponents of the factors.
  __device__ __forceinline__ acc_t add(Border border, const Values& factors) {
    const Memory<scalar_t> memory;
    Values grads;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const int at = this->token(i) * kStride + this->lane;
      const acc_t from_r = memory.right[at] * factors[i], from_k = memory.left[at] * factors[i];
      grad_r[i] += from_r;
      grad_k[i] += from_k;
      grads[i] = from_r * r[i] + from_k * k[i];
    }
    return this->add_gradients(grads, border, grad_logs);
  }

  // What it gives that tokens meet themselves; returns the gradient of u.
  __device__ __forceinline__ acc_t add_own(acc_t u) {
    const Memory<scalar_t> memory;
    acc_t grad_u = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const acc_t pair = memory.pairs[this->token(i) * (kPairStride<scalar_t> + 1)];
      grad_r[i] += pair * u * k[i];
      grad_k[i] += pair * u * r[i];
      grad_u += pair * r[i] * k[i];
    }
    return grad_u;
  }
};

// For the columns of a warp: through which the states pass the chunk, from `first` on.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void find_through(const BackwardInputs<scalar_t>& in, const Shape& shape,
                                             const Chunk<scalar_t>& chunk, int64_t first) {
  const Memory<scalar_t> memory;
  constexpr int kEach = kColumns / kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = warp * kEach; n < (warp + 1) * kEach; ++n) {  // count: 4
    acc_t sum = 0;
    if (first + n < shape.width) {
      for (int side = 0; side < 2; ++side) {
        const int64_t row = (first + n) * shape.width;
        const Global<const acc_t> entering = in.states + (chunk.state(side, shape.width) + row);
        const Global<const acc_t> leaving = in.grad_states + (chunk.state(1 - side, shape.width) + row);
#pragma unroll 2
        for (int64_t m = lane; m < shape.width; m += 32) {  // count: 2, unrolled 2
          sum += entering[m] * leaving[m];
        }
      }
    }
    sum = sum_over_warp(sum);
    if (lane == 0) memory.through[n] = sum;
  }
}

// Finishes the gradients of the logs by what lies beyond the group, and writes all of them.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_gradients(const BackwardInputs<scalar_t>& in,
                                                const BackwardOutputs<scalar_t>& out, const Shape& shape,
                                                const Chunk<scalar_t>& chunk, int64_t column,
                                                Gradients<scalar_t>& group) {
  constexpr int kLength = kGroup<scalar_t>;
  const Memory<scalar_t> memory;
  if (shape.chunks > 1) {  // count: chunks > 1
    group.add_outside_gradients(start_of_chunk<scalar_t>(), memory.grad_sums(0), group.grad_logs);
    group.add_outside_gradients(end_of_chunk<scalar_t>(), memory.grad_sums(1), group.grad_logs);
    acc_t log = 0;
    for (int i = 0; i < kWarps; ++i) log += memory.sums[i * 32 + group.lane];
    const acc_t through = exponential(log) * memory.through[group.lane];
#pragma unroll
    for (int i = 0; i < kLength; ++i) group.grad_logs[i] += through;
  }
  // with: groups = 1 / 2
  group.add_outside_gradients(Border{2 * kLength, 0}, memory.grad_sums(2), group.grad_logs);
  // with: groups = 3 / 2
  group.add_outside_gradients(Border{4 * kLength, 0}, memory.grad_sums(3), group.grad_logs);
  const acc_t u = column < shape.size ? in.u[chunk.head(shape) * shape.size + column] : acc_t(0);
  memory.left[threadIdx.x] = group.add_own(u);
#pragma unroll
  for (int i = 0; i < kLength; ++i) {
    if (!chunk.has(group.token(i), column)) continue;
    const int64_t at = chunk.at(group.token(i), column);
    out.r[at] = static_cast<scalar_t>(group.grad_r[i]);
    out.k[at] = static_cast<scalar_t>(group.grad_k[i]);
    out.w[at] = static_cast<scalar_t>(group.logs[i] * group.grad_logs[i]);
  }
  __syncthreads();
  if (group.index == 0 && column < shape.size) {  // count: 1 / 8
    acc_t grad_u = 0;
    for (int i = 0; i < kWarps; ++i) grad_u += memory.left[i * 32 + group.lane];
    const int64_t image = chunk.index / shape.chunks / shape.heads;
    const int64_t row = image * shape.chunks + chunk.index % shape.chunks;
    out.partial_u[(row * shape.heads + chunk.head(shape)) * shape.size + column] = grad_u;
  }
}

// ---- Kernel ----

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(BackwardInputs<scalar_t> in, BackwardOutputs<scalar_t> out, Shape shape) {
  constexpr int kLength = kGroup<scalar_t>;
  const Memory<scalar_t> memory;
  const int64_t column_tiles = (shape.width + kColumns - 1) / kColumns;
  for (int64_t task = blockIdx.x; task < shape.all_chunks() * column_tiles; task += gridDim.x) {
    const Chunk<scalar_t> chunk(shape, task / column_tiles);
    const int64_t first = task % column_tiles * kColumns;
    const TileColumns tiles = tiles_of<scalar_t>(left_of(shape.width, first, kColumns));
    Gradients<scalar_t> group;
    const int64_t column = first + group.lane;
    acc_t factors[kLength];
    const bool has_states = shape.chunks > 1;
    if (has_states) find_through(in, shape, chunk, first);
    StateProducts<scalar_t> products;
    find_pairs(in, shape, chunk, first, tiles, products);
    if (has_states) products.store(0, tiles);
    group.load(in.r, chunk, column, group.r);
    group.load(in.k, chunk, column, group.k);
    group.load_logs(in.w, chunk, column, group.logs, memory.sums);
    __syncthreads();
    if (has_states) {  // count: chunks > 1
      group.find_factors(group.logs, start_of_chunk<scalar_t>(), memory.sums, factors);
      memory.grad_sums(0)[threadIdx.x] = group.add(start_of_chunk<scalar_t>(), factors);
      __syncthreads();
      products.store(1, tiles);
      __syncthreads();
      group.find_factors(group.logs, end_of_chunk<scalar_t>(), memory.sums, factors);
      memory.grad_sums(1)[threadIdx.x] = group.add(end_of_chunk<scalar_t>(), factors);
    }
    for (int half = 1; half < kChunk<scalar_t>; half *= 2) {  // count: 6
      const Border border{half, 0};
      // with: groups = 1 / 3
      group.find_factors(group.logs, border, memory.sums, factors);
      group.store(group.r, factors, memory.left, kStride);
      group.store(group.k, factors, memory.right, kStride);
      __syncthreads();
      // Either product takes the place of its factor.
      NarrowTiles<scalar_t> of_r = {};
      multiply_pairs<scalar_t, false>(memory.right, half, tiles, of_r);
      __syncthreads();
      store_products<scalar_t>(of_r, tiles, memory.right);
      NarrowTiles<scalar_t> of_k = {};
      multiply_pairs<scalar_t, true>(memory.left, half, tiles, of_k);
      __syncthreads();
      store_products<scalar_t>(of_k, tiles, memory.left);
      __syncthreads();
      const acc_t sum = group.add(border, factors);
      if (half > kLength) memory.grad_sums(half == 2 * kLength ? 2 : 3)[threadIdx.x] = sum;
    }
    __syncthreads();
    write_gradients(in, out, shape, chunk, column, group);
    __syncthreads();  // before the next task overwrites shared memory
  }
}

// ---- Host functions ----

// The gradients of r, k, w and u.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void find_gradients(const std::vector<Tensor>& in, const Tensor& states, const Tensor& grad_states,
                    const std::vector<Tensor>& grads) {
  const Context context(in[0]);
  const Shape shape = make_shape<scalar_t>(in[0]);
  const int64_t rows = shape.batch * shape.chunks, columns = shape.heads * shape.size;
  const Tensor partials = torch::stable::new_empty(in[5], {1, rows, columns});
  const BackwardInputs<scalar_t> inputs{global<const scalar_t>(in[0]), global<const scalar_t>(in[1]),
                                        global<const scalar_t>(in[2]), global<const scalar_t>(in[3]),
                                        global<const scalar_t>(in[4]), global<const acc_t>(in[5]),
                                        global<const acc_t>(states),   global<const acc_t>(grad_states)};
  const BackwardOutputs<scalar_t> outputs{global<scalar_t>(grads[0]), global<scalar_t>(grads[1]),
                                          global<scalar_t>(grads[2]), global<acc_t>(partials)};
  launch(context, gradients_kernel<scalar_t>, shape.all_chunks() * divide_up(shape.width, kColumns), dim3(kThreads),
         Memory<scalar_t>::kElements * sizeof(acc_t), inputs, outputs, shape);
  reduce_rows<acc_t>(context, partials, {grads[3]}, rows, columns);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv6_backward(const Tensor& grad, const Tensor& r, const Tensor& k,
                                                                 const Tensor& v, const Tensor& w, const Tensor& u) {
  check_wkv6_backward(grad, r, k, v, w, u);
  const std::vector<Tensor> in = contiguous_all({grad, r, k, v, w, u});
  Tensor grad_r = torch::stable::empty_like(in[1]), grad_k = torch::stable::empty_like(in[1]);
  Tensor grad_v = torch::stable::empty_like(in[1]), grad_w = torch::stable::empty_like(in[1]);
  Tensor grad_u = torch::stable::empty_like(in[5]);
  if (r.numel() == 0) {
    torch::stable::zero_(grad_u);
    return {grad_r, grad_k, grad_v, grad_w, grad_u};
  }
  // The op is linear in v, and its transpose is itself with r and k in each other's place.
  const Tensor states = wkv6_states(in[2], in[3], in[4], in[5]);
  const Tensor grad_states = wkv6_states(in[1], in[0], in[4], in[5]);
  wkv6_outputs(in[2], in[1], in[0], in[4], in[5], grad_states, grad_v);
  dispatch_floating(r.scalar_type(), [&](auto zero) {
    find_gradients<decltype(zero)>(in, states, grad_states, {grad_r, grad_k, grad_w, grad_u});
  });
  return {grad_r, grad_k, grad_v, grad_w, grad_u};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("_wkv6_backward", TORCH_BOX(&vrwkv::wkv6_backward)); }
