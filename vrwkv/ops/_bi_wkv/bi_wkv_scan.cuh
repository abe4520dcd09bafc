// The arithmetic of Bi-WKV's scans: sums of e^(k_i - distance * w) (v_i, 1) over tokens, and of the pairs (a_t, b_t) of
// the backward pass.
//
// A sum that leaves a segment is anchored: it is relative to e^(key - gap * w), the weight of one token (`key`) as seen
// from `gap` steps away. Two anchors are compared exactly whatever their size, so merging stays right for keys of 1e4
// and decays of 1e3 a step. Inside a segment there are two ways with one interface: FastScan, relative to one
// reference, where a segment's weights fit into the range of the type, and SafeScan, which anchors every sum on its
// way.
#pragma once

#include "../common/cuda_utils.cuh"

namespace vrwkv {
namespace {

// Log-weight of nothing: its exponential is zero beside any weight, and differences of two of them are not NaN.
constexpr float kEmpty = -1e30f;

// A segment is fast while the log-weights of its tokens lie less than this below its reference. Then weights and
// gradients, which are divided by sums of weights, stay within e^(+-64), and what underflows (e^-87) does not matter.
constexpr float kFastRange = 32;

template <typename T>
struct alignas(16) Anchored {
  T n, d, key, gap;
};

template <typename T>
__device__ __forceinline__ Anchored<T> nothing() {
  return {0, 0, kEmpty, 0};
}

// (key - base) - gap * w. What rounding takes from key - base is added back and gap * w is not rounded, so that large
// terms which cancel leave an exact difference.
template <typename T>
__device__ __forceinline__ T exponent(T key, T base, T gap, T w) {
  const T difference = key - base;
  const T back = difference - key;
  const T lost = (key - (difference - back)) - (base + back);
  return fma(-gap, w, difference) + lost;
}

template <typename T>
__device__ __forceinline__ Anchored<T> merge(const Anchored<T>& a, const Anchored<T>& b, T w) {
  const T ahead = exponent(a.key, b.key, a.gap - b.gap, w);
  const T smaller = exponential(-fabs(ahead));
  const bool at_b = ahead < 0;
  const T of_a = at_b ? smaller : T(1), of_b = at_b ? T(1) : smaller;
  return {a.n * of_a + b.n * of_b, a.d * of_a + b.d * of_b, at_b ? b.key : a.key, at_b ? b.gap : a.gap};
}

// Decay and bonus of one channel.
template <typename T>
struct Channel {
  T w, u;
};

// A reference for a segment, as large as its largest key and what enters it.
template <typename T>
__device__ __forceinline__ T reference_of(T largest_key, const Anchored<T>& before, const Anchored<T>& after, T w) {
  return fmax(largest_key, fmax(before.key - before.gap * w, after.key - after.gap * w));
}

// Sums relative to e^reference, gradients to e^-reference.
template <typename T>
struct FastScan {
  static constexpr bool kFast = true;
  struct Sum {
    T n, d;
  };

  T w, growth, bonus, reference;

  __device__ __forceinline__ FastScan(const Channel<T>& channel, T reference)
      : w(channel.w), growth(expm1(-channel.w)), bonus(exponential(channel.u)), reference(reference) {}

  __device__ __forceinline__ Sum zero() const { return {0, 0}; }
  __device__ __forceinline__ Sum scaled(const Sum& s, T factor) const { return {s.n * factor, s.d * factor}; }
  __device__ __forceinline__ Sum added(const Sum& a, const Sum& b) const { return {a.n + b.n, a.d + b.d}; }

  // e^-w s + add. Adding (e^-w - 1) s has no rounded factor near one whose error would grow with the distance.
  __device__ __forceinline__ Sum step(const Sum& s, const Sum& add) const {
    return {s.n + fma(growth, s.n, add.n), s.d + fma(growth, s.d, add.d)};
  }

  __device__ __forceinline__ Sum enter(const Anchored<T>& s) const {
    return scaled({s.n, s.d}, exponential(exponent(s.key, reference, s.gap, w)));
  }
  __device__ __forceinline__ Anchored<T> leave(const Sum& s) const { return {s.n, s.d, reference, 0}; }

