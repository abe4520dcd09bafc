// Bi-WKV on the CPU: forward and backward over tiles of tokens and blocks of channels; see bi_wkv_cpu.h.
#include "bi_wkv_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include "../common/cpu_memory.h"
#include "bi_wkv_checks.h"
#include "bi_wkv_cpu_safe.h"

namespace vrwkv {
namespace {

// Tokens of a tile: its scratch (4 rows of kBlockBytes a token forward, 7 backward) stays in the second-level cache.
constexpr int64_t kTile = 256;
template <typename Scalar>
struct Inputs {
  using Real = Accumulate<Scalar>;
  Shape shape;
  const Channels<Real>& channels;
  const Scalar *k, *v;
  // Bound below k - reference. A member: of a maximum with a constant that it knows, GCC makes a comparison and a blend
  // instead of one instruction.
  Real lowest = ExpTraits<Real>::kLowest;

  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<Real, Bytes> row(const Scalar* tensor, const AnyItem& item, int64_t t) const {
    return read_block<Scalar, Bytes>(tensor + item.offset + t * shape.channels, item.lanes);
  }
  // e^(k - reference), with `least` the member `lowest` in all lanes
  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<Real, Bytes> weight(const AnyItem& item, int64_t t, const Lanes<Real, Bytes>& reference,
                                         const Lanes<Real, Bytes>& least) const {
    return exp_in_range(max(least, row<Bytes>(k, item, t) - reference));
  }
  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<Real, Bytes> largest_key(const AnyItem& item) const {
    auto result = Lanes<Real, Bytes>::all(std::numeric_limits<Real>::lowest());
    for (int64_t t = 0; t < item.tokens; ++t) result = max(row<Bytes>(k, item, t), result);
    return result;
  }
};

// Asks for memory ahead of its use, in the order of memory: the items of kGroup neighbouring blocks of a tile share out
// the rows of the next such group, or of the next tile.
template <typename Scalar>
class Ahead {
 public:
  Ahead(const Shape& shape, const Item& item) : channels_(shape.channels) {
    const int64_t first = item.block / kGroup * kGroup, size = std::min(kGroup, shape.blocks() - first);
    const int64_t following = first + size;
    int64_t start = item.offset + (following - item.block) * shape.lanes;
    size_ = std::min(kGroup, shape.blocks() - following);
    if (size_ == 0) {
      start = item.offset - item.block * shape.lanes + item.tokens * shape.channels;
      size_ = std::min(kGroup, shape.blocks());
    }
    const int64_t share = (item.block - first) * item.tokens * size_ / size;
    column_ = share % size_;
    offset_ = start + share / size_ * channels_;
  }
  template <typename... Tensors>
  VRWKV_INLINE void ask(const Tensors*... tensors) {
    (prefetch<Scalar>(tensors + offset_ + column_ * kLanes<Accumulate<Scalar>>), ...);
    if (++column_ == size_) {
      column_ = 0;
      offset_ += channels_;
    }
  }

 private:
  static constexpr int64_t kGroup = 12;
  int64_t channels_, size_, offset_, column_;
};

// Sums of the keys and values of each tile, towards both ends.
template <typename Scalar>
struct SumTiles {
  using Real = Accumulate<Scalar>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<Scalar>& in, Boundary<Real>* boundaries, int64_t begin, int64_t end) {
    using L = Lanes<Real, Bytes>;
    const L least = L::all(in.lowest);
    each_fast_item(in.shape, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const L mu = L::load(&in.channels.mu[item.block * kLanes<Real>]);
      const L reference = in.template largest_key<Bytes>(item);
      Sums<Real, Bytes> prefix{L::all(0), L::all(0)}, suffix = prefix;
      L decay = L::all(1);  // e^(-w t)
      Ahead<Scalar> inputs_ahead(in.shape, item);
      for (int64_t t = 0; t < item.tokens; ++t) {
        inputs_ahead.ask(in.k, in.v);
        const L e = in.template weight<Bytes>(item, t, reference, least);
        const L ev = e * in.template row<Bytes>(in.v, item, t);
        prefix.advance(mu, ev, e);
        suffix.num = suffix.num + decay * ev;
        suffix.den = suffix.den + decay * e;
        decay = decay + decay * mu;
      }
      boundaries[item.index].set(reference, prefix, suffix);
    });
  }
};

