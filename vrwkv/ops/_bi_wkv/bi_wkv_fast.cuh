// Segments of channels whose decay and bonus are gentle: all sums of tokens in a tile are relative to e^reference,
// those of a and b to e^-reference, and everything stays in registers.
//
// A segment sums its own tokens towards both ends, keeping for each token what its own segment gives it. What enters
// the segment is added afterwards: by the time it is known, the tokens have been walked already. Within a segment the
// decay e^-w is applied a step at a time: its rounding, 2^-25 of itself, adds up over 15 steps at most. Over a segment,
// and from its border to a token, it is applied at once, from a table of powers.
#pragma once

#include "bi_wkv_tile.cuh"

namespace vrwkv {
namespace {

// Whether the sums of the block's tile are relative to one reference. In double there is no such way, and the step from
// token to token has 32 bits here.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ bool is_fast(const Tiling& tiling, const Channel<acc_t>& channel) {
  constexpr int64_t kMaxStride = 1 << 22;
  return !std::is_same_v<acc_t, double> && tiling.channels <= kMaxStride &&
         channel.is_gentle(tiling.segments * Block<scalar_t>::kLength);
}

// The tokens of a segment in tensors of the call's shape.
template <typename scalar_t>
class Tokens {
 public:
  static constexpr int kLength = Block<scalar_t>::kLength;

  __device__ __forceinline__ Tokens(const Tiling& tiling, const Tile& tile, const Segment<scalar_t>& segment, bool fast)
      // threadIdx.y is zero, which the compiler cannot know: a stride that is the same for all threads would be moved
      // to a register of this thread for each address.
      : stride_(static_cast<int>(tiling.channels) + threadIdx.y),
        tokens_(fast ? segment.tokens : 0),
        offset_(tile.offset + segment.first(stride_)) {}

  template <typename T>
  __device__ __forceinline__ Global<T> of(Global<T> tensor) const {
    return tensor + offset_;
  }
  // Token `i` in what `of` returned.
  template <typename T>
  __device__ __forceinline__ T& at(const Global<T>& tensor, int i) const {
    return strided(tensor, stride_, i);
  }

  // Calls function(i) for every token. They exist in most segments, and then nothing lies between the calls.
  template <typename Function>
  __device__ __forceinline__ void each(const Function& function) const {
    if (tokens_ == kLength) {
#pragma unroll
      for (int i = 0; i < kLength; ++i) function(i);
    } else {  // count: 0
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        if (i < tokens_) function(i);
      }
    }
  }

 private:
  int stride_, tokens_;
  int64_t offset_;
};

// What a thread reads of its segment, all at once: loads that follow one another cost one way to memory.
template <typename scalar_t, bool kGradients>
struct Loaded {
  static constexpr int kLength = Block<scalar_t>::kLength;
  accumulate_t<scalar_t> key[kLength], value[kLength], grad[kGradients ? kLength : 1];

  __device__ __forceinline__ Loaded(const Inputs<scalar_t>& in, const Tokens<scalar_t>& tokens) {
    const auto k = tokens.of(in.k), v = tokens.of(in.v), g = tokens.of(in.grad);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      key[i] = -INFINITY;
      value[i] = 0;
      if constexpr (kGradients) grad[i] = 0;
    }
    tokens.each([&](int i) {
      key[i] = tokens.at(k, i);
      value[i] = tokens.at(v, i);
      if constexpr (kGradients) grad[i] = tokens.at(g, i);
    });
  }
};

template <typename scalar_t>
struct FastSegment {
  using B = Block<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  using S = Sum<acc_t>;
  static constexpr int kLength = B::kLength;

  acc_t decay, bonus;
  acc_t weight[kLength], weighted[kLength];  // e^(k - reference), and times v
  S each[kLength];                           // what the segment gives to the sums around each token

  __device__ __forceinline__ S token(int i) const { return {weighted[i], weight[i]}; }

  // The sums of the segment's tokens that leave it towards its end and its start.
  __device__ __forceinline__ void sum_tokens(const BlockSums<scalar_t>& sums, int segment) const {
    S prefix{0, 0}, suffix{0, 0};
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      prefix = prefix.advanced(decay, token(i));
      suffix = suffix.advanced(decay, token(kLength - 1 - i));
    }
    sums.write(segment, prefix, suffix);
  }

  // The same, and in `each` what the segment itself gives to numerator and denominator of y.
  __device__ __forceinline__ void sum_tokens_around(const BlockSums<scalar_t>& sums, int segment) {
    S prefix{0, 0}, suffix{0, 0};
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) {
      each[i] = token(i).advanced(bonus, suffix);
      suffix = suffix.advanced(decay, token(i));
    }
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      each[i] = each[i].plus(prefix);
      prefix = prefix.advanced(decay, token(i));
    }
    sums.write(segment, prefix, suffix);
  }

  // Adds what enters the segment to what it gives itself.
  __device__ __forceinline__ void add_entering(const Memory<scalar_t>& memory, const Around<S>& entering) {
    acc_t powers[kLength];
    read_row(memory.powers, powers);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      each[i] = entering.before.advanced(powers[i], entering.after.advanced(powers[kLength - 1 - i], each[i]));
    }
  }

  __device__ __forceinline__ void write_outputs(const Tokens<scalar_t>& tokens, Global<scalar_t> y) const {
    const Global<scalar_t> out = tokens.of(y);
    tokens.each([&](int i) { tokens.at(out, i) = static_cast<scalar_t>(each[i].num * reciprocal(each[i].den)); });
  }
};

