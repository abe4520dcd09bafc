// The sums of Bi-WKV on the CPU: within a tile, and what tiles hand to each other.
//
// Within a tile every sum is relative to one reference exponent per channel, so each element costs one exp per pass.
// P is the exclusive prefix sum, S the exclusive suffix sum, each a numerator and a denominator:
//   P_{t+1} = e^-w P_t + e^(k_t - reference) (v_t, 1),   S_{t-1} = e^-w S_t + e^(k_t - reference) (v_t, 1).
#pragma once

#include <memory>

#include "bi_wkv_cpu_tile.h"

namespace vrwkv {

// The sum of one direction in a tile: a numerator and a denominator, or the a and b of the backward.
template <typename acc_t, int Bytes>
struct Sum {
  Lanes<acc_t, Bytes> num, den;

  // One step: sum * e^-w + term, as sum + (sum * growth + term), so that no rounding of e^-w grows with the steps.
  VRWKV_INLINE void advance(const Lanes<acc_t, Bytes>& growth, const Lanes<acc_t, Bytes>& num_term,
                            const Lanes<acc_t, Bytes>& den_term) {
    num = num + (num * growth + num_term);
    den = den + (den * growth + den_term);
  }
};

// What a tile hands to the others, and after MergeTiles what it receives from them, per lane: the sums that leave it
// towards later (prefix) and earlier (suffix) tokens, then those that enter it, all relative to e^reference.
template <typename acc_t>
struct TileSums {
  acc_t reference[kLanes<acc_t>];
  acc_t prefix_num[kLanes<acc_t>], prefix_den[kLanes<acc_t>];
  acc_t suffix_num[kLanes<acc_t>], suffix_den[kLanes<acc_t>];

  template <int Bytes>
  VRWKV_INLINE void set(const Lanes<acc_t, Bytes>& scale, const Sum<acc_t, Bytes>& prefix,
                        const Sum<acc_t, Bytes>& suffix) {
    scale.store(reference);
    prefix.num.store(prefix_num);
    prefix.den.store(prefix_den);
    suffix.num.store(suffix_num);
    suffix.den.store(suffix_den);
  }
  template <int Bytes>
  VRWKV_INLINE Sum<acc_t, Bytes> prefix() const {
    return {Lanes<acc_t, Bytes>::load(prefix_num), Lanes<acc_t, Bytes>::load(prefix_den)};
  }
  template <int Bytes>
  VRWKV_INLINE Sum<acc_t, Bytes> suffix() const {
    return {Lanes<acc_t, Bytes>::load(suffix_num), Lanes<acc_t, Bytes>::load(suffix_den)};
  }
};

// Sums of many tiles, with a scale of their own: relative to e^scale, a running maximum of the scales that went in.
template <int Bytes>
struct ScaledSum {
  using L = Lanes<double, Bytes>;
  L num, den, scale;

  static VRWKV_INLINE ScaledSum none() { return {L::all(0), L::all(0), L::all(std::numeric_limits<double>::lowest())}; }
  VRWKV_INLINE void advance(const L& decay, const L& num_term, const L& den_term, const L& term_scale) {
    const L kept = scale - decay;
    scale = max(kept, term_scale);
    const L keep = exp(kept - scale), add = exp(term_scale - scale);
    num = num * keep + num_term * add;
    den = den * keep + den_term * add;
  }
};

// Sums of the keys and values of each tile, towards both ends.
template <typename scalar_t>
struct SumTiles {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Inputs<scalar_t>& in, TileSums<acc_t>* leaving, int64_t begin, int64_t end) {
    using L = Lanes<acc_t, Bytes>;
    const L least = L::all(in.lowest);
    each_fast_item(in.tiling, in.channels, begin, end, [&](const auto& item) __attribute__((always_inline)) {
      const L growth = L::load(&in.channels.growth[item.block * kLanes<acc_t>]);
      const L reference = in.template largest_key<Bytes>(item);
      Sum<acc_t, Bytes> prefix{L::all(0), L::all(0)}, suffix = prefix;
      L decay = L::all(1);  // e^(-w t)
      Ahead<scalar_t> inputs_ahead(in.tiling, item);
      for (int64_t t = 0; t < item.tokens; ++t) {
        inputs_ahead.ask(in.k, in.v);
        const L e = in.template weight<Bytes>(item, t, reference, least);
        const L ev = e * in.template row<Bytes>(in.v, item, t);
        prefix.advance(growth, ev, e);
        suffix.num = suffix.num + decay * ev;
        suffix.den = suffix.den + decay * e;
        decay = decay + decay * growth;
      }
      leaving[item.index].set(reference, prefix, suffix);
    });
  }
};