// The output of each tile from what enters it (null: nothing, there is one tile).
template <typename Scalar>
struct OutputTiles {
  using Real = Accumulate<Scalar>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<Scalar>& in, const Boundary<Real>* boundaries, Scalar* y, int64_t begin,
                               int64_t end) {
    using L = Lanes<Real, Bytes>;
    const L least = L::all(in.lowest);
    constexpr int64_t kRow = kLanes<Real>;
    const int64_t rows = in.shape.tile * kRow;
    Real* const weight = scratch_memory<Real>(4 * rows);  // e^(k - reference), and times v
    Real *const weighted = weight + rows, *const suffix_num = weighted + rows, *const suffix_den = suffix_num + rows;
    each_fast_item(in.shape, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const L mu = L::load(&in.channels.mu[item.block * kRow]), self = L::load(&in.channels.self[item.block * kRow]);
      Sums<Real, Bytes> prefix{L::all(0), L::all(0)}, suffix = prefix;
      L reference;
      if (boundaries) {
        reference = L::load(boundaries[item.index].reference);
        prefix = boundaries[item.index].template prefix<Bytes>();
        suffix = boundaries[item.index].template suffix<Bytes>();
      } else {
        reference = in.template largest_key<Bytes>(item);
      }
      Ahead<Scalar> inputs_ahead(in.shape, item), output_ahead = inputs_ahead;
      for (int64_t t = item.tokens - 1; t >= 0; --t) {
        inputs_ahead.ask(in.k, in.v);
        const L e = in.template weight<Bytes>(item, t, reference, least);
        const L ev = e * in.template row<Bytes>(in.v, item, t);
        e.store(weight + t * kRow);
        ev.store(weighted + t * kRow);
        suffix.num.store(suffix_num + t * kRow);
        suffix.den.store(suffix_den + t * kRow);
        suffix.advance(mu, ev, e);
      }
      Scalar* to = y + item.offset;
      for (int64_t t = 0; t < item.tokens; ++t, to += in.shape.channels) {
        output_ahead.ask(y);
        const L e = L::load(weight + t * kRow), ev = L::load(weighted + t * kRow);
        const L num = (prefix.num + L::load(suffix_num + t * kRow)) + self * ev;
        const L den = (prefix.den + L::load(suffix_den + t * kRow)) + self * e;
        prefix.advance(mu, ev, e);
        write_block<Scalar, Bytes>(num / den, to, item.lanes);
      }
    });
  }
};

// Backward. With g the gradient of y, N and D the numerator and denominator of y, a = g / D and b = a y:
//   A_i = sum_{t != i} e^(-(|t-i|-1) w) a_t + e^u a_i, B likewise of b,
//   dv_i = e^k_i A_i,  dk_i = e^k_i (v_i A_i - B_i),  du = sum_t e^(u + k_t) (v_t a_t - b_t),
//   dw = -e^-w sum_t (P_t . (SA_t, -SB_t) + S_t . (PA_t, -PB_t)),
// where PA, SA, PB, SB are the exclusive prefix and suffix sums of a and b, relative to e^-reference.
template <typename Scalar>
struct BackwardTiles {
  using Real = Accumulate<Scalar>;

  // Memory for one tile. The second sweep replaces prefix sums by a and b.
  struct Scratch {
    Real *weight, *a, *b, *suffix_num, *suffix_den, *sum_a, *sum_b;
    explicit Scratch(int64_t rows) {
      Real* next = scratch_memory<Real>(7 * rows);
      for (Real** part : {&weight, &a, &b, &suffix_num, &suffix_den, &sum_a, &sum_b}) {
        *part = next;
        next += rows;
      }
    }
  };

