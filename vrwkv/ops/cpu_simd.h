// Vector code for the CPU kernels: a block of lanes, its exponential, and the choice of instruction set at run time.
#pragma once

#include <cstdint>
#include <type_traits>

#define VRWKV_INLINE inline __attribute__((always_inline))

namespace vrwkv {

// One step of a kernel works on 128 bytes of neighbouring channels, two cache lines: 32 floats or 16 doubles.
constexpr int kBlockBytes = 128;
template <typename Real>
constexpr int kLanes = kBlockBytes / sizeof(Real);

// kLanes values in vectors of `Bytes` bytes, the width of the instruction set that the caller is compiled for.
template <typename Real, int Bytes>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(Bytes)));
  typedef Real Unaligned __attribute__((vector_size(Bytes), aligned(sizeof(Real)), may_alias));
  static constexpr int kVectors = kBlockBytes / Bytes;
  static constexpr int kWidth = Bytes / sizeof(Real);

  Vector part[kVectors];

  static VRWKV_INLINE Lanes load(const Real* from) {
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.part[i] = *reinterpret_cast<const Unaligned*>(from + i * kWidth);
    return lanes;
  }
  static VRWKV_INLINE Lanes all(Real value) {
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.part[i] = value - Vector{};
    return lanes;
  }
  VRWKV_INLINE void store(Real* to) const {
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<Unaligned*>(to + i * kWidth) = part[i];
  }
};

#define VRWKV_LANES_OPERATOR(op)                                                                          \
  template <typename Real, int Bytes>                                                                     \
  VRWKV_INLINE Lanes<Real, Bytes> operator op(const Lanes<Real, Bytes>& a, const Lanes<Real, Bytes>& b) { \
    Lanes<Real, Bytes> result;                                                                            \
    for (int i = 0; i < result.kVectors; ++i) result.part[i] = a.part[i] op b.part[i];                    \
    return result;                                                                                        \
  }
VRWKV_LANES_OPERATOR(+)
VRWKV_LANES_OPERATOR(-)
VRWKV_LANES_OPERATOR(*)
VRWKV_LANES_OPERATOR(/)
#undef VRWKV_LANES_OPERATOR

// The larger of two; `b` where one is NaN.
template <typename Real, int Bytes>
VRWKV_INLINE Lanes<Real, Bytes> max(const Lanes<Real, Bytes>& a, const Lanes<Real, Bytes>& b) {
  Lanes<Real, Bytes> result;
  for (int i = 0; i < result.kVectors; ++i) result.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return result;
}

// What exp needs of a type: exp(x) = 2^n p(r) with x = n log 2 + r, |r| <= log(2) / 2. The coefficients, from the
// constant up, are the Chebyshev fit of exp on that interval: relative error 8e-8 (float), 4e-18 (double).
template <typename Real>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  typedef int32_t Int;
  static constexpr float kLowest = -87.0f;      // exp stays a normal number; what lies below gives exp(kLowest)
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float kLog2High = 0.693145751953125f, kLog2Low = 1.42860682030941723e-6f;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kPolynomial[] = {1.0000000755002300f,  1.0000000107780401f,   0.49998868925286087f,
                                          0.16666505195758111f, 0.041917557541362651f, 0.0083691556676973968f};
};
template <>
struct ExpTraits<double> {
  typedef int64_t Int;
  static constexpr double kLowest = -708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2High = 0.693147180369123816490, kLog2Low = 1.90821492927058770002e-10;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kPolynomial[] = {0.99999999999999999693, 0.99999999999999999976, 0.50000000000000184039,
                                           0.1666666666666668082,  0.04166666666648795252, 0.0083333333333195896,
                                           0.0013888888952352863,  0.00019841269890076403, 2.4801485441561313e-5,
                                           2.7557240887228986e-6,  2.7632654722527792e-7,  2.5110049204818660e-8};
};