// Turn what every tile of one (image, block) hands out into what it receives. `own_reference`: keep each tile's
// reference (the sums of a and b), else raise it to the largest scale that enters.
template <typename acc_t>
struct MergeTiles {
  template <int Bytes>
  static VRWKV_INLINE void run(const Tiling& tiling, const Channels<acc_t>& channels, bool own_reference,
                               TileSums<acc_t>* sums, int64_t begin, int64_t end) {
    using L = Lanes<double, Bytes>;
    constexpr int kStep = kLanes<double>;
    const int64_t tiles = tiling.tiles();
    // Aligned for any vector: scratch_memory begins on 64 bytes.
    ScaledSum<Bytes>* const entering = reinterpret_cast<ScaledSum<Bytes>*>(
        scratch_memory<double>(tiles * int64_t(sizeof(ScaledSum<Bytes>) / sizeof(double))));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / tiling.blocks(), block = i % tiling.blocks();
      if (!channels.fast[block]) continue;
      for (int lane = 0; lane < kLanes<acc_t>; lane += kStep) {
        const auto at = [&](int64_t tile) -> TileSums<acc_t>& {
          return sums[(image * tiles + tile) * tiling.blocks() + block];
        };
        const auto decay = [&](int64_t tile) {
          const double tokens = std::min(tiling.tile, tiling.tokens - tile * tiling.tile);
          return L::load(&channels.w[block * tiling.lanes + lane]) * L::all(tokens);
        };
        auto prefix = ScaledSum<Bytes>::none(), suffix = prefix;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const TileSums<acc_t>& out = at(tile);
          entering[tile] = prefix;
          prefix.advance(decay(tile), widen<Bytes>(out.prefix_num + lane), widen<Bytes>(out.prefix_den + lane),
                         widen<Bytes>(out.reference + lane));
        }
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
          TileSums<acc_t>& in = at(tile);
          const ScaledSum<Bytes> after = suffix, before = entering[tile];
          L reference = widen<Bytes>(in.reference + lane);
          suffix.advance(decay(tile), widen<Bytes>(in.suffix_num + lane), widen<Bytes>(in.suffix_den + lane),
                         reference);
          if (!own_reference) {
            narrow(max(reference, max(before.scale, after.scale)), in.reference + lane);
            reference = widen<Bytes>(in.reference + lane);  // as the tile will read it
          }
          const L from_before = exp(before.scale - reference), from_after = exp(after.scale - reference);
          narrow(before.num * from_before, in.prefix_num + lane);
          narrow(before.den * from_before, in.prefix_den + lane);
          narrow(after.num * from_after, in.suffix_num + lane);
          narrow(after.den * from_after, in.suffix_den + lane);
        }
      }
    }
  }

  template <int Bytes>
  static VRWKV_INLINE Lanes<double, Bytes> widen(const acc_t* from) {
    double values[kLanes<double>];
    for (int i = 0; i < kLanes<double>; ++i) values[i] = from[i];
    return Lanes<double, Bytes>::load(values);
  }
  template <int Bytes>
  static VRWKV_INLINE void narrow(const Lanes<double, Bytes>& lanes, acc_t* to) {
    double values[kLanes<double>];
    lanes.store(values);
    for (int i = 0; i < kLanes<double>; ++i) to[i] = static_cast<acc_t>(values[i]);
  }
};

template <typename acc_t>
void merge_tiles(const Tiling& tiling, const Channels<acc_t>& channels, bool own_reference, TileSums<acc_t>* sums) {
  static const auto function = Dispatch<MergeTiles<acc_t>, const Tiling&, const Channels<acc_t>&, bool,
                                        TileSums<acc_t>*, int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, tiling.batch * tiling.blocks(), 1, [&](int64_t begin, int64_t end) {
    function(tiling, channels, own_reference, sums, begin, end);
  });
}

// The sums that enter each tile; null where one tile holds all tokens.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
std::unique_ptr<TileSums<acc_t>[]> entering_sums(const Inputs<scalar_t>& in) {
  if (in.tiling.tiles() == 1) return nullptr;
  std::unique_ptr<TileSums<acc_t>[]> sums(new TileSums<acc_t>[in.tiling.items()]);
  run_items<SumTiles<scalar_t>, const Inputs<scalar_t>&, TileSums<acc_t>*>(in.tiling, in, sums.get());
  merge_tiles(in.tiling, in.channels, false, sums.get());
  return sums;
}

// Where a tile starts: the reference of its sums, and what enters it from either side.
template <typename acc_t, int Bytes>
struct Start {
  Lanes<acc_t, Bytes> reference;
  Sum<acc_t, Bytes> prefix, suffix;

  template <typename scalar_t, typename AnyItem>
  VRWKV_INLINE Start(const Inputs<scalar_t>& in, const TileSums<acc_t>* entering, const AnyItem& item) {
    if (entering) {
      reference = Lanes<acc_t, Bytes>::load(entering[item.index].reference);
      prefix = entering[item.index].template prefix<Bytes>();
      suffix = entering[item.index].template suffix<Bytes>();
    } else {
      reference = in.template largest_key<Bytes>(item);
      prefix = suffix = {Lanes<acc_t, Bytes>::all(0), Lanes<acc_t, Bytes>::all(0)};
    }
  }
};

}  // namespace vrwkv
