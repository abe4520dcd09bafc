// The RWKV-6 recurrence on CUDA, forward. The formula stands in __init__.py, the algorithm in README.md.
#include "../common/cuda_utils.cuh"
#include "wkv6_checks.h"
#include "wkv6_cuda.h"
#include "wkv6_cuda_chunk.cuh"

namespace vrwkv {
namespace {

// ---- States ----

// Shared memory of chunk_states_kernel, in elements of the accumulator: keys decayed to the start and to the end of the
// chunk, values, sums of logs.
constexpr int kKeyStride = kColumns + 8;
template <typename scalar_t>
constexpr int kStatesElements = kChunk<scalar_t> * (2 * kKeyStride + kWideStride) + kThreads;

// What the tokens of each chunk add to the state that leaves it to the right, and to that to the left, in the places
// (2, width, width) of the chunk; growth (all chunks, width): the product of its decays, less one.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_states_kernel(Global<const scalar_t> k, Global<const scalar_t> v, Global<const scalar_t> w,
                        Global<acc_t> states, Global<acc_t> growth, Shape shape) {
  constexpr int kKeys = kChunk<scalar_t> * kKeyStride * static_cast<int>(sizeof(acc_t));
  const Shared<acc_t> values = shared_at<acc_t>(2 * kKeys);
  const Shared<acc_t> sums = values + kChunk<scalar_t> * kWideStride;
  const int64_t row_tiles = (shape.width + kColumns - 1) / kColumns;
  const int64_t column_tiles = (shape.width + kWideColumns - 1) / kWideColumns;
  const Group<scalar_t> group;
  for (int64_t task = blockIdx.x; task < shape.all_chunks() * row_tiles * column_tiles; task += gridDim.x) {
    const int64_t first_row = task % row_tiles * kColumns, row = first_row + group.lane;
    const int64_t first_column = task / row_tiles % column_tiles * kWideColumns;
    const Chunk<scalar_t> chunk(shape, task / row_tiles / column_tiles);
    const int columns = left_of(shape.width, first_column, kWideColumns);

    acc_t keys[kGroup<scalar_t>], logs[kGroup<scalar_t>], factors[kGroup<scalar_t>];
    group.load(k, chunk, row, keys);
    group.load_logs(w, chunk, row, logs, sums);
    // with: width = 64
    load_tile(v, chunk, first_column, columns, values, kWideStride);
    __syncthreads();
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Border border = side == 0 ? end_of_chunk<scalar_t>() : start_of_chunk<scalar_t>();
      group.find_factors(logs, border, sums, factors);
      group.store(keys, factors, shared_at<acc_t>(side * kKeys), kKeyStride);
    }
    if (first_column == 0 && group.index == 0 && row < shape.width) {  // count: 1 / 8
      acc_t sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += sums[i * 32 + group.lane];
      growth[chunk.index * shape.width + row] = expm1(sum);
    }
    __syncthreads();

    // A warp has one side, 16 rows and every other tile of columns.
    const int side = group.index / 4, tile_row = group.index % 2 * kTileRows;
    const TileColumns tiles{group.index / 2 % 2 * kTileColumns, 2 * kTileColumns, columns};
    const Shared<const acc_t> decayed = shared_at<const acc_t>(side * kKeys);
    constexpr int kTiles = kWideColumns / kTileColumns / 2;
    acc_t products[kTiles][4] = {};
    // with: depth = 64, copies = 2
    multiply<scalar_t>(
        products, kChunk<scalar_t>, tiles,
        [&](int row, int token) -> acc_t { return decayed[token * kKeyStride + tile_row + row]; },
        [&](int token, int column) -> acc_t { return values[token * kWideStride + column]; });
    const int64_t start = chunk.state(side, shape.width);
    each_element<kTiles>(tiles, [&](int tile, int element, int row, int column) {
      const int64_t at = first_row + tile_row + row;
      if (at < shape.width) states[start + at * shape.width + first_column + column] = products[tile][element];
    });
    __syncthreads();  // before the next task overwrites shared memory
  }
}

