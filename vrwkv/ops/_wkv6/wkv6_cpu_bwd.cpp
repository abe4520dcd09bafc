// The RWKV-6 recurrence on the CPU, backward: against either direction from chunk to chunk, with the gradient of the
// state behind the chunk and the state before it. The states before are computed
// again: those at the start of each block of tokens first, then, a block at a time, those of its chunks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "wkv6_checks.h"
#include "wkv6_cpu_gradients.h"
#include "wkv6_cpu_states.h"

namespace vrwkv {
namespace {

// The transposed state behind a chunk, from that before it; k becomes k_out.
template <typename acc_t, int64_t kWidth>
struct StateChunk {
  template <int Bytes>
  static VRWKV_INLINE void run(const Chunk<acc_t>& chunk, const acc_t* before, acc_t* behind) {
    using L = Lanes<acc_t, Bytes>;
    const int64_t width = kWidth ? kWidth : chunk.width;
    for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
      L log = L::all(0);
      for (int64_t at = (chunk.tokens - 1) * width + n; at >= 0; at -= width) {
        (L::load(chunk.k + at) * decay_of(log).value).store(chunk.k + at);
        log = log + log_decay(L::load(chunk.w + at));
      }
      decay_of(log).minus_one.store(chunk.logs + n);
    }
    const Matrix<acc_t> values{chunk.v, 1, width}, keys{chunk.k, width, 1};
    each_product<acc_t, Bytes>(width, width, [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
      product.clear();
      product.add(values.from(m, 0), keys.from(0, n), chunk.tokens);
      product.each([&](int64_t row, int64_t column, const L& sum) __attribute__((always_inline)) {
        const int64_t at = (m + row) * width + n + column;
        const L state = L::load(before + at);
        (state + (state * L::load(chunk.logs + n + column) + sum)).store(behind + at);
      });
    });
  }
};

// The gradients of a chunk and of the state before it, from that of the state behind. `state`: before the chunk,
// transposed; `grad_turned`: room for the transposed gradient of the state.
template <typename acc_t, int64_t kWidth>
struct BackwardChunk {
  template <int Bytes>
  static VRWKV_INLINE void run(const GradientChunk<acc_t>& chunk, const acc_t* state, acc_t* grad_state,
                               acc_t* grad_turned) {
    using L = Lanes<acc_t, Bytes>;
    const int64_t width = kWidth ? kWidth : chunk.width;
    weigh_tokens<acc_t, Bytes, true>(chunk, width, chunk.kept);
    find_pairs<acc_t, Bytes>(chunk, width);
    transpose<acc_t, Bytes>(grad_state, grad_turned, width);

    const Matrix<acc_t> grad{chunk.grad, width, 1}, v{chunk.v, width, 1}, keys{chunk.k_out, width, 1};
    const int64_t tokens = chunk.tokens, size = chunk.size;
    multiply_into<acc_t, Bytes>(chunk.ahead, chunk.grad_r, tokens, width, grad, {state, width, 1}, size, true);
    multiply_into<acc_t, Bytes>(chunk.ahead, chunk.grad_k, tokens, width, v, {grad_turned, width, 1}, size, true);
    each_product<acc_t, Bytes>(tokens, width, [&](auto product, int64_t i, int64_t j) __attribute__((always_inline)) {
      chunk.ahead->ask();
      product.clear();
      product.add(keys.from(i, 0), Matrix<acc_t>{grad_state, width, 1}.from(0, j), size);
      product.add(Matrix<acc_t>{chunk.weights, 1, kChunk}.from(i, i), grad.from(i, j), tokens - i);
      product.store(chunk.grad_v + i * width + j, width);
    });

    acc_t* const growth = chunk.grad_u + width;
    for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
      const auto decay = decay_of(L::load(chunk.logs + n));
      L sum = L::all(0);
      for (int64_t m = 0; m < size; ++m) {
        sum = sum + L::load(state + m * width + n) * L::load(grad_turned + m * width + n);
      }
      (decay.value * sum).store(chunk.grad_logs + n);
      decay.minus_one.store(growth + n);
    }
    each_product<acc_t, Bytes>(width, width, [&](auto product, int64_t n, int64_t j) __attribute__((always_inline)) {
      chunk.ahead->ask();
      product.clear();
      product.add(Matrix<acc_t>{chunk.r_in, 1, width}.from(n, 0), grad.from(0, j), tokens);
      product.each([&](int64_t row, int64_t column, const L& sum) __attribute__((always_inline)) {
        acc_t* const at = grad_state + (n + row) * width + j + column;
        const L behind = L::load(at);
        (behind + (behind * L::all(growth[n + row]) + sum)).store(at);
      });
    });
    split_chunk<acc_t, Bytes>(chunk, width);
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct Backward {
  Shape shape;
  const scalar_t *grad, *r, *k, *v, *w;
  const acc_t* u;
  acc_t* partials[4];    // gradients of r, k, v and w through one direction
  scalar_t* outputs[4];  // the same memory where that has their type
  double* grad_u;        // (B * H, N)

  int64_t width() const { return row_width<acc_t>(shape); }
  int64_t state_size() const { return width() * width(); }

  void run_tokens(int64_t index, bool backwards, int64_t begin, int64_t end, const acc_t* start, acc_t* grad_state,
                  bool add) const {
    const Sequence sequence(shape, index, backwards);
    acc_t* memory = nullptr;
    GradientChunk<acc_t> chunk = make_chunk(&memory);
    acc_t *const grad_turned = memory, *const states = memory + state_size();
    std::vector<acc_t> u_row(width());
    std::copy_n(u + sequence.head * shape.size, shape.size, u_row.begin());
    if (!backwards) chunk.u = u_row.data();

    const int64_t length = chunk_length(end - begin, kChunk), last = begin + (end - begin - 1) / length * length;
    std::copy_n(start, state_size(), states);
    advance(sequence, chunk, begin, last, length, states, state_size());
    for (int64_t first = last; first >= begin; first -= length) {
      const acc_t* const state = states + (first - begin) / length * state_size();
      run_chunk(sequence, chunk, first, std::min(length, end - first), length, state, grad_state, grad_turned, add);
      if (!backwards) {  // the other direction, which may run at the same time, has no part in it
        for (int64_t n = 0; n < shape.size; ++n) grad_u[index * shape.size + n] += chunk.grad_u[n];
      }
    }
  }

  // `end_state` receives the state at token `end` from that at token `begin`.
  void run_states(int64_t index, bool backwards, int64_t begin, int64_t end, const acc_t* start,
                  acc_t* end_state) const {
    acc_t* memory = nullptr;
    GradientChunk<acc_t> chunk = make_chunk(&memory);
    std::copy_n(start, state_size(), end_state);
    advance(Sequence(shape, index, backwards), chunk, begin, end, chunk_length(end - begin, kChunk), end_state, 0);
  }

  // From the state at token `begin` to that at `end`, chunk by chunk, each `step` elements behind the one before.
  void advance(const Sequence& sequence, GradientChunk<acc_t>& chunk, int64_t begin, int64_t end, int64_t length,
               acc_t* state, int64_t step) const {
    for (int64_t t = begin; t < end; t += length) {
      load_keys(k, v, w, sequence, t, std::min(length, end - t), chunk);
      RowsAhead ahead = rows_ahead(chunk, length, 0, 0);
      for (const scalar_t* tensor : {k, v, w}) ask_for(ahead, tensor, sequence, t + length, shape.size);
      chunk.ahead = &ahead;
      run_for_width<StateChunk, acc_t, const Chunk<acc_t>&, const acc_t*, acc_t*>(chunk.width, chunk, state,
                                                                                  state + step);
      state += step;
    }
  }

  void run_chunk(const Sequence& sequence, GradientChunk<acc_t>& chunk, int64_t first, int64_t count, int64_t length,
                 const acc_t* state, acc_t* grad_state, acc_t* grad_turned, bool add) const {
    load_keys(k, v, w, sequence, first, count, chunk);
    load_rows(r, sequence, first, count, acc_t(0), chunk, chunk.r);
    load_rows(grad, sequence, first, count, acc_t(0), chunk, chunk.grad);
    std::fill_n(chunk.grad_u, chunk.width, acc_t(0));
    RowsAhead ahead = rows_ahead(chunk, length, 3, 6);
    for (const scalar_t* tensor : {grad, r, k, v, w}) ask_for(ahead, tensor, sequence, first - length, shape.size);
    for (const acc_t* tensor : partials) ask_for(ahead, tensor, sequence, first, shape.size);
    chunk.ahead = &ahead;
    run_for_width<BackwardChunk, acc_t, const GradientChunk<acc_t>&, const acc_t*, acc_t*, acc_t*>(
        chunk.width, chunk, state, grad_state, grad_turned);
    const acc_t* const results[] = {chunk.grad_r, chunk.grad_k, chunk.grad_v, chunk.w};
    for (int i = 0; i < 4; ++i) {
      store_share(results[i], chunk, sequence, first, count, add, partials[i], outputs[i]);
    }
  }

  // A chunk in the thread's memory; `*rest` receives room for a state, and for the states before the chunks of a block.
  GradientChunk<acc_t> make_chunk(acc_t** rest) const {
    GradientChunk<acc_t> chunk{};
    chunk.width = width();
    chunk.size = shape.size;
    constexpr int64_t kSteps = 8;  // of joining blocks, at most: log2(kChunk / kGroup)
    static_assert(kGroup << kSteps >= kChunk, "chunks are joined in more steps");
    constexpr int64_t kMost = Blocks::kBlock / kChunk + 1;  // chunks of a block
    const int64_t rows = kChunk * chunk.width, group_rows = rows / kGroup;
    acc_t* next = scratch_memory<acc_t>((10 + kSteps) * rows + (2 + kSteps) * group_rows + 2 * kChunk * kChunk +
                                        2 * chunk.width + (1 + kMost) * state_size());
    const auto take = [&next](int64_t size) { return std::exchange(next, next + size); };
    for (acc_t** part : {&chunk.r, &chunk.k, &chunk.v, &chunk.w, &chunk.grad, &chunk.r_in, &chunk.k_out, &chunk.grad_r,
                         &chunk.grad_k, &chunk.grad_v}) {
      *part = take(rows);
    }
    chunk.logs = take(group_rows);
    chunk.grad_logs = take(group_rows);
    chunk.grad_u = take(2 * chunk.width);
    chunk.weights = take(kChunk * kChunk);
    chunk.pairs = take(kChunk * kChunk);
    chunk.kept = {take(kSteps * rows), take(kSteps * group_rows)};
    std::fill_n(chunk.weights, kChunk * kChunk, acc_t(0));
    *rest = next;
    return chunk;
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void backward(const Backward<scalar_t>& call) {
  const int64_t size = call.state_size(), sequences = call.shape.sequences();
  const Blocks blocks(call.shape, true);
  std::vector<acc_t> starts(2 * sequences * blocks.count() * size), grad_states(2 * sequences * size);
  const auto start = [&](int64_t index, bool backwards, int64_t block) {
    return &starts[((2 * index + backwards) * blocks.count() + block) * size];
  };
  blocks.each_in_order([&](int64_t index, bool backwards, int64_t block) {
    if (block == blocks.count() - 1) return;
    call.run_states(index, backwards, blocks.begin(block, backwards), blocks.begin(block + 1, backwards),
                    start(index, backwards, block), start(index, backwards, block + 1));
  });
  blocks.each([&](int64_t index, bool backwards, int64_t block, bool add) {
    call.run_tokens(index, backwards, blocks.begin(block, backwards), blocks.begin(block + 1, backwards),
                    start(index, backwards, block), &grad_states[(2 * index + backwards) * size], add);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv6_backward(const Tensor& grad, const Tensor& r, const Tensor& k,
                                                                 const Tensor& v, const Tensor& w, const Tensor& u) {
  check_wkv6_backward(grad, r, k, v, w, u);
  const std::vector<Tensor> in = contiguous_all({grad, r, k, v, w, u});
  std::vector<Tensor> outputs;
  for (int i = 0; i < 4; ++i) outputs.push_back(empty_output(in[1]));
  Tensor grad_u = torch::stable::empty_like(in[5]);
  if (r.numel() == 0) {
    torch::stable::zero_(grad_u);
    return {outputs[0], outputs[1], outputs[2], outputs[3], grad_u};
  }
  const Shape shape{r.size(0), r.size(1), r.size(2), r.size(3)};
  std::vector<double> sums(shape.sequences() * shape.size, 0.0);
  dispatch_floating(r.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    Backward<scalar_t> call{shape};
    const scalar_t** const inputs[] = {&call.grad, &call.r, &call.k, &call.v, &call.w};
    for (int i = 0; i < 5; ++i) *inputs[i] = in[i].const_data_ptr<scalar_t>();
    call.u = in[5].const_data_ptr<acc_t>();
    std::vector<Tensor> partials = outputs;
    for (int i = 0; i < 4; ++i) {
      if (!std::is_same_v<scalar_t, acc_t>) partials[i] = empty_output(outputs[i], in[5].scalar_type());
      call.partials[i] = partials[i].mutable_data_ptr<acc_t>();
      call.outputs[i] = outputs[i].mutable_data_ptr<scalar_t>();
    }
    call.grad_u = sums.data();
    backward<scalar_t>(call);
    for (int64_t i = 0; i < shape.heads * shape.size; ++i) {
      double sum = 0;
      for (int64_t image = 0; image < shape.batch; ++image) sum += sums[image * shape.heads * shape.size + i];
      grad_u.mutable_data_ptr<acc_t>()[i] = static_cast<acc_t>(sum);
    }
  });
  return {outputs[0], outputs[1], outputs[2], outputs[3], grad_u};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) { m.impl("_wkv6_backward", TORCH_BOX(&vrwkv::wkv6_backward)); }
