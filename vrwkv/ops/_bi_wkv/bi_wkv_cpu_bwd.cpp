// Bi-WKV on the CPU, backward. With g the gradient of y, N and D the numerator and denominator of y, a = g / D and
// b = a y:
//   A_i = sum_{t != i} e^(-(|t-i|-1) w) a_t + e^u a_i, B likewise of b,
//   grad_v_i = e^k_i A_i,  grad_k_i = e^k_i (v_i A_i - B_i),  grad_u = sum_t e^(u + k_t) (v_t a_t - b_t),
//   grad_w = -e^-w sum_t (P_t . (SA_t, -SB_t) + S_t . (PA_t, -PB_t)),
// where PA, SA, PB, SB are the exclusive prefix and suffix sums of a and b, relative to e^-reference.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../common/cpu_memory.h"
#include "bi_wkv_checks.h"
#include "bi_wkv_cpu_safe.h"
#include "bi_wkv_cpu_sums.h"

namespace vrwkv {
namespace {

// Memory for one tile: of each token a row. a and b take the place of the prefix sums that they are computed from.
template <typename acc_t>
struct Scratch {
  acc_t *weight, *a, *b, *suffix_num, *suffix_den, *sum_a, *sum_b;
  explicit Scratch(int64_t rows) {
    acc_t* next = scratch_memory<acc_t>(7 * rows);
    for (acc_t** part : {&weight, &a, &b, &suffix_num, &suffix_den, &sum_a, &sum_b}) {
      *part = next;
      next += rows;
    }
  }
};

// What both passes do with one tile, or one token of it.
template <typename scalar_t, int Bytes>
struct Tile {
  using acc_t = accumulate_t<scalar_t>;
  using L = Lanes<acc_t, Bytes>;
  static constexpr int64_t kRow = kLanes<acc_t>;
  struct Token {
    L e, v, ev, prefix_num, prefix_den, a, b;
  };

  const Inputs<scalar_t>& in;
  const scalar_t* grad;
  const Scratch<acc_t>& scratch;
  L growth, bonus, least;

  VRWKV_INLINE Tile(const Inputs<scalar_t>& in, const scalar_t* grad, const Scratch<acc_t>& scratch, int64_t block)
      : in(in),
        grad(grad),
        scratch(scratch),
        growth(L::load(&in.channels.growth[block * kRow])),
        bonus(L::load(&in.channels.bonus[block * kRow])),
        least(L::all(in.lowest)) {}

  // Weights and prefix sums into the scratch.
  template <typename AnyItem>
  VRWKV_INLINE void store_prefixes(const AnyItem& item, const L& reference, Sum<acc_t, Bytes> prefix) const {
    Ahead<scalar_t> inputs_ahead(in.tiling, item);
    for (int64_t t = 0, row = 0; t < item.tokens; ++t, row += kRow) {
      inputs_ahead.ask(in.k, in.v);
      const L e = in.template weight<Bytes>(item, t, reference, least);
      e.store(scratch.weight + row);
      prefix.num.store(scratch.a + row);
      prefix.den.store(scratch.b + row);
      prefix.advance(growth, e * in.template row<Bytes>(in.v, item, t), e);
    }
  }

  // a and b of token t, into the scratch too.
  template <typename AnyItem>
  VRWKV_INLINE Token find_ab(const AnyItem& item, int64_t t, int64_t row, const Sum<acc_t, Bytes>& suffix) const {
    const L e = L::load(scratch.weight + row), v = in.template row<Bytes>(in.v, item, t);
    const L ev = e * v;
    const L prefix_num = L::load(scratch.a + row), prefix_den = L::load(scratch.b + row);
    const L inverse = L::all(1) / ((prefix_den + suffix.den) + bonus * e);
    const L y = ((prefix_num + suffix.num) + bonus * ev) * inverse;
    const L a = in.template row<Bytes>(grad, item, t) * inverse, b = a * y;
    a.store(scratch.a + row);
    b.store(scratch.b + row);
    return {e, v, ev, prefix_num, prefix_den, a, b};
  }
};

// Sums of a and b of each tile, towards both ends, from the sums of keys and values that enter it.
template <typename scalar_t>
struct SumAbTiles {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<scalar_t>& in, const scalar_t* grad, const TileSums<acc_t>* entering,
                               TileSums<acc_t>* leaving, int64_t begin, int64_t end) {
    using L = Lanes<acc_t, Bytes>;
    constexpr int64_t kRow = kLanes<acc_t>;
    const Scratch<acc_t> scratch(in.tiling.tile * kRow);
    const L zero = L::all(0);
    each_fast_item(in.tiling, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const Tile<scalar_t, Bytes> tile(in, grad, scratch, item.block);
      auto [reference, prefix, suffix] = Start<acc_t, Bytes>(in, entering, item);
      tile.store_prefixes(item, reference, prefix);

      Ahead<scalar_t> gradient_ahead(in.tiling, item);
      Sum<acc_t, Bytes> prefix_ab{zero, zero}, suffix_ab = prefix_ab;
      for (int64_t t = item.tokens - 1, row = t * kRow; t >= 0; --t, row -= kRow) {
        gradient_ahead.ask(grad);
        const auto token = tile.find_ab(item, t, row, suffix);
        suffix.advance(tile.growth, token.ev, token.e);
        suffix_ab.advance(tile.growth, token.a, token.b);
      }
      for (int64_t row = 0; row < item.tokens * kRow; row += kRow) {
        prefix_ab.advance(tile.growth, L::load(scratch.a + row), L::load(scratch.b + row));
      }
      leaving[item.index].set(zero - reference, prefix_ab, suffix_ab);
    });
  }
};