  __device__ __forceinline__ Sum token(T key, T v) const {
    const T weight = exponential(key - reference);
    return {weight * v, weight};
  }

  // Numerator and denominator of y.
  __device__ __forceinline__ Sum total(const Sum& prefix, const Sum& suffix, T key, T v) const {
    const Sum self = token(key, v);
    return {fma(bonus, self.n, prefix.n + suffix.n), fma(bonus, self.d, prefix.d + suffix.d)};
  }

  // a = g / d and b = a y.
  __device__ __forceinline__ Sum gradient(const Sum& total, T g) const {
    const T inverse = reciprocal(total.d), a = g * inverse;
    return {a, a * (total.n * inverse)};
  }
  __device__ __forceinline__ Anchored<T> leave_gradient(const Sum& s) const { return {s.n, s.d, -reference, 0}; }

  __device__ __forceinline__ Sum enter_gradient(const Anchored<T>& s) const {
    return scaled({s.n, s.d}, exponential(exponent(s.key, -reference, s.gap, w)));
  }

  // What a gradient adds to itself: e^u (a, b).
  __device__ __forceinline__ Sum own(const Sum& gradient) const { return scaled(gradient, bonus); }
  // e^key times the scale of `gradients`.
  __device__ __forceinline__ T scale(T key, const Sum&) const { return exponential(key - reference); }

  // e^-w (r + s), the sum over split points for the gradient of w.
  __device__ __forceinline__ Sum split(const Sum& r, const Sum& s) const {
    const Sum sum = added(r, s);
    return step(sum, zero());
  }
  __device__ __forceinline__ T product(const Sum& r, const Sum& gradient) const {
    return r.n * gradient.n - r.d * gradient.d;
  }
};

template <typename T>
struct SafeScan {
  static constexpr bool kFast = false;
  using Sum = Anchored<T>;

  T w, u;

  __device__ __forceinline__ explicit SafeScan(const Channel<T>& channel) : w(channel.w), u(channel.u) {}

  __device__ __forceinline__ Sum zero() const { return nothing<T>(); }
  __device__ __forceinline__ Sum added(const Sum& a, const Sum& b) const { return merge(a, b, w); }
  __device__ __forceinline__ Sum step(Sum s, const Sum& add) const {
    s.gap += 1;
    return merge(s, add, w);
  }

  __device__ __forceinline__ Sum enter(const Anchored<T>& s) const { return s; }
  __device__ __forceinline__ Anchored<T> leave(const Sum& s) const { return s; }
  __device__ __forceinline__ Sum token(T key, T v) const { return {v, 1, key, 0}; }

  // e^u s, with what rounding takes from key + u moved into the sums.
  __device__ __forceinline__ Sum own(const Sum& s) const {
    const T key = s.key + u, back = key - s.key;
    const T factor = exponential((s.key - (key - back)) + (u - back));
    return {s.n * factor, s.d * factor, key, s.gap};
  }
  __device__ __forceinline__ Sum total(const Sum& prefix, const Sum& suffix, T key, T v) const {
    return added(added(prefix, suffix), own(token(key, v)));
  }

  __device__ __forceinline__ Sum gradient(const Sum& total, T g) const {
    const T a = g / total.d;
    return {a, a * (total.n / total.d), -total.key, -total.gap};
  }
  __device__ __forceinline__ Anchored<T> leave_gradient(const Sum& s) const { return s; }
  __device__ __forceinline__ Sum enter_gradient(const Anchored<T>& s) const { return s; }

  __device__ __forceinline__ T scale(T key, const Sum& gradients) const {
    return exponential(exponent(key, -gradients.key, gradients.gap, w));
  }
  __device__ __forceinline__ Sum split(const Sum& r, const Sum& s) const {
    Sum sum = added(r, s);
    sum.gap += 1;
    return sum;
  }
  __device__ __forceinline__ T product(const Sum& r, const Sum& gradient) const {
    return (r.n * gradient.n - r.d * gradient.d) * exponential(exponent(r.key, -gradient.key, r.gap + gradient.gap, w));
  }
};

}  // namespace
}  // namespace vrwkv
