// Vector code for the CPU kernels: a block of lanes, its exponential, and the choice of instruction set at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#define VRWKV_INLINE inline __attribute__((always_inline))

namespace vrwkv {

// One step of a kernel works on 64 bytes of neighbouring channels, a cache line: 16 floats or 8 doubles.
constexpr int kBlockBytes = 64;
template <typename acc_t>
constexpr int kLanes = kBlockBytes / sizeof(acc_t);

// kLanes values in vectors of `Bytes` bytes, the width of the instruction set that the caller is compiled for.
template <typename acc_t, int Bytes>
struct Lanes {
  typedef acc_t Vector __attribute__((vector_size(Bytes)));
  typedef acc_t Unaligned __attribute__((vector_size(Bytes), aligned(sizeof(acc_t)), may_alias));
  static constexpr int kVectors = kBlockBytes / Bytes;
  static constexpr int kWidth = Bytes / sizeof(acc_t);

  Vector part[kVectors];

  static VRWKV_INLINE Lanes load(const acc_t* from) {
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.part[i] = *reinterpret_cast<const Unaligned*>(from + i * kWidth);
    return lanes;
  }
  // By way of an array: GCC 12 fills a vector lane by lane, twenty times as slow as the multiply-add behind it.
  static VRWKV_INLINE Lanes all(acc_t value) {
    acc_t values[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) values[lane] = value;
    Lanes lanes;
    for (int i = 0; i < kVectors; ++i) lanes.part[i] = *reinterpret_cast<const Unaligned*>(values);
    return lanes;
  }
  VRWKV_INLINE void store(acc_t* to) const {
    for (int i = 0; i < kVectors; ++i) *reinterpret_cast<Unaligned*>(to + i * kWidth) = part[i];
  }
};

#define VRWKV_LANES_OPERATOR(op)                                                                             \
  template <typename acc_t, int Bytes>                                                                       \
  VRWKV_INLINE Lanes<acc_t, Bytes> operator op(const Lanes<acc_t, Bytes>& a, const Lanes<acc_t, Bytes>& b) { \
    Lanes<acc_t, Bytes> result;                                                                              \
    for (int i = 0; i < result.kVectors; ++i) result.part[i] = a.part[i] op b.part[i];                       \
    return result;                                                                                           \
  }
VRWKV_LANES_OPERATOR(+)
VRWKV_LANES_OPERATOR(-)
VRWKV_LANES_OPERATOR(*)
VRWKV_LANES_OPERATOR(/)
#undef VRWKV_LANES_OPERATOR

// The larger of two; `b` where one is NaN.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> max(const Lanes<acc_t, Bytes>& a, const Lanes<acc_t, Bytes>& b) {
  Lanes<acc_t, Bytes> result;
  for (int i = 0; i < result.kVectors; ++i) result.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return result;
}

template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> sqrt(const Lanes<acc_t, Bytes>& x) {
  Lanes<acc_t, Bytes> result;
  for (int i = 0; i < result.kVectors; ++i) {
    for (int lane = 0; lane < result.kWidth; ++lane) result.part[i][lane] = std::sqrt(x.part[i][lane]);
  }
  return result;
}