// The gradients of each tile, from what enters it: sums of keys and values, and of a and b (null: there is one tile).
// `partials` receives the shares of grad_w and grad_u, (items, 2, lanes).
template <typename scalar_t>
struct BackwardTiles {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<scalar_t>& in, const scalar_t* grad, const TileSums<acc_t>* entering,
                               const TileSums<acc_t>* entering_ab, scalar_t* grad_k, scalar_t* grad_v, double* partials,
                               int64_t begin, int64_t end) {
    using L = Lanes<acc_t, Bytes>;
    constexpr int64_t kRow = kLanes<acc_t>;
    const Scratch<acc_t> scratch(in.tiling.tile * kRow);
    const L zero = L::all(0);
    each_fast_item(in.tiling, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const Tile<scalar_t, Bytes> tile(in, grad, scratch, item.block);
      auto [reference, prefix, suffix] = Start<acc_t, Bytes>(in, entering, item);
      tile.store_prefixes(item, reference, prefix);
      Sum<acc_t, Bytes> prefix_ab{zero, zero}, suffix_ab = prefix_ab;
      if (entering_ab) {
        prefix_ab = entering_ab[item.index].template prefix<Bytes>();
        suffix_ab = entering_ab[item.index].template suffix<Bytes>();
      }

      Ahead<scalar_t> gradient_ahead(in.tiling, item), outputs_ahead = gradient_ahead;
      L grad_w = zero, grad_u = zero;
      for (int64_t t = item.tokens - 1, row = t * kRow; t >= 0; --t, row -= kRow) {
        gradient_ahead.ask(grad);
        const auto token = tile.find_ab(item, t, row, suffix);
        suffix.num.store(scratch.suffix_num + row);
        suffix.den.store(scratch.suffix_den + row);
        (suffix_ab.num + tile.bonus * token.a).store(scratch.sum_a + row);
        (suffix_ab.den + tile.bonus * token.b).store(scratch.sum_b + row);
        grad_w = grad_w + (token.prefix_num * suffix_ab.num - token.prefix_den * suffix_ab.den);
        grad_u = grad_u + tile.bonus * token.e * (token.v * token.a - token.b);
        suffix.advance(tile.growth, token.ev, token.e);
        suffix_ab.advance(tile.growth, token.a, token.b);
      }

      for (int64_t t = 0, row = 0; t < item.tokens; ++t, row += kRow) {
        const L a = L::load(scratch.a + row), b = L::load(scratch.b + row);
        const L e = L::load(scratch.weight + row), v = in.template row<Bytes>(in.v, item, t);
        grad_w = grad_w + (L::load(scratch.suffix_num + row) * prefix_ab.num -
                           L::load(scratch.suffix_den + row) * prefix_ab.den);
        const L sum_a = L::load(scratch.sum_a + row) + prefix_ab.num;
        const L sum_b = L::load(scratch.sum_b + row) + prefix_ab.den;
        const int64_t to = item.offset + t * in.tiling.channels;
        outputs_ahead.ask(grad_k, grad_v);
        write_block<scalar_t, Bytes>(e * (v * sum_a - sum_b), grad_k + to, item.lanes);
        write_block<scalar_t, Bytes>(e * sum_a, grad_v + to, item.lanes);
        prefix_ab.advance(tile.growth, a, b);
      }
      for (int64_t lane = 0; lane < kRow; ++lane) {
        const double decay = 1 + double(in.channels.growth[item.block * kRow + lane]);
        partials[2 * item.index * kRow + lane] = -decay * reinterpret_cast<const acc_t*>(&grad_w)[lane];
        partials[(2 * item.index + 1) * kRow + lane] = reinterpret_cast<const acc_t*>(&grad_u)[lane];
      }
    });
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void backward(const Tiling& tiling, const scalar_t* grad, const acc_t* w, const acc_t* u, const scalar_t* k,
              const scalar_t* v, acc_t* grad_w, acc_t* grad_u, scalar_t* grad_k, scalar_t* grad_v) {
  const Channels<acc_t> channels(tiling, w, u);
  const Inputs<scalar_t> in{tiling, channels, k, v};
  const auto entering = entering_sums(in);
  std::unique_ptr<TileSums<acc_t>[]> entering_ab;
  if (entering) {
    entering_ab.reset(new TileSums<acc_t>[tiling.items()]);
    run_items<SumAbTiles<scalar_t>, const Inputs<scalar_t>&, const scalar_t*, const TileSums<acc_t>*, TileSums<acc_t>*>(
        tiling, in, grad, entering.get(), entering_ab.get());
    merge_tiles(tiling, channels, true, entering_ab.get());
  }
  std::vector<double> partials(2 * tiling.items() * tiling.lanes, 0.0);
  run_items<BackwardTiles<scalar_t>, const Inputs<scalar_t>&, const scalar_t*, const TileSums<acc_t>*,
            const TileSums<acc_t>*, scalar_t*, scalar_t*, double*>(tiling, in, grad, entering.get(), entering_ab.get(),
                                                                   grad_k, grad_v, partials.data());
  each_safe_channel(tiling, channels, [&](int64_t image, int64_t channel) {
    const int64_t offset = image * tiling.tokens * tiling.channels + channel;
    const int64_t item = image * tiling.tiles() * tiling.blocks() + channel / tiling.lanes;
    double* partial = &partials[2 * item * tiling.lanes + channel % tiling.lanes];
    safe::backward(tiling.tokens, tiling.channels, double(w[channel]), double(u[channel]), grad + offset, k + offset,
                   v + offset, partial, partial + tiling.lanes, grad_k + offset, grad_v + offset);
  });

  for (int64_t c = 0; c < tiling.channels; ++c) {
    double sums[2] = {0, 0};
    for (int64_t row = 0; row < tiling.batch * tiling.tiles(); ++row) {
      const int64_t item = row * tiling.blocks() + c / tiling.lanes;
      for (int i = 0; i < 2; ++i) sums[i] += partials[(2 * item + i) * tiling.lanes + c % tiling.lanes];
    }
    grad_w[c] = static_cast<acc_t>(sums[0]);
    grad_u[c] = static_cast<acc_t>(sums[1]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bi_wkv_backward(const Tensor& grad, const Tensor& w, const Tensor& u,
                                                           const Tensor& k, const Tensor& v) {
  check_bi_wkv_backward(grad, w, u, k, v);
  const Tensor grad_ = contiguous(grad), w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor grad_w = torch::stable::empty_like(w_), grad_u = torch::stable::empty_like(u_);
  Tensor grad_k = empty_output(k_), grad_v = empty_output(k_);
  if (k_.numel() == 0) {
    torch::stable::zero_(grad_w);
    torch::stable::zero_(grad_u);
    return {grad_w, grad_u, grad_k, grad_v};
  }
  dispatch_floating(k_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    backward<scalar_t>(make_tiling<acc_t>(k_.size(0), k_.size(1), k_.size(2)), grad_.const_data_ptr<scalar_t>(),
                       w_.const_data_ptr<acc_t>(), u_.const_data_ptr<acc_t>(), k_.const_data_ptr<scalar_t>(),
                       v_.const_data_ptr<scalar_t>(), grad_w.mutable_data_ptr<acc_t>(),
                       grad_u.mutable_data_ptr<acc_t>(), grad_k.mutable_data_ptr<scalar_t>(),
                       grad_v.mutable_data_ptr<scalar_t>());
  });
  return {grad_w, grad_u, grad_k, grad_v};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) { m.impl("_bi_wkv_backward", TORCH_BOX(&vrwkv::bi_wkv_backward)); }
