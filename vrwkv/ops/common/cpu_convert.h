// Blocks of neighbouring elements of a tensor, of any floating dtype, to and from lanes of accumulator values.
#pragma once

#include <cstring>

#include "cpu_simd.h"
#include "dtypes.h"

namespace vrwkv {

// Conversions of 16-bit floats, whose bits stand in the lower half of 32-bit lanes.
template <int Bytes>
struct HalfBits {
  typedef uint32_t Wide __attribute__((vector_size(Bytes), may_alias));
  typedef float Float __attribute__((vector_size(Bytes)));

  // bfloat16 is the upper half of a float; rounded to nearest, ties to even.
  static VRWKV_INLINE Float widen(c10::BFloat16, const Wide& bits) { return reinterpret_cast<Float>(bits << 16); }
  static VRWKV_INLINE Wide narrow(c10::BFloat16, const Float& x) {
    const Wide bits = reinterpret_cast<Wide>(x);
    const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 - Wide{} : rounded;
  }

  // float16 has 5 bits of exponent (bias 15) and 10 of mantissa. Shifted into a float's place it is 2^-112 of its
  // value, subnormal numbers included; an exponent of all ones has to stay one.
  static VRWKV_INLINE Float widen(c10::Half, const Wide& bits) {
    const Wide magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const Wide scaled = reinterpret_cast<Wide>(reinterpret_cast<Float>(magnitude) * 0x1p112f);
    return reinterpret_cast<Float>((magnitude >= 0x0f800000 ? scaled | 0x7f800000 : scaled) | sign);
  }
  // Rounded to nearest, ties to even: in the bits where the result is normal; where it is subnormal, by adding 0.5,
  // whose last place is the smallest float16.
  static VRWKV_INLINE Wide narrow(c10::Half, const Float& x) {
    const Wide bits = reinterpret_cast<Wide>(x), magnitude = bits & 0x7fffffff;
    const Wide normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const Wide subnormal = reinterpret_cast<Wide>(reinterpret_cast<Float>(magnitude) + 0.5f) - 0x3f000000;
    const Wide finite = magnitude < 0x38800000 ? subnormal : normal;
    const Wide infinite = magnitude > 0x7f800000 ? 0x7e00 - Wide{} : 0x7c00 - Wide{};
    return (magnitude >= 0x47800000 ? infinite : finite) | ((bits >> 16) & 0x8000);
  }
};

// Ask the second-level cache, which has the room, for the lines of a block ahead of its use; any address will do.
template <typename scalar_t>
VRWKV_INLINE void prefetch(const scalar_t* block) {
  constexpr int kSize = kLanes<accumulate_t<scalar_t>> * sizeof(scalar_t);
  for (int byte = 0; byte < kSize; byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(block) + byte, 0, 2);
}

// Call function(first, count) for the blocks of elements from `begin` to `end`; where they are whole, with a constant
// count, so that read_block and write_block are compiled without padding.
template <typename acc_t, typename Function>
VRWKV_INLINE void each_block(int64_t begin, int64_t end, const Function& function) {
  int64_t first = begin;
  for (; first + kLanes<acc_t> <= end; first += kLanes<acc_t>) function(first, kLanes<acc_t>);
  if (first < end) function(first, end - first);
}

// `count` neighbouring elements, at most a block, as accumulator values; the lanes behind them are 0.
template <typename scalar_t, int Bytes, typename acc_t = accumulate_t<scalar_t>>
VRWKV_INLINE Lanes<acc_t, Bytes> read_block(const scalar_t* from, int64_t count) {
  scalar_t padded[kLanes<acc_t>];
  if (count != kLanes<acc_t>) {
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, from, count * sizeof(scalar_t));
    from = padded;
  }
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return Lanes<acc_t, Bytes>::load(from);
  } else {
    alignas(Bytes) uint32_t bits[kLanes<acc_t>];
    for (int i = 0; i < kLanes<acc_t>; ++i) bits[i] = from[i].x;
    Lanes<acc_t, Bytes> block;
    for (int i = 0; i < block.kVectors; ++i) {
      const auto* part = reinterpret_cast<const typename HalfBits<Bytes>::Wide*>(bits + i * block.kWidth);
      block.part[i] = HalfBits<Bytes>::widen(scalar_t(), *part);
    }
    return block;
  }
}

template <typename scalar_t, int Bytes, typename acc_t = accumulate_t<scalar_t>>
VRWKV_INLINE void write_block(const Lanes<acc_t, Bytes>& block, scalar_t* to, int64_t count) {
  scalar_t padded[kLanes<acc_t>];
  scalar_t* target = count == kLanes<acc_t> ? to : padded;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    block.store(target);
  } else {
    alignas(Bytes) uint32_t bits[kLanes<acc_t>];
    for (int i = 0; i < block.kVectors; ++i) {
      auto* part = reinterpret_cast<typename HalfBits<Bytes>::Wide*>(bits + i * block.kWidth);
      *part = HalfBits<Bytes>::narrow(scalar_t(), block.part[i]);
    }
    for (int i = 0; i < kLanes<acc_t>; ++i) target[i].x = static_cast<uint16_t>(bits[i]);
  }
  if (target == padded) std::memcpy(to, padded, count * sizeof(scalar_t));
}

}  // namespace vrwkv
