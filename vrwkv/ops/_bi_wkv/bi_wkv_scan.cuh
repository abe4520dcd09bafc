// The arithmetic of Bi-WKV's scans: sums of e^(k_i - distance * w) (v_i, 1) over tokens, and of the pairs (a_t, b_t) of
// the backward pass.
//
// A sum that leaves a tile has a scale of its own: it is relative to e^(key - gap * w), the weight of one token (`key`)
// as seen from `gap` steps away. Two scales are compared exactly whatever their size, so merging stays right for keys
// of 1e4 and decays of 1e3 a step. Inside a tile the sums of a channel are relative to one reference (bi_wkv_fast.cuh)
// unless its decay or bonus is too steep: then every sum is scaled anew on its way (SafeScan).
#pragma once

#include "../common/cuda_utils.cuh"

namespace vrwkv {
namespace {

// Log-weight of nothing: its exponential is zero beside any weight, and differences of two of them are not NaN.
constexpr float kEmpty = -1e30f;

// Largest |w| * tile + |u| of sums relative to one reference, the largest log-weight in the tile. What underflows
// beside it (e^-87) then has no share in any sum: a denominator lies above e^-2*slope, and the product of two sums of
// the backward pass below e^4*slope. Keys may lie as far apart as they like.
constexpr float kMaxSlope = 16;

// What is constant along the tokens of a channel.
template <typename acc_t>
struct Channel {
  acc_t w, u;

  // Whether one reference does for tiles of `tokens`; false for NaN.
  __device__ __forceinline__ bool is_gentle(int tokens) const { return fabs(w) * tokens + fabs(u) <= kMaxSlope; }
};

// A numerator and a denominator, or sums of a and b, whose scale is known elsewhere.
template <typename acc_t>
struct alignas(2 * sizeof(acc_t)) Sum {
  acc_t num, den;

  __device__ __forceinline__ Sum scaled(acc_t factor) const { return {num * factor, den * factor}; }
  __device__ __forceinline__ Sum plus(const Sum& other) const { return {num + other.num, den + other.den}; }
  // decay * this + term
  __device__ __forceinline__ Sum advanced(acc_t decay, const Sum& term) const {
    return {fma(decay, num, term.num), fma(decay, den, term.den)};
  }
  // Added to `before`, what tokens and sums of a and b give to the gradients of w and u where they meet.
  __device__ __forceinline__ acc_t product(const Sum& ab, acc_t before) const {
    return fma(-den, ab.den, fma(num, ab.num, before));
  }
};

template <typename acc_t>
struct alignas(16) ScaledSum {
  acc_t num, den, key, gap;
};

template <typename acc_t>
__device__ __forceinline__ ScaledSum<acc_t> nothing() {
  return {0, 0, kEmpty, 0};
}

// (key - base) - gap * w. What rounding takes from key - base is added back and gap * w is not rounded, so that large
// terms which cancel leave an exact difference.
template <typename acc_t>
__device__ __forceinline__ acc_t exponent(acc_t key, acc_t base, acc_t gap, acc_t w) {
  const acc_t difference = key - base;
  const acc_t back = difference - key;
  const acc_t lost = (key - (difference - back)) - (base + back);
  return fma(-gap, w, difference) + lost;
}

template <typename acc_t>
__device__ __forceinline__ ScaledSum<acc_t> merge(const ScaledSum<acc_t>& a, const ScaledSum<acc_t>& b, acc_t w) {
  const acc_t ahead = exponent(a.key, b.key, a.gap - b.gap, w);
  const acc_t smaller = exponential(-fabs(ahead));
  const bool at_b = ahead < 0;
  const acc_t of_a = at_b ? smaller : acc_t(1), of_b = at_b ? acc_t(1) : smaller;
  return {a.num * of_a + b.num * of_b, a.den * of_a + b.den * of_b, at_b ? b.key : a.key, at_b ? b.gap : a.gap};
}

// A sum relative to e^reference.
template <typename acc_t>
__device__ __forceinline__ Sum<acc_t> relative_to(acc_t reference, const ScaledSum<acc_t>& s, acc_t w) {
  return Sum<acc_t>{s.num, s.den}.scaled(exponential(exponent(s.key, reference, s.gap, w)));
}

// Sums whose scale follows them.
template <typename acc_t>
struct SafeScan {
  using Sum = ScaledSum<acc_t>;

  acc_t w, u;

  __device__ __forceinline__ explicit SafeScan(const Channel<acc_t>& channel) : w(channel.w), u(channel.u) {}

  __device__ __forceinline__ Sum added(const Sum& a, const Sum& b) const { return merge(a, b, w); }
  // e^-w s + term
  __device__ __forceinline__ Sum advanced(Sum s, const Sum& term) const {
    s.gap += 1;
    return merge(s, term, w);
  }

  __device__ __forceinline__ Sum token(acc_t key, acc_t v) const { return {v, 1, key, 0}; }

  // What a token adds to itself: e^u s, with what rounding takes from key + u moved into the sums.
  __device__ __forceinline__ Sum own(const Sum& s) const {
    const acc_t key = s.key + u, back = key - s.key;
    const acc_t factor = exponential((s.key - (key - back)) + (u - back));
    return {s.num * factor, s.den * factor, key, s.gap};
  }
  // Numerator and denominator of y.
  __device__ __forceinline__ Sum total(const Sum& prefix, const Sum& suffix, acc_t key, acc_t v) const {
    return added(added(prefix, suffix), own(token(key, v)));
  }

  // a = grad / D and b = a y, with D the denominator of y.
  __device__ __forceinline__ Sum ab(const Sum& total, acc_t grad) const {
    const acc_t a = grad / total.den;
    return {a, a * (total.num / total.den), -total.key, -total.gap};
  }
  // e^key times the scale of the sum `ab`.
  __device__ __forceinline__ acc_t scale(acc_t key, const Sum& ab) const {
    return exponential(exponent(key, -ab.key, ab.gap, w));
  }
  // e^-w (r + s), the sum over split points for the gradient of w.
  __device__ __forceinline__ Sum split(const Sum& r, const Sum& s) const {
    Sum sum = added(r, s);
    sum.gap += 1;
    return sum;
  }
  __device__ __forceinline__ acc_t product(const Sum& r, const Sum& ab) const {
    return (r.num * ab.num - r.den * ab.den) * exponential(exponent(r.key, -ab.key, r.gap + ab.gap, w));
  }
};

}  // namespace
}  // namespace vrwkv