  // `entering` (null: one tile) are the sums of keys and values that enter each tile. Where `leaving` is given, only
  // the sums of a and b that leave each tile are computed; else `entering_ab` are those that enter, and the gradients
  // follow.
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<Scalar>& in, const Scalar* g, const Boundary<Real>* entering,
                               const Boundary<Real>* entering_ab, Boundary<Real>* leaving, Scalar* dk, Scalar* dv,
                               double* partials, int64_t begin, int64_t end) {
    using L = Lanes<Real, Bytes>;
    const L least = L::all(in.lowest);
    constexpr int64_t kRow = kLanes<Real>;
    const Scratch scratch(in.shape.tile * kRow);
    const L zero = L::all(0);
    each_fast_item(in.shape, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const L mu = L::load(&in.channels.mu[item.block * kRow]), self = L::load(&in.channels.self[item.block * kRow]);
      Sums<Real, Bytes> prefix{zero, zero}, suffix = prefix, prefix_ab = prefix, suffix_ab = prefix;
      L reference;
      if (entering) {
        reference = L::load(entering[item.index].reference);
        prefix = entering[item.index].template prefix<Bytes>();
        suffix = entering[item.index].template suffix<Bytes>();
      } else {
        reference = in.template largest_key<Bytes>(item);
      }
      if (entering_ab) {
        prefix_ab = entering_ab[item.index].template prefix<Bytes>();
        suffix_ab = entering_ab[item.index].template suffix<Bytes>();
      }

      Ahead<Scalar> inputs_ahead(in.shape, item), gradient_ahead = inputs_ahead, outputs_ahead = inputs_ahead;
      for (int64_t t = 0, row = 0; t < item.tokens; ++t, row += kRow) {
        inputs_ahead.ask(in.k, in.v);
        const L e = in.template weight<Bytes>(item, t, reference, least);
        e.store(scratch.weight + row);
        prefix.num.store(scratch.a + row);
        prefix.den.store(scratch.b + row);
        prefix.advance(mu, e * in.template row<Bytes>(in.v, item, t), e);
      }

      L dw = zero, du = zero;
      for (int64_t t = item.tokens - 1, row = t * kRow; t >= 0; --t, row -= kRow) {
        gradient_ahead.ask(g);
        const L e = L::load(scratch.weight + row), value = in.template row<Bytes>(in.v, item, t);
        const L num_term = e * value;
        const L prefix_num = L::load(scratch.a + row), prefix_den = L::load(scratch.b + row);
        const L inverse = L::all(1) / ((prefix_den + suffix.den) + self * e);
        const L y = ((prefix_num + suffix.num) + self * num_term) * inverse;
        const L a = in.template row<Bytes>(g, item, t) * inverse, b = a * y;
        a.store(scratch.a + row);
        b.store(scratch.b + row);
        if (!leaving) {
          suffix.num.store(scratch.suffix_num + row);
          suffix.den.store(scratch.suffix_den + row);
          (suffix_ab.num + self * a).store(scratch.sum_a + row);
          (suffix_ab.den + self * b).store(scratch.sum_b + row);
          dw = dw + (prefix_num * suffix_ab.num - prefix_den * suffix_ab.den);
          du = du + self * e * (value * a - b);
        }
        suffix.advance(mu, num_term, e);
        suffix_ab.advance(mu, a, b);
      }

      for (int64_t t = 0, row = 0; t < item.tokens; ++t, row += kRow) {
        const L a = L::load(scratch.a + row), b = L::load(scratch.b + row);
        if (!leaving) {
          const L e = L::load(scratch.weight + row), value = in.template row<Bytes>(in.v, item, t);
          dw = dw +
               (L::load(scratch.suffix_num + row) * prefix_ab.num - L::load(scratch.suffix_den + row) * prefix_ab.den);
          const L sum_a = L::load(scratch.sum_a + row) + prefix_ab.num;
          const L sum_b = L::load(scratch.sum_b + row) + prefix_ab.den;
          const int64_t to = item.offset + t * in.shape.channels;
          outputs_ahead.ask(dk, dv);
          write_block<Scalar, Bytes>(e * (value * sum_a - sum_b), dk + to, item.lanes);
          write_block<Scalar, Bytes>(e * sum_a, dv + to, item.lanes);
        }
        prefix_ab.advance(mu, a, b);
      }
      if (leaving) {
        leaving[item.index].set(zero - reference, prefix_ab, suffix_ab);
        return;
      }
      for (int64_t lane = 0; lane < kRow; ++lane) {
        const Real* dw_lane = reinterpret_cast<const Real*>(&dw);
        const Real* du_lane = reinterpret_cast<const Real*>(&du);
        partials[2 * item.index * kRow + lane] =
            -(1 + double(in.channels.mu[item.block * kRow + lane])) * dw_lane[lane];
        partials[(2 * item.index + 1) * kRow + lane] = du_lane[lane];
      }
    });
  }
};