// What exp needs of a type: e^x = 2^n p(r) with x log2(e) = n + r, |r| <= 1/2. The coefficients, from the constant up,
// behind the one that makes e^0 exact, fit (2^r - 1) / r on that interval with a relative error of 4e-7 (float), 9e-17
// (double); that of p is 1.3e-7 (float), 7e-18 (double).
template <typename acc_t>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  typedef int32_t Int;
  static constexpr float kLowest = -87.3f;  // of x; 2^n there is the smallest normal number
  // 1.5 * 2^23, which leaves the nearest integer in the low bits of a sum, and the bias of the exponent.
  static constexpr float kRound = 12582912.0f + 127;
  static constexpr int kMantissa = 23;
  static constexpr float kPolynomial[] = {1, 0.693147144f, 0.240223513f, 0.0555050021f, 0.00966624543f, 0.00133335387f};
  static constexpr float kVanishing = -88.03f;  // of x; 2^n there has the bits of zero
};
template <>
struct ExpTraits<double> {
  typedef int64_t Int;
  static constexpr double kLowest = -708.3;
  static constexpr double kRound = 6755399441055744.0 + 1023;  // 1.5 * 2^52 and the bias
  static constexpr int kMantissa = 52;
  static constexpr double kPolynomial[] = {1,
                                           0.69314718055994533046,
                                           0.24022650695910156204,
                                           0.055504108664819921605,
                                           0.0096181291075883352443,
                                           0.0013333558146789921722,
                                           1.5403530462514432062e-4,
                                           1.5252733489988525649e-5,
                                           1.321543308967639918e-6,
                                           1.0178198021671930844e-7,
                                           7.0741056135081427963e-9,
                                           4.4352827069572771511e-10};
  static constexpr double kVanishing = -709.1;
};

// e^x = scale * (1 + r q) for a vector of x.
template <typename acc_t, int Bytes>
struct ExpTerms {
  using Vector = typename Lanes<acc_t, Bytes>::Vector;
  Vector r, q, scale;

  VRWKV_INLINE explicit ExpTerms(const Vector& x) {
    using Traits = ExpTraits<acc_t>;
    typedef typename Traits::Int IntVector __attribute__((vector_size(Bytes)));
    constexpr int kDegree = sizeof(Traits::kPolynomial) / sizeof(acc_t) - 1;
    const Vector scaled = x * acc_t(1.4426950408889634), shifted = scaled + Traits::kRound;
    r = scaled - (shifted - Traits::kRound);
    q = Traits::kPolynomial[kDegree] - Vector{};
    for (int j = kDegree - 1; j >= 1; --j) q = q * r + Traits::kPolynomial[j];
    scale = reinterpret_cast<Vector>(reinterpret_cast<IntVector>(shifted) << Traits::kMantissa);
  }
};

// e^x for x from kLowest to 88.3 (float) or 709.4 (double). NaN gives NaN. To the error above comes that of log2(e),
// |x| / 9 (float) or |x| / 16 (double) units in the last place, and another |x| / 2 where the product x log2(e) is
// rounded too: without fused multiply-add.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> exp_in_range(const Lanes<acc_t, Bytes>& x) {
  Lanes<acc_t, Bytes> result;
  for (int i = 0; i < result.kVectors; ++i) {
    const ExpTerms<acc_t, Bytes> terms(x.part[i]);
    result.part[i] = (terms.q * terms.r + ExpTraits<acc_t>::kPolynomial[0]) * terms.scale;
  }
  return result;
}

// The same for any x up to there: what lies below kLowest gives e^kLowest.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> exp(const Lanes<acc_t, Bytes>& x) {
  return exp_in_range(max(Lanes<acc_t, Bytes>::all(ExpTraits<acc_t>::kLowest), x));
}

template <typename acc_t, int Bytes>
struct Decay {
  Lanes<acc_t, Bytes> value, minus_one;  // e^x and e^x - 1
};

// e^x and e^x - 1, each with full relative precision, for any x <= 0; below kVanishing e^x is zero. NaN gives NaN.
template <typename acc_t, int Bytes>
VRWKV_INLINE Decay<acc_t, Bytes> decay_of(const Lanes<acc_t, Bytes>& x) {
  const Lanes<acc_t, Bytes> bounded = max(Lanes<acc_t, Bytes>::all(ExpTraits<acc_t>::kVanishing), x);
  Decay<acc_t, Bytes> result;
  for (int i = 0; i < x.kVectors; ++i) {
    const ExpTerms<acc_t, Bytes> terms(bounded.part[i]);
    const auto growth = terms.scale * (terms.r * terms.q);
    result.value.part[i] = growth + terms.scale;
    result.minus_one.part[i] = growth + (terms.scale - 1);
  }
  return result;
}

