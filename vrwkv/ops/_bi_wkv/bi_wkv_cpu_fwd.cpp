// Bi-WKV on the CPU, forward: over tiles of tokens (bi_wkv_cpu_tile.h), from the sums that enter them
// (bi_wkv_cpu_sums.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../common/cpu_memory.h"
#include "bi_wkv_checks.h"
#include "bi_wkv_cpu_safe.h"
#include "bi_wkv_cpu_sums.h"

namespace vrwkv {
namespace {

// The output of each tile from what enters it (null: nothing, there is one tile).
template <typename scalar_t>
struct ForwardTiles {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<scalar_t>& in, const TileSums<acc_t>* entering, scalar_t* y, int64_t begin,
                               int64_t end) {
    using L = Lanes<acc_t, Bytes>;
    const L least = L::all(in.lowest);
    constexpr int64_t kRow = kLanes<acc_t>;
    const int64_t rows = in.tiling.tile * kRow;
    acc_t* const weight = scratch_memory<acc_t>(4 * rows);  // e^(k - reference), and times v
    acc_t *const weighted = weight + rows, *const suffix_num = weighted + rows, *const suffix_den = suffix_num + rows;
    each_fast_item(in.tiling, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const L growth = L::load(&in.channels.growth[item.block * kRow]);
      const L bonus = L::load(&in.channels.bonus[item.block * kRow]);
      auto [reference, prefix, suffix] = Start<acc_t, Bytes>(in, entering, item);
      Ahead<scalar_t> inputs_ahead(in.tiling, item), output_ahead = inputs_ahead;
      for (int64_t t = item.tokens - 1; t >= 0; --t) {
        inputs_ahead.ask(in.k, in.v);
        const L e = in.template weight<Bytes>(item, t, reference, least);
        const L ev = e * in.template row<Bytes>(in.v, item, t);
        e.store(weight + t * kRow);
        ev.store(weighted + t * kRow);
        suffix.num.store(suffix_num + t * kRow);
        suffix.den.store(suffix_den + t * kRow);
        suffix.advance(growth, ev, e);
      }
      scalar_t* to = y + item.offset;
      for (int64_t t = 0; t < item.tokens; ++t, to += in.tiling.channels) {
        output_ahead.ask(y);
        const L e = L::load(weight + t * kRow), ev = L::load(weighted + t * kRow);
        const L num = (prefix.num + L::load(suffix_num + t * kRow)) + bonus * ev;
        const L den = (prefix.den + L::load(suffix_den + t * kRow)) + bonus * e;
        prefix.advance(growth, ev, e);
        write_block<scalar_t, Bytes>(num / den, to, item.lanes);
      }
    });
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void forward(const Tiling& tiling, const acc_t* w, const acc_t* u, const scalar_t* k, const scalar_t* v, scalar_t* y) {
  const Channels<acc_t> channels(tiling, w, u);
  const Inputs<scalar_t> in{tiling, channels, k, v};
  const auto entering = entering_sums(in);
  run_items<ForwardTiles<scalar_t>, const Inputs<scalar_t>&, const TileSums<acc_t>*, scalar_t*>(tiling, in,
                                                                                                entering.get(), y);
  each_safe_channel(tiling, channels, [&](int64_t image, int64_t channel) {
    const int64_t offset = image * tiling.tokens * tiling.channels + channel;
    safe::forward(tiling.tokens, tiling.channels, double(w[channel]), double(u[channel]), k + offset, v + offset,
                  y + offset);
  });
}

Tensor bi_wkv(const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_bi_wkv("bi_wkv", w, u, k, v);
  const Tensor w_ = contiguous(w), u_ = contiguous(u), k_ = contiguous(k), v_ = contiguous(v);
  Tensor y = empty_output(k_);
  if (k_.numel() == 0) return y;
  dispatch_floating(k_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    forward<scalar_t>(make_tiling<acc_t>(k_.size(0), k_.size(1), k_.size(2)), w_.const_data_ptr<acc_t>(),
                      u_.const_data_ptr<acc_t>(), k_.const_data_ptr<scalar_t>(), v_.const_data_ptr<scalar_t>(),
                      y.mutable_data_ptr<scalar_t>());
  });
  return y;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) { m.impl("bi_wkv", TORCH_BOX(&vrwkv::bi_wkv)); }