// Run the kernel for the best instruction set over all items, in parallel. Which thread takes an item changes nothing.
template <typename Kernel, typename... Args>
void run_items(const Shape& shape, Args... args) {
  static const auto function = Dispatch<Kernel, Args..., int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, shape.items(), 1, [&](int64_t begin, int64_t end) { function(args..., begin, end); });
}

template <typename Real>
void merge_all(const Shape& shape, const Channels<Real>& channels, bool own_reference, Boundary<Real>* boundaries) {
  static const auto function =
      Dispatch<MergeTiles<Real>, const Shape&, const Channels<Real>&, bool, Boundary<Real>*, int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, shape.batch * shape.blocks(), 1, [&](int64_t begin, int64_t end) {
    function(shape, channels, own_reference, boundaries, begin, end);
  });
}

// The sums that enter each tile; null where one tile holds all tokens.
template <typename Scalar, typename Real = Accumulate<Scalar>>
std::unique_ptr<Boundary<Real>[]> entering_sums(const Inputs<Scalar>& in) {
  if (in.shape.tiles() == 1) return nullptr;
  std::unique_ptr<Boundary<Real>[]> boundaries(new Boundary<Real>[in.shape.items()]);
  run_items<SumTiles<Scalar>, const Inputs<Scalar>&, Boundary<Real>*>(in.shape, in, boundaries.get());
  merge_all(in.shape, in.channels, false, boundaries.get());
  return boundaries;
}

// Call function(batch, channel) in parallel for the channels of every block that is not fast.
template <typename Real, typename Function>
void each_safe_channel(const Shape& shape, const Channels<Real>& channels, const Function& function) {
  if (!channels.any_safe()) return;
  torch::stable::parallel_for(0, shape.batch * shape.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!channels.fast[i % shape.channels / shape.lanes]) function(i / shape.channels, i % shape.channels);
    }
  });
}

template <typename Scalar, typename Real = Accumulate<Scalar>>
void forward(Shape shape, const Real* w, const Real* u, const Scalar* k, const Scalar* v, Scalar* y) {
  shape.lanes = kLanes<Real>;
  shape.tile = std::min(shape.tokens, kTile);
  const Channels<Real> channels(shape, w, u);
  const Inputs<Scalar> in{shape, channels, k, v};
  const auto entering = entering_sums(in);
  run_items<OutputTiles<Scalar>, const Inputs<Scalar>&, const Boundary<Real>*, Scalar*>(shape, in, entering.get(), y);
  each_safe_channel(shape, channels, [&](int64_t batch, int64_t channel) {
    const int64_t offset = batch * shape.tokens * shape.channels + channel;
    safe::forward(shape.tokens, shape.channels, double(w[channel]), double(u[channel]), k + offset, v + offset,
                  y + offset);
  });
}

