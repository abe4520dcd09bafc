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

#include "../cpu_simd.h"

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

// Rows of one item as accumulator values: the tensor itself where it can be read in place, else a copy padded by zeros.
template <typename Real>
struct Rows {
  Real* data;
  int64_t stride;
  VRWKV_INLINE Real* operator[](int64_t t) const { return data + t * stride; }
};

template <typename Scalar>
constexpr bool kInPlace = std::is_same_v<Scalar, Accumulate<Scalar>>;

template <typename Scalar, typename Real = Accumulate<Scalar>>
VRWKV_INLINE Rows<const Real> read_rows(const Scalar* tensor, const Shape& shape, const Item& item, Real* scratch) {
  const Scalar* from = tensor + item.offset;
  if constexpr (kInPlace<Scalar>) {
    if (item.lanes == shape.lanes) return {from, shape.channels};
  }
  for (int64_t t = 0; t < item.tokens; ++t) {
    for (int64_t c = 0; c < item.lanes; ++c) scratch[t * shape.lanes + c] = from[t * shape.channels + c];
    for (int64_t c = item.lanes; c < shape.lanes; ++c) scratch[t * shape.lanes + c] = 0;
  }
  return {scratch, shape.lanes};
}

// Where an item's output rows are computed: in place, or in scratch that write_rows then copies.
template <typename Scalar, typename Real = Accumulate<Scalar>>
VRWKV_INLINE Rows<Real> output_rows(Scalar* tensor, const Shape& shape, const Item& item, Real* scratch) {
  if constexpr (kInPlace<Scalar>) {
    if (item.lanes == shape.lanes) return {tensor + item.offset, shape.channels};
  }
  return {scratch, shape.lanes};
}

template <typename Scalar, typename Real = Accumulate<Scalar>>
VRWKV_INLINE void write_rows(const Rows<Real>& rows, Scalar* tensor, const Shape& shape, const Item& item) {
  Scalar* to = tensor + item.offset;
  if constexpr (kInPlace<Scalar>) {
    if (rows.data == to) return;
  }
  for (int64_t t = 0; t < item.tokens; ++t) {
    for (int64_t c = 0; c < item.lanes; ++c) to[t * shape.channels + c] = static_cast<Scalar>(rows[t][c]);
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

// Sums of many tiles of one channel, with their log-scale: a running maximum of the scales that went in.
struct Carry {
  double num = 0, den = 0, scale = std::numeric_limits<double>::lowest();

  void advance(double decay, double num_term, double den_term, double term_scale) {
    const double kept = scale - decay;
    scale = std::max(kept, term_scale);
    const double keep = std::exp(kept - scale), add = std::exp(term_scale - scale);
    num = num * keep + num_term * add;
    den = den * keep + den_term * add;
  }
};

// Turn what every tile of one (batch, block) hands out into what it receives. `own_reference`: keep each tile's
// reference (the backward), else raise it to the largest scale that enters.
template <typename Real>
void merge_tiles(const Shape& shape, const Channels<Real>& channels, int64_t batch, int64_t block, bool own_reference,
                 Boundary<Real>* boundaries) {
  const int64_t tiles = shape.tiles();
  std::vector<Carry> entering(tiles);
  for (int64_t lane = 0; lane < std::min(shape.lanes, shape.channels - block * shape.lanes); ++lane) {
    const double w = channels.w[block * shape.lanes + lane];
    const auto boundary = [&](int64_t tile) -> Boundary<Real>& {
      return boundaries[(batch * tiles + tile) * shape.blocks() + block];
    };
    const auto decay = [&](int64_t tile) { return w * std::min(shape.tile, shape.tokens - tile * shape.tile); };
    Carry prefix, suffix;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Boundary<Real>& out = boundary(tile);
      entering[tile] = prefix;
      prefix.advance(decay(tile), out.prefix_num[lane], out.prefix_den[lane], out.reference[lane]);
    }
    for (int64_t tile = tiles - 1; tile >= 0; --tile) {
      Boundary<Real>& in = boundary(tile);
      const Carry next = suffix, &before = entering[tile];
      suffix.advance(decay(tile), in.suffix_num[lane], in.suffix_den[lane], in.reference[lane]);
      if (!own_reference) {
        in.reference[lane] = static_cast<Real>(std::max({double(in.reference[lane]), before.scale, next.scale}));
      }
      const double from_before = std::exp(before.scale - in.reference[lane]);
      const double from_next = std::exp(next.scale - in.reference[lane]);
      in.prefix_num[lane] = static_cast<Real>(before.num * from_before);
      in.prefix_den[lane] = static_cast<Real>(before.den * from_before);
      in.suffix_num[lane] = static_cast<Real>(next.num * from_next);
      in.suffix_den[lane] = static_cast<Real>(next.den * from_next);
    }
  }
}

}  // namespace vrwkv
