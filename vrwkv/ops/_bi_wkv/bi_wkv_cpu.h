// Parts that the forward and the backward CPU kernel of Bi-WKV share.
//
// The token axis is cut into tiles that stay in cache, the channels into blocks of lanes. Within a tile every sum is
// relative to one reference exponent per channel, so each element costs one exp per pass. P is the exclusive prefix
// sum, S the exclusive suffix sum, each a numerator and a denominator:
//   P_{t+1} = e^-w P_t + e^(k_t - reference) (v_t, 1),   S_{t-1} = e^-w S_t + e^(k_t - reference) (v_t, 1).
// A block in which a channel's decay or bonus is too steep for that (kMaxSlope) is computed token by token in double
// precision with a running maximum instead (bi_wkv_cpu_safe.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../common/cpu_convert.h"

namespace vrwkv {

// Largest |w| * tile and |u| of the fast path. A denominator then lies above e^-2*slope, and the product of two sums of
// the backward below e^4*slope, inside the range of the type.
template <typename Real>
constexpr Real kMaxSlope = sizeof(Real) == 4 ? Real(16) : Real(150);

// Sizes of one call: token axis in tiles of `tile` tokens, channels in blocks of kLanes.
struct Shape {
  int64_t batch, tokens, channels, lanes, tile;
  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  int64_t blocks() const { return (channels + lanes - 1) / lanes; }
  int64_t items() const { return batch * tiles() * blocks(); }
};

// One tile of one block of channels; items are numbered with the block running fastest.
struct Item {
  int64_t index, batch, tile, block, tokens, lanes, offset;  // offset: of its first element in a (B, T, C) tensor
  Item(const Shape& shape, int64_t index)
      : index(index),
        batch(index / (shape.tiles() * shape.blocks())),
        tile(index / shape.blocks() % shape.tiles()),
        block(index % shape.blocks()),
        tokens(std::min(shape.tile, shape.tokens - tile * shape.tile)),
        lanes(std::min(shape.lanes, shape.channels - block * shape.lanes)),
        offset((batch * shape.tokens + tile * shape.tile) * shape.channels + block * shape.lanes) {}
};

// An item of a whole block: its loops are compiled without the padding of read_block and write_block.
template <typename Real>
struct WholeItem : Item {
  static constexpr int64_t lanes = kLanes<Real>;
};

// What is constant along the tokens, padded to whole blocks: mu = e^-w - 1, self = e^u, and which blocks are fast.
template <typename Real>
struct Channels {
  std::vector<Real> mu, self;
  std::vector<double> w;
  std::vector<char> fast;

  Channels(const Shape& shape, const Real* decay, const Real* bonus)
      : mu(shape.blocks() * shape.lanes), self(mu.size(), 1), w(mu.size()), fast(shape.blocks(), true) {
    const int64_t span = std::min(shape.tile, shape.tokens);
    for (int64_t c = 0; c < shape.channels; ++c) {
      w[c] = decay[c];
      mu[c] = std::expm1(-decay[c]);
      self[c] = std::exp(bonus[c]);
      // Written so that NaN takes the safe path.
      const bool gentle = std::abs(decay[c]) * span <= kMaxSlope<Real> && std::abs(bonus[c]) <= kMaxSlope<Real>;
      if (!gentle) fast[c / shape.lanes] = false;
    }
  }
  bool any_safe() const { return std::find(fast.begin(), fast.end(), false) != fast.end(); }
};

// Call function(item) for the items whose block is fast.
template <typename Real, typename Function>
VRWKV_INLINE void each_fast_item(const Shape& shape, const Channels<Real>& channels, int64_t begin, int64_t end,
                                 const Function& function) {
  for (int64_t index = begin; index < end; ++index) {
    const Item item(shape, index);
    if (!channels.fast[item.block]) continue;
    if (item.lanes == kLanes<Real>) {
      function(WholeItem<Real>{item});
    } else {
      function(item);
    }
  }
}

// Memory of one thread for the tiles it works on, kept from call to call.
template <typename Real>
Real* scratch_memory(int64_t size) {
  thread_local std::vector<Real> memory;
  constexpr int64_t kAlign = 64 / sizeof(Real);
  if (static_cast<int64_t>(memory.size()) < size + kAlign) memory.resize(size + kAlign);
  return memory.data() + (-(reinterpret_cast<uintptr_t>(memory.data()) / sizeof(Real)) & (kAlign - 1));
}

// The sums of one direction in a tile: a numerator and a denominator, or the two scans of the backward.
template <typename Real, int Bytes>
struct Sums {
  Lanes<Real, Bytes> num, den;