template <typename Scalar, typename Real = Accumulate<Scalar>>
void backward(Shape shape, const Scalar* g, const Real* w, const Real* u, const Scalar* k, const Scalar* v, Real* dw,
              Real* du, Scalar* dk, Scalar* dv) {
  shape.lanes = kLanes<Real>;
  shape.tile = std::min(shape.tokens, kTile);
  const Channels<Real> channels(shape, w, u);
  const Inputs<Scalar> in{shape, channels, k, v};
  const auto entering = entering_sums(in);
  std::unique_ptr<Boundary<Real>[]> entering_ab;
  std::vector<double> partials(2 * shape.items() * shape.lanes, 0.0);  // of dw and du per item
  const auto run = [&](const Boundary<Real>* ab, Boundary<Real>* leaving) {
    run_items<BackwardTiles<Scalar>, const Inputs<Scalar>&, const Scalar*, const Boundary<Real>*, const Boundary<Real>*,
              Boundary<Real>*, Scalar*, Scalar*, double*>(shape, in, g, entering.get(), ab, leaving, dk, dv,
                                                          partials.data());
  };
  if (entering) {
    entering_ab.reset(new Boundary<Real>[shape.items()]);
    run(nullptr, entering_ab.get());
    merge_all(shape, channels, true, entering_ab.get());
  }
  run(entering_ab.get(), nullptr);
  each_safe_channel(shape, channels, [&](int64_t batch, int64_t channel) {
    const int64_t offset = batch * shape.tokens * shape.channels + channel;
    const int64_t item = batch * shape.tiles() * shape.blocks() + channel / shape.lanes;
    double* partial = &partials[2 * item * shape.lanes + channel % shape.lanes];
    safe::backward(shape.tokens, shape.channels, double(w[channel]), double(u[channel]), g + offset, k + offset,
                   v + offset, partial, partial + shape.lanes, dk + offset, dv + offset);
  });

  for (int64_t c = 0; c < shape.channels; ++c) {
    double sums[2] = {0, 0};
    for (int64_t row = 0; row < shape.batch * shape.tiles(); ++row) {
      const int64_t item = row * shape.blocks() + c / shape.lanes;
      for (int i = 0; i < 2; ++i) sums[i] += partials[(2 * item + i) * shape.lanes + c % shape.lanes];
    }
    dw[c] = static_cast<Real>(sums[0]);
    du[c] = static_cast<Real>(sums[1]);
  }
}

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_bi_wkv("bi_wkv", w, u, k, v);
  const Tensor w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor y = empty_output(k_);
  if (k_.numel() == 0) return y;
  const Shape shape{k_.size(0), k_.size(1), k_.size(2), 0, 0};
  THO_DISPATCH_V2(k_.scalar_type(), "bi_wkv", AT_WRAP([&] {
                    using Real = Accumulate<scalar_t>;
                    forward<scalar_t>(shape, w_.const_data_ptr<Real>(), u_.const_data_ptr<Real>(),
                                      k_.const_data_ptr<scalar_t>(), v_.const_data_ptr<scalar_t>(),
                                      y.mutable_data_ptr<scalar_t>());
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bi_wkv_backward(const Tensor& grad, const Tensor& w, const Tensor& u,
                                                           const Tensor& k, const Tensor& v) {
  check_bi_wkv("_bi_wkv_backward", w, u, k, v);
  check_same("_bi_wkv_backward", "grad", grad, "k", k);
  const Tensor g = contiguous(grad), w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor dw = torch::stable::empty_like(w_), du = torch::stable::empty_like(u_);
  Tensor dk = empty_output(k_), dv = empty_output(k_);
  if (k_.numel() == 0) {
    torch::stable::zero_(dw);
    torch::stable::zero_(du);
    return {dw, du, dk, dv};
  }
  const Shape shape{k_.size(0), k_.size(1), k_.size(2), 0, 0};
  THO_DISPATCH_V2(k_.scalar_type(), "bi_wkv_backward", AT_WRAP([&] {
                    using Real = Accumulate<scalar_t>;
                    backward<scalar_t>(
                        shape, g.const_data_ptr<scalar_t>(), w_.const_data_ptr<Real>(), u_.const_data_ptr<Real>(),
                        k_.const_data_ptr<scalar_t>(), v_.const_data_ptr<scalar_t>(), dw.mutable_data_ptr<Real>(),
                        du.mutable_data_ptr<Real>(), dk.mutable_data_ptr<scalar_t>(), dv.mutable_data_ptr<scalar_t>());
                  }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
  return {dw, du, dk, dv};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) {
  m.impl("bi_wkv", TORCH_BOX(&vrwkv::bi_wkv));
  m.impl("_bi_wkv_backward", TORCH_BOX(&vrwkv::bi_wkv_backward));
}
