// The arithmetic of Bi-WKV's scans: sums of e^(k_i - distance * w) (v_i, 1) over tokens, and of the pairs (a_t, b_t) of
// the backward pass.
//
// A sum that leaves a segment has a scale of its own: it is relative to e^(key - gap * w), the weight of one token
// (`key`) as seen from `gap` steps away. Two scales are compared exactly whatever their size, so merging stays right
// for keys of 1e4 and decays of 1e3 a step. Inside a segment there are two ways with one interface: FastScan, relative
// to one reference, where a segment's weights fit into the range of the type, and SafeScan, which scales every sum anew
// on its way.
#pragma once

#include "../common/cuda_utils.cuh"

namespace vrwkv {
namespace {

// Log-weight of nothing: its exponential is zero beside any weight, and differences of two of them are not NaN.
constexpr float kEmpty = -1e30f;

// A segment is fast while the log-weights of its tokens lie less than this below its reference. Then weights and
// gradients, which are divided by sums of weights, stay within e^(+-64), and what underflows (e^-87) does not matter.
constexpr float kFastRange = 32;

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

// What is constant along the tokens of a channel.
template <typename acc_t>
struct Channel {
  acc_t w, u;
};

// A reference for a segment, as large as its largest key and what enters it.
template <typename acc_t>
__device__ __forceinline__ acc_t reference_of(acc_t largest_key, const ScaledSum<acc_t>& before,
                                              const ScaledSum<acc_t>& after, acc_t w) {
  return fmax(largest_key, fmax(before.key - before.gap * w, after.key - after.gap * w));
}

// Sums of keys and values relative to e^reference, those of a and b to e^-reference. growth = e^-w - 1, bonus = e^u.
template <typename acc_t>
struct FastScan {
  static constexpr bool kFast = true;
  struct Sum {
    acc_t num, den;
  };

  acc_t w, growth, bonus, reference;

  __device__ __forceinline__ FastScan(const Channel<acc_t>& channel, acc_t reference)
      : w(channel.w), growth(expm1(-channel.w)), bonus(exponential(channel.u)), reference(reference) {}

  __device__ __forceinline__ Sum zero() const { return {0, 0}; }
  __device__ __forceinline__ Sum scaled(const Sum& s, acc_t factor) const { return {s.num * factor, s.den * factor}; }
  __device__ __forceinline__ Sum added(const Sum& a, const Sum& b) const { return {a.num + b.num, a.den + b.den}; }

  // e^-w s + term. Adding (e^-w - 1) s has no rounded factor near one whose error would grow with the distance.
  __device__ __forceinline__ Sum advanced(const Sum& s, const Sum& term) const {
    return {s.num + fma(growth, s.num, term.num), s.den + fma(growth, s.den, term.den)};
  }

  __device__ __forceinline__ Sum enter(const ScaledSum<acc_t>& s) const {
    return scaled({s.num, s.den}, exponential(exponent(s.key, reference, s.gap, w)));
  }
  __device__ __forceinline__ ScaledSum<acc_t> leave(const Sum& s) const { return {s.num, s.den, reference, 0}; }

  __device__ __forceinline__ Sum token(acc_t key, acc_t v) const {
    const acc_t weight = exponential(key - reference);
    return {weight * v, weight};
  }

  // Numerator and denominator of y.
  __device__ __forceinline__ Sum total(const Sum& prefix, const Sum& suffix, acc_t key, acc_t v) const {
    const Sum own = token(key, v);
    return {fma(bonus, own.num, prefix.num + suffix.num), fma(bonus, own.den, prefix.den + suffix.den)};
  }

  // a = grad / D and b = a y, with D the denominator of y.
  __device__ __forceinline__ Sum ab(const Sum& total, acc_t grad) const {
    const acc_t inverse = reciprocal(total.den), a = grad * inverse;
    return {a, a * (total.num * inverse)};
  }
  __device__ __forceinline__ ScaledSum<acc_t> leave_ab(const Sum& s) const { return {s.num, s.den, -reference, 0}; }

  __device__ __forceinline__ Sum enter_ab(const ScaledSum<acc_t>& s) const {
    return scaled({s.num, s.den}, exponential(exponent(s.key, -reference, s.gap, w)));
  }

  // What a token adds to itself: e^u (a, b).
  __device__ __forceinline__ Sum own(const Sum& ab) const { return scaled(ab, bonus); }
  // e^key times the scale of the sum `ab`.
  __device__ __forceinline__ acc_t scale(acc_t key, const Sum&) const { return exponential(key - reference); }

  // e^-w (r + s), the sum over split points for the gradient of w.
  __device__ __forceinline__ Sum split(const Sum& r, const Sum& s) const {
    const Sum sum = added(r, s);
    return advanced(sum, zero());
  }
  __device__ __forceinline__ acc_t product(const Sum& r, const Sum& ab) const {
    return r.num * ab.num - r.den * ab.den;
  }
};

template <typename acc_t>
struct SafeScan {
  static constexpr bool kFast = false;
  using Sum = ScaledSum<acc_t>;

  acc_t w, u;

  __device__ __forceinline__ explicit SafeScan(const Channel<acc_t>& channel) : w(channel.w), u(channel.u) {}

  __device__ __forceinline__ Sum zero() const { return nothing<acc_t>(); }
  __device__ __forceinline__ Sum added(const Sum& a, const Sum& b) const { return merge(a, b, w); }
  __device__ __forceinline__ Sum advanced(Sum s, const Sum& term) const {
    s.gap += 1;
    return merge(s, term, w);
  }

  __device__ __forceinline__ Sum enter(const ScaledSum<acc_t>& s) const { return s; }
  __device__ __forceinline__ ScaledSum<acc_t> leave(const Sum& s) const { return s; }
  __device__ __forceinline__ Sum token(acc_t key, acc_t v) const { return {v, 1, key, 0}; }

  // e^u s, with what rounding takes from key + u moved into the sums.
  __device__ __forceinline__ Sum own(const Sum& s) const {
    const acc_t key = s.key + u, back = key - s.key;
    const acc_t factor = exponential((s.key - (key - back)) + (u - back));
    return {s.num * factor, s.den * factor, key, s.gap};
  }
  __device__ __forceinline__ Sum total(const Sum& prefix, const Sum& suffix, acc_t key, acc_t v) const {
    return added(added(prefix, suffix), own(token(key, v)));
  }

  __device__ __forceinline__ Sum ab(const Sum& total, acc_t grad) const {
    const acc_t a = grad / total.den;
    return {a, a * (total.num / total.den), -total.key, -total.gap};
  }
  __device__ __forceinline__ ScaledSum<acc_t> leave_ab(const Sum& s) const { return s; }
  __device__ __forceinline__ Sum enter_ab(const ScaledSum<acc_t>& s) const { return s; }

  __device__ __forceinline__ acc_t scale(acc_t key, const Sum& ab) const {
    return exponential(exponent(key, -ab.key, ab.gap, w));
  }
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
