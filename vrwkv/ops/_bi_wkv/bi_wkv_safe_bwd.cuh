// The backward pass over segments whose sums have scales of their own (bi_wkv_safe.cuh).
#pragma once

#include "bi_wkv_safe.cuh"

namespace vrwkv {
namespace {

// What is kept of a segment while its sums of a and b travel through the block, in local memory.
template <typename scalar_t>
struct SafeGradients {
  using acc_t = accumulate_t<scalar_t>;
  using S = ScaledSum<acc_t>;
  static constexpr int kLength = Block<scalar_t>::kLength;

  S kept[kLength + 2];  // (a_t, b_t); then `split` and grad_w, which in registers would burden the fast way

  // a and b, their sums, and the part of grad_w from pairs i < t with t in this segment.
  __device__ __forceinline__ void find_ab(const SafeSegment<scalar_t>& tokens, const Around<S>& entering,
                                          const BlockSums<scalar_t>& sums) {
    const SafeScan<acc_t>& scan = tokens.scan;
    const int length = tokens.segment.tokens;
    S suffix = entering.after, prefix = entering.before;
#pragma unroll 1
    for (int i = length - 1; i >= 0; --i) {
      kept[i] = suffix;  // until a and b take its place
      suffix = scan.advanced(suffix, tokens.token(i));
    }
    S split = nothing<acc_t>(), to_end = split, to_start = split;
    acc_t grad_w = 0;
#pragma unroll 1
    for (int i = 0; i < length; ++i) {
      const acc_t key = tokens.key(i), v = tokens.value(i);
      const S here = scan.ab(scan.total(prefix, kept[i], key, v), tokens.gradient(i));
      kept[i] = here;
      grad_w -= scan.product(split, here);
      split = scan.split(split, prefix);
      prefix = scan.advanced(prefix, scan.token(key, v));
      to_end = scan.advanced(to_end, here);
    }
#pragma unroll 1
    for (int i = length - 1; i >= 0; --i) to_start = scan.advanced(to_start, kept[i]);
    sums.write(tokens.segment.index, to_end, to_start);
    kept[kLength] = split;
    kept[kLength + 1].num = grad_w;
  }

  // Gradients of k and v; returns this segment's share of those of w and u.
  __device__ __forceinline__ Sum<acc_t> write_gradients(const SafeSegment<scalar_t>& tokens, const Around<S>& entering,
                                                        const Around<S>& entering_ab, Global<scalar_t> grad_k,
                                                        Global<scalar_t> grad_v) const {
    const SafeScan<acc_t>& scan = tokens.scan;
    const int length = tokens.segment.tokens;
    S suffixes[kLength], to_start = entering_ab.after, to_end = entering_ab.before;
    S suffix = entering.after, split = nothing<acc_t>();
    // Pairs i < t with t beyond this segment.
    acc_t grad_w = kept[kLength + 1].num - scan.product(kept[kLength], to_start), grad_u = 0;
#pragma unroll 1
    for (int i = length - 1; i >= 0; --i) {
      grad_w -= scan.product(split, kept[i]);  // pairs i > t
      split = scan.split(split, suffix);
      suffix = scan.advanced(suffix, tokens.token(i));
      suffixes[i] = to_start;
      to_start = scan.advanced(to_start, kept[i]);
    }
    grad_w -= scan.product(split, to_end);
#pragma unroll 1
    for (int i = 0; i < length; ++i) {
      const acc_t key = tokens.key(i), v = tokens.value(i);
      const S own = scan.own(kept[i]);
      const S all = scan.added(scan.added(to_end, suffixes[i]), own);
      const acc_t scale = scan.scale(key, all);
      grad_u += (v * own.num - own.den) * scan.scale(key, own);
      to_end = scan.advanced(to_end, kept[i]);
      grad_k[tokens.at(i)] = static_cast<scalar_t>((v * all.num - all.den) * scale);
      grad_v[tokens.at(i)] = static_cast<scalar_t>(all.num * scale);
    }
    return {grad_w, grad_u};
  }
};

}  // namespace
}  // namespace vrwkv