  // One step: sums * e^-w + term, as sums + (sums * mu + term), so that no rounding of e^-w grows with the steps.
  VRWKV_INLINE void advance(const Lanes<Real, Bytes>& mu, const Lanes<Real, Bytes>& num_term,
                            const Lanes<Real, Bytes>& den_term) {
    num = num + (num * mu + num_term);
    den = den + (den * mu + den_term);
  }
};

// What a tile hands to the others, and after merge_tiles what it receives from them, per lane: the sums that leave it
// towards later (prefix) and earlier (suffix) tokens, then those that enter it, all relative to e^reference.
template <typename Real>
struct Boundary {
  Real reference[kLanes<Real>];
  Real prefix_num[kLanes<Real>], prefix_den[kLanes<Real>];
  Real suffix_num[kLanes<Real>], suffix_den[kLanes<Real>];

  template <int Bytes>
  VRWKV_INLINE void set(const Lanes<Real, Bytes>& scale, const Sums<Real, Bytes>& prefix,
                        const Sums<Real, Bytes>& suffix) {
    scale.store(reference);
    prefix.num.store(prefix_num);
    prefix.den.store(prefix_den);
    suffix.num.store(suffix_num);
    suffix.den.store(suffix_den);
  }
  template <int Bytes>
  VRWKV_INLINE Sums<Real, Bytes> prefix() const {
    return {Lanes<Real, Bytes>::load(prefix_num), Lanes<Real, Bytes>::load(prefix_den)};
  }
  template <int Bytes>
  VRWKV_INLINE Sums<Real, Bytes> suffix() const {
    return {Lanes<Real, Bytes>::load(suffix_num), Lanes<Real, Bytes>::load(suffix_den)};
  }
};

// Sums of many tiles, with their log-scale: a running maximum of the scales that went in.
template <int Bytes>
struct Carry {
  using L = Lanes<double, Bytes>;
  L num, den, scale;

  static VRWKV_INLINE Carry none() { return {L::all(0), L::all(0), L::all(std::numeric_limits<double>::lowest())}; }
  VRWKV_INLINE void advance(const L& decay, const L& num_term, const L& den_term, const L& term_scale) {
    const L kept = scale - decay;
    scale = max(kept, term_scale);
    const L keep = exp(kept - scale), add = exp(term_scale - scale);
    num = num * keep + num_term * add;
    den = den * keep + den_term * add;
  }
};

// Turn what every tile of one (batch, block) hands out into what it receives. `own_reference`: keep each tile's
// reference (the backward), else raise it to the largest scale that enters.
template <typename Real>
struct MergeTiles {
  template <int Bytes>
  static VRWKV_INLINE void run(const Shape& shape, const Channels<Real>& channels, bool own_reference,
                               Boundary<Real>* boundaries, int64_t begin, int64_t end) {
    using L = Lanes<double, Bytes>;
    constexpr int kStep = kLanes<double>;
    const int64_t tiles = shape.tiles();
    // Aligned for any vector: scratch_memory begins on 64 bytes.
    Carry<Bytes>* const entering =
        reinterpret_cast<Carry<Bytes>*>(scratch_memory<double>(tiles * int64_t(sizeof(Carry<Bytes>) / sizeof(double))));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / shape.blocks(), block = i % shape.blocks();
      if (!channels.fast[block]) continue;
      for (int lane = 0; lane < kLanes<Real>; lane += kStep) {
        const auto at = [&](int64_t tile) -> Boundary<Real>& {
          return boundaries[(batch * tiles + tile) * shape.blocks() + block];
        };
        const auto decay = [&](int64_t tile) {
          const double tokens = std::min(shape.tile, shape.tokens - tile * shape.tile);
          return L::load(&channels.w[block * shape.lanes + lane]) * L::all(tokens);
        };
        auto prefix = Carry<Bytes>::none(), suffix = prefix;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const Boundary<Real>& out = at(tile);
          entering[tile] = prefix;
          prefix.advance(decay(tile), widen<Bytes>(out.prefix_num + lane), widen<Bytes>(out.prefix_den + lane),
                         widen<Bytes>(out.reference + lane));
        }
        for (int64_t tile = tiles - 1; tile >= 0; --tile) {
          Boundary<Real>& in = at(tile);
          const Carry<Bytes> after = suffix, before = entering[tile];
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
  static VRWKV_INLINE Lanes<double, Bytes> widen(const Real* from) {
    double values[kLanes<double>];
    for (int i = 0; i < kLanes<double>; ++i) values[i] = from[i];
    return Lanes<double, Bytes>::load(values);
  }
  template <int Bytes>
  static VRWKV_INLINE void narrow(const Lanes<double, Bytes>& lanes, Real* to) {
    double values[kLanes<double>];
    lanes.store(values);
    for (int i = 0; i < kLanes<double>; ++i) to[i] = static_cast<Real>(values[i]);
  }
};

}  // namespace vrwkv