// exp(x) for x up to the type's overflow; below ExpTraits::kLowest it stays at that point's value; NaN gives NaN.
template <typename Real, int Bytes>
VRWKV_INLINE Lanes<Real, Bytes> exp(const Lanes<Real, Bytes>& x) {
  using Traits = ExpTraits<Real>;
  using Vector = typename Lanes<Real, Bytes>::Vector;
  typedef typename Traits::Int IntVector __attribute__((vector_size(Bytes)));
  constexpr int kDegree = sizeof(Traits::kPolynomial) / sizeof(Real) - 1;
  Lanes<Real, Bytes> result;
  for (int i = 0; i < result.kVectors; ++i) {
    const Vector lowest = Traits::kLowest - Vector{};
    const Vector y = x.part[i] < lowest ? lowest : x.part[i];
    const Vector shifted = y * Real(1.4426950408889634) + Traits::kRound;
    const Vector n = shifted - Traits::kRound;
    const Vector r = (y - n * Traits::kLog2High) - n * Traits::kLog2Low;
    Vector p = Traits::kPolynomial[kDegree] - Vector{};
    for (int j = kDegree - 1; j >= 0; --j) p = p * r + Traits::kPolynomial[j];
    const IntVector exponent = reinterpret_cast<IntVector>(shifted) + Traits::kBias;
    result.part[i] = p * reinterpret_cast<Vector>(exponent << Traits::kMantissa);
  }
  return result;
}

// 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
template <typename Real, int Bytes>
VRWKV_INLINE Lanes<Real, Bytes> sigmoid(const Lanes<Real, Bytes>& x) {
  using L = Lanes<Real, Bytes>;
  const L zero = L::all(0), one = L::all(1);
  const L e = exp(zero - max(zero - x, x));
  L numerator;
  for (int i = 0; i < L::kVectors; ++i) numerator.part[i] = x.part[i] < zero.part[i] ? e.part[i] : one.part[i];
  return numerator / (one + e);
}

// The type that values of a tensor are computed in.
template <typename Scalar>
using Accumulate = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// `count` neighbouring elements, at most a block, as accumulator values; the lanes behind them are 0.
template <typename Scalar, int Bytes, typename Real = Accumulate<Scalar>>
VRWKV_INLINE Lanes<Real, Bytes> read_block(const Scalar* from, int64_t count) {
  if constexpr (std::is_same_v<Scalar, Real>) {
    if (count == kLanes<Real>) return Lanes<Real, Bytes>::load(from);
  }
  Real values[kLanes<Real>];
  if (count == kLanes<Real>) {
    for (int i = 0; i < kLanes<Real>; ++i) values[i] = static_cast<Real>(from[i]);
  } else {
    for (int i = 0; i < kLanes<Real>; ++i) values[i] = i < count ? static_cast<Real>(from[i]) : Real(0);
  }
  return Lanes<Real, Bytes>::load(values);
}

template <typename Scalar, int Bytes, typename Real = Accumulate<Scalar>>
VRWKV_INLINE void write_block(const Lanes<Real, Bytes>& block, Scalar* to, int64_t count) {
  if constexpr (std::is_same_v<Scalar, Real>) {
    if (count == kLanes<Real>) return block.store(to);
  }
  Real values[kLanes<Real>];
  block.store(values);
  if (count == kLanes<Real>) {
    for (int i = 0; i < kLanes<Real>; ++i) to[i] = static_cast<Scalar>(values[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = static_cast<Scalar>(values[i]);
  }
}

// An instruction set as the width of its vectors. Kernel::run<Bytes>(args...) is compiled for each and picked once.
template <typename Kernel, typename... Args>
struct Dispatch {
  using Function = void (*)(Args...);

  static void run_baseline(Args... args) { Kernel::template run<16>(args...); }
#if defined(__x86_64__)
  __attribute__((target("arch=x86-64-v3"))) static void run_v3(Args... args) { Kernel::template run<32>(args...); }
  __attribute__((target("arch=x86-64-v4"))) static void run_v4(Args... args) { Kernel::template run<64>(args...); }
#endif

  static Function pick() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq")) {
      return run_v4;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
      return run_v3;
    }
#endif
    return run_baseline;
  }
};

}  // namespace vrwkv