// Replaces what each chunk adds to the states by the states that enter it, from the left and from the right.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    scan_states_kernel(Global<acc_t> states, Global<const acc_t> growth, Shape shape) {
  constexpr int kAhead = 8;  // chunks that are loaded together
  const int64_t size = shape.width * shape.width, threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t elements = shape.batch * shape.heads * 2 * size;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += threads) {
    const int64_t element = i % size, side = i / size % 2, first = i / size / 2 * shape.chunks;
    acc_t state = 0;
    for (int64_t begin = 0; begin < shape.chunks; begin += kAhead) {  // count: (chunks + 7) // 8
      acc_t added[kAhead], grown[kAhead];
      int64_t places[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (begin + j >= shape.chunks) continue;
        const int64_t chunk = first + (side == 0 ? begin + j : shape.chunks - 1 - begin - j);
        places[j] = (2 * chunk + side) * size + element;
        added[j] = states[places[j]];
        grown[j] = growth[chunk * shape.width + element / shape.width];
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (begin + j >= shape.chunks) continue;
        states[places[j]] = state;
        state += state * grown[j] + added[j];
      }
    }
  }
}

// ---- Outputs ----

template <typename scalar_t>
struct Inputs {
  Global<const scalar_t> r, k, v, w;
  Global<const accumulate_t<scalar_t>> u, states;
};

// Shared memory of outputs_kernel, in elements of the accumulator: decayed receptances and keys and sums of logs; then
// in their place the weights of the chunk's tokens for each other and for themselves, and values.
template <typename scalar_t>
constexpr int kWeightStride = kChunk<scalar_t> + 4;
template <typename scalar_t>
constexpr int kOutputsElements =
    std::max(2 * kChunk<scalar_t> * kStride + kThreads, kChunk<scalar_t>*(kWeightStride<scalar_t> + 1 + kWideStride));

// What a thread gathers, going over the columns of r, k and w.
template <typename scalar_t>
struct Gathered {
  using acc_t = accumulate_t<scalar_t>;
  acc_t weights[kTilesOf<scalar_t, kChunk<scalar_t>>][4] = {};
  acc_t own = 0;  // the weight for itself of the token of its group that has the lane's number
  acc_t outputs[kTilesOf<scalar_t, kWideColumns>][4] = {};
};

// Weights with which tokens meet where blocks of `half` tokens are joined: `left` (chunk, columns) times `right`
// transposed.
template <typename scalar_t>
__device__ __forceinline__ void add_weights(Shared<const accumulate_t<scalar_t>> left,
                                            Shared<const accumulate_t<scalar_t>> right, int columns, int half,
                                            Gathered<scalar_t>& gathered) {
  using acc_t = accumulate_t<scalar_t>;
  const int row = first_row<scalar_t>();
  const TileColumns tiles = tiles_of<scalar_t>(kChunk<scalar_t>);
#pragma unroll
  for (int tile = 0; tile < kTilesOf<scalar_t, kChunk<scalar_t>>; ++tile) {
    const TileColumns one{tiles.of(tile), 0, kChunk<scalar_t>};
    const bool any = half < kTileRows ? row / kTileRows == one.first / kTileRows : meet(row, one.first, half);
    // Of 24 levels and tiles 7 meet; the compiler makes two copies of this, for either case of `any`.
    if (any) {  // count: 7 / 24 / 2
      acc_t products[1][4] = {};
      // with: depth = 32, copies = 4
      multiply<scalar_t>(
          products, columns, one, [&](int i, int n) -> acc_t { return left[(row + i) * kStride + n]; },
          [&](int n, int token) -> acc_t { return right[token * kStride + n]; });
      each_element<1>(one, [&](int, int element, int i, int token) {
        if (meet(row + i, token, half)) gathered.weights[tile][element] += products[0][element];
      });
    }
  }
}

