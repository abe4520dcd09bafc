// The RWKV-6 recurrence on the CPU, forward: from chunk to chunk with the state, in either direction.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "wkv6_checks.h"
#include "wkv6_cpu_states.h"

namespace vrwkv {
namespace {

// Tokens: of a chunk the weights take a part of the time that grows with it, a state of 64 x 64 takes the same for any.
constexpr int64_t kForwardChunk = 16;

// The outputs of a chunk, in the place of w, and the state behind it. `past`: the state is not zero, `future`: it has a
// use. kWidth: the width of the chunk, 0 for any.
template <typename acc_t, int64_t kWidth>
struct ForwardChunk {
  template <int Bytes>
  static VRWKV_INLINE void run(const Chunk<acc_t>& chunk, acc_t* state, bool past, bool future) {
    using L = Lanes<acc_t, Bytes>;
    const int64_t width = kWidth ? kWidth : chunk.width;
    weigh_tokens<acc_t, Bytes, false>(chunk, width, {});

    acc_t* const y = chunk.w;
    const Matrix<acc_t> r_in{chunk.r_in, width, 1}, v{chunk.v, width, 1}, weights{chunk.weights, kChunk, 1};
    const Matrix<acc_t> before{state, width, 1}, keys{chunk.k_out, 1, width};
    each_product<acc_t, Bytes>(
        chunk.tokens, width, [&](auto product, int64_t i, int64_t j) __attribute__((always_inline)) {
          chunk.ahead->ask();
          product.clear();
          if (past) product.add(r_in.from(i, 0), before.from(0, j), chunk.size);
          product.add(weights.from(i, 0), v.from(0, j), std::min(i + product.kRows, chunk.tokens));
          product.store(y + i * width + j, width);
        });
    if (!future) return;

    acc_t* const growth = chunk.logs;
    for (int64_t n = 0; n < width; n += kLanes<acc_t>) decay_of(L::load(growth + n)).minus_one.store(growth + n);
    each_product<acc_t, Bytes>(
        round_up(chunk.size, 4), width, [&](auto product, int64_t n, int64_t j) __attribute__((always_inline)) {
          chunk.ahead->ask();
          product.clear();
          product.add(keys.from(n, 0), v.from(0, j), chunk.tokens);
          product.each([&](int64_t row, int64_t column, const L& sum) __attribute__((always_inline)) {
            acc_t* const at = state + (n + row) * width + j + column;
            const L before = L::load(at);
            // So that no rounding of the decay grows with the number of chunks.
            (before + (before * L::all(growth[n + row]) + sum)).store(at);
          });
        });
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct Forward {
  Shape shape;
  const scalar_t *r, *k, *v, *w;
  const acc_t* u;
  acc_t* partial;  // outputs of one direction; y where that has their type
  scalar_t* y;

  void run_tokens(const Sequence& sequence, int64_t begin, int64_t end, acc_t* state, bool add) const {
    Chunk<acc_t> chunk = make_chunk();
    std::vector<acc_t> u_row(chunk.width);
    std::copy_n(u + sequence.head * shape.size, shape.size, u_row.begin());
    if (!sequence.backwards) chunk.u = u_row.data();
    const int64_t length = chunk_length(end - begin, kForwardChunk);
    for (int64_t first = begin; first < end; first += length) {
      const int64_t count = std::min(length, end - first);
      load_keys(k, v, w, sequence, first, count, chunk);
      load_rows(r, sequence, first, count, acc_t(0), chunk, chunk.r);
      RowsAhead ahead = rows_ahead(chunk, length, 1, 1);
      for (const scalar_t* tensor : {r, k, v, w}) ask_for(ahead, tensor, sequence, first + length, shape.size);
      ask_for(ahead, partial, sequence, first, shape.size);
      chunk.ahead = &ahead;
      run_for_width<ForwardChunk, acc_t, const Chunk<acc_t>&, acc_t*, bool, bool>(chunk.width, chunk, state, first > 0,
                                                                                  first + count < shape.tokens);
      store_share(chunk.w, chunk, sequence, first, count, add, partial, y);
    }
  }

  Chunk<acc_t> make_chunk() const {
    Chunk<acc_t> chunk{};
    chunk.width = row_width<acc_t>(shape);
    chunk.size = shape.size;
    const int64_t rows = kChunk * chunk.width;
    acc_t* next = scratch_memory<acc_t>(4 * rows + rows / kGroup + kChunk * kChunk);
    for (acc_t** part : {&chunk.r, &chunk.k, &chunk.v, &chunk.w}) {
      *part = next;
      next += rows;
    }
    chunk.r_in = chunk.r;
    chunk.k_out = chunk.k;
    chunk.logs = next;
    chunk.weights = next + rows / kGroup;
    std::fill_n(chunk.weights, kChunk * kChunk, acc_t(0));
    return chunk;
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward(const Forward<scalar_t>& call) {
  const int64_t sequences = call.shape.sequences(), width = row_width<acc_t>(call.shape);
  const Blocks blocks(call.shape, false);
  std::vector<acc_t> states(2 * sequences * width * width);
  blocks.each([&](int64_t index, bool backwards, int64_t block, bool add) {
    call.run_tokens(Sequence(call.shape, index, backwards), blocks.begin(block, backwards),
                    blocks.begin(block + 1, backwards), &states[(2 * index + backwards) * width * width], add);
  });
}

Tensor wkv6(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u) {
  check_wkv6("wkv6", r, k, v, w, u);
  const Tensor r_ = contiguous(r), k_ = contiguous(k), v_ = contiguous(v), w_ = contiguous(w), u_ = contiguous(u);
  Tensor y = empty_output(r_);
  if (r_.numel() == 0) return y;
  const Shape shape{r_.size(0), r_.size(1), r_.size(2), r_.size(3)};
  dispatch_floating(r_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const Tensor partial = std::is_same_v<scalar_t, acc_t> ? y : empty_output(y, u_.scalar_type());
    forward<scalar_t>({shape, r_.const_data_ptr<scalar_t>(), k_.const_data_ptr<scalar_t>(),
                       v_.const_data_ptr<scalar_t>(), w_.const_data_ptr<scalar_t>(), u_.const_data_ptr<acc_t>(),
                       partial.mutable_data_ptr<acc_t>(), y.mutable_data_ptr<scalar_t>()});
  });
  return y;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) { m.impl("wkv6", TORCH_BOX(&vrwkv::wkv6)); }