// 1 / (1 + e^-x), from e^-|x|, which cannot overflow.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> sigmoid(const Lanes<acc_t, Bytes>& x) {
  using L = Lanes<acc_t, Bytes>;
  const L zero = L::all(0), one = L::all(1);
  const L e = exp(zero - max(zero - x, x));
  L numerator;
  for (int i = 0; i < L::kVectors; ++i) numerator.part[i] = x.part[i] < zero.part[i] ? e.part[i] : one.part[i];
  return numerator / (one + e);
}

// The two ways to mix vectors a and b by groups of s lanes; low takes the even groups of either, high the odd ones.
template <typename acc_t, int Bytes, int s, int... lane>
struct Shuffle {
  typedef acc_t Vector __attribute__((vector_size(Bytes)));
  static constexpr int kWidth = Bytes / sizeof(acc_t);
#if defined(__clang__)
  template <int... from>
  static VRWKV_INLINE Vector take(Vector a, Vector b) {
    return __builtin_shufflevector(a, b, from...);
  }
#else  // which GCC knows from version 12 on
  template <int... from>
  static VRWKV_INLINE Vector take(Vector a, Vector b) {
    typedef typename ExpTraits<acc_t>::Int Places __attribute__((vector_size(Bytes)));
    return __builtin_shuffle(a, b, Places{from...});
  }
#endif
  static VRWKV_INLINE Vector low(Vector a, Vector b) { return take<(lane & s ? kWidth + lane - s : lane)...>(a, b); }
  static VRWKV_INLINE Vector high(Vector a, Vector b) { return take<(lane & s ? kWidth + lane : lane + s)...>(a, b); }
};

template <typename acc_t, int Bytes, int s, int... lane>
Shuffle<acc_t, Bytes, s, lane...> make_shuffle(std::integer_sequence<int, lane...>);
template <typename acc_t, int Bytes, int s>
using ShuffleBy = decltype(make_shuffle<acc_t, Bytes, s>(std::make_integer_sequence<int, Bytes / sizeof(acc_t)>()));

// The sums over the lanes of as many vectors as a vector has lanes: that of vectors[i] comes to lane i of the first.
template <typename acc_t, int Bytes, int s = Bytes / sizeof(acc_t) / 2>
VRWKV_INLINE void sum_lanes(typename Lanes<acc_t, Bytes>::Vector* vectors) {
  using By = ShuffleBy<acc_t, Bytes, s>;
#pragma GCC unroll 16
  for (int i = 0; i < s; ++i) vectors[i] = By::low(vectors[i], vectors[i + s]) + By::high(vectors[i], vectors[i + s]);
  if constexpr (s > 1) sum_lanes<acc_t, Bytes, s / 2>(vectors);
}

// Transpose a square of as many vectors as a vector has lanes.
template <typename acc_t, int Bytes, int s = Bytes / sizeof(acc_t) / 2>
VRWKV_INLINE void transpose_square(typename Lanes<acc_t, Bytes>::Vector* vectors) {
  using By = ShuffleBy<acc_t, Bytes, s>;
#pragma GCC unroll 16
  for (int i = 0; i < Lanes<acc_t, Bytes>::kWidth; ++i) {
    if (i & s) continue;
    const auto a = vectors[i], b = vectors[i + s];
    vectors[i] = By::low(a, b);
    vectors[i + s] = By::high(a, b);
  }
  if constexpr (s > 1) transpose_square<acc_t, Bytes, s / 2>(vectors);
}

// Denormal results become zero for the lifetime: decays shrink sums through that range, where each operation would take
// a hundred times longer.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | kFlushToZero); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  static constexpr unsigned int kFlushToZero = 0x8000;
  unsigned int before_;
#endif
};

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