// The part of up to 32 columns of r, k and w from `first` on, for outputs from column `first_output` on.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void gather(const Inputs<scalar_t>& in, const Shape& shape, const Chunk<scalar_t>& chunk,
                                       int64_t first, int64_t first_output, Gathered<scalar_t>& gathered) {
  const Shared<acc_t> left = shared_at<acc_t>(0), right = left + kChunk<scalar_t> * kStride;
  const Shared<acc_t> sums = right + kChunk<scalar_t> * kStride;
  const Group<scalar_t> group;
  const int64_t column = first + group.lane;
  const int columns = left_of(shape.width, first, kColumns);
  acc_t r[kGroup<scalar_t>], k[kGroup<scalar_t>], logs[kGroup<scalar_t>], factors[kGroup<scalar_t>];
  group.load(in.r, chunk, column, r);
  group.load(in.k, chunk, column, k);
  group.load_logs(in.w, chunk, column, logs, sums);
  const acc_t u = column < shape.size ? in.u[chunk.head(shape) * shape.size + column] : acc_t(0);
#pragma unroll
  for (int i = 0; i < kGroup<scalar_t>; ++i) {
    const acc_t sum = sum_over_warp(r[i] * u * k[i]);
    if (group.lane == i) gathered.own += sum;
  }
  __syncthreads();

  if (shape.chunks > 1) {  // count: chunks > 1
    group.find_factors(logs, start_of_chunk<scalar_t>(), sums, factors);
    group.store(r, factors, left, kStride);
    group.find_factors(logs, end_of_chunk<scalar_t>(), sums, factors);
    group.store(r, factors, right, kStride);
    __syncthreads();
    const int row = first_row<scalar_t>();
    const TileColumns tiles = tiles_of<scalar_t>(left_of(shape.width, first_output, kWideColumns));
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Shared<acc_t> decayed = side == 0 ? left : right;
      const Global<const acc_t> state =
          in.states + (chunk.state(side, shape.width) + first * shape.width + first_output);
      // with: depth = 32, copies = 2
      multiply<scalar_t>(
          gathered.outputs, columns, tiles, [&](int i, int n) -> acc_t { return decayed[(row + i) * kStride + n]; },
          [&](int n, int output) -> acc_t { return state[n * shape.width + output]; });
    }
    __syncthreads();
  }
  for (int half = 1; half < kChunk<scalar_t>; half *= 2) {  // count: 6
    // with: groups = 1 / 3
    group.find_factors(logs, Border{half, 0}, sums, factors);
    group.store(r, factors, left, kStride);
    group.store(k, factors, right, kStride);
    __syncthreads();
    add_weights(left, right, columns, half, gathered);
    __syncthreads();
  }
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__global__ void __launch_bounds__(kThreads, 2) outputs_kernel(Inputs<scalar_t> in, Global<scalar_t> y, Shape shape) {
  const Shared<acc_t> weights = shared_at<acc_t>(0), own = weights + kChunk<scalar_t> * kWeightStride<scalar_t>;
  const Shared<acc_t> values = own + kChunk<scalar_t>;
  const int64_t column_tiles = (shape.width + kWideColumns - 1) / kWideColumns;
  for (int64_t task = blockIdx.x; task < shape.all_chunks() * column_tiles; task += gridDim.x) {
    const Chunk<scalar_t> chunk(shape, task / column_tiles);
    const int64_t first_output = task % column_tiles * kWideColumns;
    const int outputs = left_of(shape.width, first_output, kWideColumns);
    Gathered<scalar_t> gathered;
    for (int64_t first = 0; first < shape.width; first += kColumns) {  // count: 2
      gather(in, shape, chunk, first, first_output, gathered);
    }

    const Group<scalar_t> group;
    const int row = first_row<scalar_t>();
    each_element<kTilesOf<scalar_t, kChunk<scalar_t>>>(
        tiles_of<scalar_t>(kChunk<scalar_t>), [&](int tile, int element, int i, int token) {
          weights[(row + i) * kWeightStride<scalar_t> + token] = gathered.weights[tile][element];
        });
    if (group.lane < kGroup<scalar_t>) own[group.token(group.lane)] = gathered.own;
    // with: width = 64
    load_tile(in.v, chunk, first_output, outputs, values, kWideStride);
    __syncthreads();

    const TileColumns tiles = tiles_of<scalar_t>(outputs);
    // with: depth = 64, copies = 2
    multiply<scalar_t>(
        gathered.outputs, kChunk<scalar_t>, tiles,
        [&](int i, int token) -> acc_t { return weights[(row + i) * kWeightStride<scalar_t> + token]; },
        [&](int token, int output) -> acc_t { return values[token * kWideStride + output]; });
    each_element<kTilesOf<scalar_t, kWideColumns>>(tiles, [&](int tile, int element, int i, int output) {
      const int token = row + i;
      if (!chunk.has(token, first_output + output)) return;
      const acc_t value = own[token] * values[token * kWideStride + output];
      y[chunk.at(token, first_output + output)] = static_cast<scalar_t>(gathered.outputs[tile][element] + value);
    });
    __syncthreads();  // before the next task overwrites shared memory
  }
}

