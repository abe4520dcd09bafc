// Segments of channels whose decay or bonus is too steep for one reference: each sum has a scale of its own, and tokens
// are read again on every pass. Slow and rare; the sums lie in local memory, and nothing of it is computed before the
// branch that leads here.
#pragma once

#include "bi_wkv_tile.cuh"

namespace vrwkv {
namespace {

template <typename scalar_t>
struct SafeSegment {
  using acc_t = accumulate_t<scalar_t>;
  using S = ScaledSum<acc_t>;
  static constexpr int kLength = Block<scalar_t>::kLength;

  const Inputs<scalar_t>& in;
  Segment<scalar_t> segment;
  int64_t offset, stride;
  SafeScan<acc_t> scan;

  __device__ __forceinline__ SafeSegment(const Inputs<scalar_t>& in, const Tiling& tiling, const Tile& tile,
                                         const Segment<scalar_t>& segment)
      : in(in),
        segment(segment.computed_here()),
        offset(tile.offset + this->segment.first(tiling.channels)),
        stride(tiling.channels),
        scan(load_channel(in, tile, this->segment)) {}

  __device__ __forceinline__ int64_t at(int i) const { return offset + i * stride; }
  __device__ __forceinline__ acc_t key(int i) const {
    const acc_t key = static_cast<acc_t>(in.k[at(i)]);
    return key < kEmpty ? acc_t(kEmpty) : key;  // NaN stays
  }
  __device__ __forceinline__ acc_t value(int i) const { return static_cast<acc_t>(in.v[at(i)]); }
  __device__ __forceinline__ acc_t gradient(int i) const { return static_cast<acc_t>(in.grad[at(i)]); }
  __device__ __forceinline__ S token(int i) const { return scan.token(key(i), value(i)); }

  // The sums of the segment's tokens that leave it towards its end and its start.
  __device__ __forceinline__ void sum_tokens(const BlockSums<scalar_t>& sums) const {
    S prefix = nothing<acc_t>(), suffix = prefix;
#pragma unroll 1
    for (int i = 0; i < segment.tokens; ++i) prefix = scan.advanced(prefix, token(i));
#pragma unroll 1
    for (int i = segment.tokens - 1; i >= 0; --i) suffix = scan.advanced(suffix, token(i));
    sums.write(segment.index, prefix, suffix);
  }

  __device__ __forceinline__ Around<S> around(const BlockSums<scalar_t>& sums, const Around<S>& entering) const {
    return {sums.before(segment.index, entering.before, scan.w), sums.after(segment.index, entering.after, scan.w)};
  }

  __device__ __forceinline__ void write_outputs(const Around<S>& tokens, Global<scalar_t> y) const {
    S suffixes[kLength], suffix = tokens.after, prefix = tokens.before;
#pragma unroll 1
    for (int i = segment.tokens - 1; i >= 0; --i) {
      suffixes[i] = suffix;
      suffix = scan.advanced(suffix, token(i));
    }
#pragma unroll 1
    for (int i = 0; i < segment.tokens; ++i) {
      const S total = scan.total(prefix, suffixes[i], key(i), value(i));
      prefix = scan.advanced(prefix, token(i));
      y[at(i)] = static_cast<scalar_t>(total.num * reciprocal(total.den));
    }
  }
};

}  // namespace
}  // namespace vrwkv