// Before the barrier that `weigh` needs: this segment's largest key, and its share of the powers of e^-w and of e^u.
template <typename scalar_t, bool kGradients, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void write_maximum_and_powers(const Memory<scalar_t>& memory,
                                                         const Segment<scalar_t>& segment,
                                                         const Loaded<scalar_t, kGradients>& loaded,
                                                         const Channel<acc_t>& channel) {
  using B = Block<scalar_t>;
  static_assert(B::kPowers >= kMaxSegments || std::is_same_v<acc_t, double>);
  if constexpr (std::is_same_v<acc_t, double>) return;  // there is no fast way
  acc_t largest = kEmpty;                               // NaN is passed over here; it shows in every sum
#pragma unroll
  for (int i = 0; i < B::kLength; ++i) largest = fmax(largest, loaded.key[i]);
  for (int i = segment.index; i < B::kPowers; i += memory.tokens.segments) {  // count: 18 / segments
    memory.maxima[i] = largest;
    memory.powers[i] = exp(i == B::kBonus ? channel.u : -channel.w * i);
  }
}

// The weights of the segment's tokens, relative to the largest log-weight in the tile: of its keys and of what enters.
template <typename scalar_t, bool kGradients, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ void weigh(const Loaded<scalar_t, kGradients>& loaded, const Memory<scalar_t>& memory,
                                      const Segment<scalar_t>& segment, acc_t largest_entering,
                                      FastSegment<scalar_t>& tokens) {
  acc_t maxima[kMaxSegments], reference = largest_entering;
  read_row(memory.maxima, maxima);
#pragma unroll
  for (int i = 0; i < kMaxSegments; ++i) reference = fmax(reference, maxima[i]);
  // Rarely asked for again, so it is not kept in a register.
  if (segment.index == 0) memory.maxima[Block<scalar_t>::kReference] = reference;
  tokens.decay = memory.powers[1];
  tokens.bonus = memory.powers[Block<scalar_t>::kBonus];
#pragma unroll
  for (int i = 0; i < Block<scalar_t>::kLength; ++i) {
    tokens.weight[i] = exponential(loaded.key[i] - reference);
    tokens.weighted[i] = tokens.weight[i] * loaded.value[i];
  }
}

// The larger scale of what enters the tile.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ acc_t largest_entering(Global<const ScaledSum<acc_t>> entering, const Tiling& tiling,
                                                  const Tile& tile, const Segment<scalar_t>& segment, acc_t w) {
  acc_t largest = kEmpty;
  if (tiling.tiles > 1) {  // count: tiles > 1
    const Around<ScaledSum<acc_t>> sums = load_entering(entering, tiling, tile, segment);
    largest = fmax(sums.before.key - sums.before.gap * w, sums.after.key - sums.after.gap * w);
  }
  return largest;
}

// What enters the segment, relative to e^scale as the sums of the block's segments are. The sums of tiles and w are
// read again rather than kept in registers.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
__device__ __forceinline__ Around<Sum<acc_t>> find_entering(const Inputs<scalar_t>& in, const BlockSums<scalar_t>& sums,
                                                            const Memory<scalar_t>& memory,
                                                            Global<const ScaledSum<acc_t>> entering,
                                                            const Tiling& tiling, const Tile& tile,
                                                            const Segment<scalar_t>& segment, acc_t sign) {
  Around<Sum<acc_t>> into_tile{{0, 0}, {0, 0}};
  if (tiling.tiles > 1) {  // count: tiles > 1
    const Around<ScaledSum<acc_t>> scaled = load_entering(entering, tiling, tile, segment);
    const acc_t w = load_channel(in, tile, segment).w, scale = sign * memory.maxima[Block<scalar_t>::kReference];
    into_tile = {relative_to(scale, scaled.before, w), relative_to(scale, scaled.after, w)};
  }
  const acc_t power = memory.powers[Block<scalar_t>::kLength];
  return {sums.before(segment.index, into_tile.before, power), sums.after(segment.index, into_tile.after, power)};
}

}  // namespace
}  // namespace vrwkv