// ---- Host functions ----

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
Tensor find_states(const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
  const Context context(k);
  const Shape shape = make_shape<scalar_t>(k);
  if (shape.chunks == 1) return torch::stable::new_empty(u, {0});
  const Tensor states =
      torch::stable::new_empty(u, {shape.batch, shape.heads, shape.chunks, 2, shape.width, shape.width});
  const Tensor growth = torch::stable::new_empty(u, {shape.all_chunks(), shape.width});
  const int64_t tiles = divide_up(shape.width, kColumns) * divide_up(shape.width, kWideColumns);
  launch(context, chunk_states_kernel<scalar_t>, shape.all_chunks() * tiles, dim3(kThreads),
         kStatesElements<scalar_t> * sizeof(acc_t), global<const scalar_t>(k), global<const scalar_t>(v),
         global<const scalar_t>(w), global<acc_t>(states), global<acc_t>(growth), shape);
  const int64_t elements = shape.batch * shape.heads * 2 * shape.width * shape.width;
  launch(context, scan_states_kernel<acc_t>, divide_up(elements, kThreads), dim3(kThreads), 0, global<acc_t>(states),
         global<const acc_t>(growth), shape);
  return states;
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void find_outputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                  const Tensor& states, const Tensor& y) {
  const Context context(r);
  const Shape shape = make_shape<scalar_t>(r);
  const Inputs<scalar_t> in{global<const scalar_t>(r), global<const scalar_t>(k), global<const scalar_t>(v),
                            global<const scalar_t>(w), global<const acc_t>(u),    global<const acc_t>(states)};
  launch(context, outputs_kernel<scalar_t>, shape.all_chunks() * divide_up(shape.width, kWideColumns), dim3(kThreads),
         kOutputsElements<scalar_t> * sizeof(acc_t), in, global<scalar_t>(y), shape);
}

}  // namespace

Tensor wkv6_states(const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
  Tensor states = u;
  dispatch_floating(k.scalar_type(), [&](auto zero) { states = find_states<decltype(zero)>(k, v, w, u); });
  return states;
}

void wkv6_outputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                  const Tensor& states, const Tensor& y) {
  dispatch_floating(r.scalar_type(), [&](auto zero) { find_outputs<decltype(zero)>(r, k, v, w, u, states, y); });
}

namespace {

Tensor wkv6(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
  check_wkv6("wkv6", r, k, v, w, u);
  const std::vector<Tensor> in = contiguous_all({r, k, v, w, u});
  Tensor y = torch::stable::empty_like(in[0]);
  if (r.numel() == 0) return y;
  wkv6_outputs(in[0], in[1], in[2], in[3], in[4], wkv6_states(in[1], in[2], in[3], in[4]), y);
  return y;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) { m.impl("wkv6", TORCH_BOX(&vrwkv::wkv6)); }
