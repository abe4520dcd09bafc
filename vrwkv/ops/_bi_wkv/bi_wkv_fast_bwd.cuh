// The backward pass over segments whose sums are relative to one reference (bi_wkv_fast.cuh).
//
// The gradient of w is a sum over pairs i < t of the number of steps between them, t - i - 1, times what i gives to t:
// a sum over the split points j between them, of what the tokens before j give and a and b after it take, and the same
// mirrored. Both halves are gathered on the way of the tokens' sums; what enters the segment is multiplied in at last.
#pragma once

#include "bi_wkv_fast.cuh"

namespace vrwkv {
namespace {

template <typename scalar_t>
struct FastGradients {
  using acc_t = accumulate_t<scalar_t>;
  using S = Sum<acc_t>;
  static constexpr int kLength = Block<scalar_t>::kLength;

  S ab[kLength];
  S split;     // over split points j: e^-w a step to the segment's end times the sum of the tokens before j
  S mirrored;  // e^-w a step from its start times the sum of those after j
  acc_t grad_w, grad_w_mirrored, grad_u;

  // a_t = grad_t / D_t and b_t = a_t y_t, and their sums that leave the segment.
  __device__ __forceinline__ void find_ab(const FastSegment<scalar_t>& tokens, const Loaded<scalar_t, true>& loaded,
                                          const Memory<scalar_t>& memory, const Around<S>& entering, int segment) {
    S suffix = entering.after, prefix = entering.before, to_end{0, 0}, to_start{0, 0};
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) {
      ab[i] = suffix;  // until a and b take its place
      suffix = suffix.advanced(tokens.decay, tokens.token(i));
    }
    acc_t powers[kLength];
    read_row(memory.powers, powers);
    split = mirrored = {0, 0};
    grad_w = grad_w_mirrored = grad_u = 0;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const S after = ab[i], token = tokens.token(i), total = token.advanced(tokens.bonus, prefix.plus(after));
      const acc_t inverse = reciprocal(total.den), a = static_cast<acc_t>(loaded.grad[i]) * inverse;
      const S here{a, a * (total.num * inverse)};
      grad_w = split.product(here, grad_w);
      grad_w_mirrored = after.product(to_end, grad_w_mirrored);
      grad_u = token.product(here, grad_u);
      mirrored = after.advanced(powers[i], mirrored);
      const S decayed = prefix.scaled(tokens.decay);
      split = split.advanced(tokens.decay, decayed);
      prefix = decayed.plus(token);
      to_end = to_end.advanced(tokens.decay, here);
      ab[i] = here;
    }
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) to_start = to_start.advanced(tokens.decay, ab[i]);
    memory.ab.write(segment, to_end, to_start);
  }

  // The gradients of k and v.
  __device__ __forceinline__ void write_gradients(const FastSegment<scalar_t>& tokens, const Around<S>& entering,
                                                  const Tokens<scalar_t>& places, Global<scalar_t> grad_k,
                                                  Global<scalar_t> grad_v) const {
    S sums[kLength], to_start = entering.after, to_end = entering.before;
#pragma unroll
    for (int i = kLength - 1; i >= 0; --i) {
      sums[i] = ab[i].advanced(tokens.bonus, to_start);
      to_start = to_start.advanced(tokens.decay, ab[i]);
    }
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      sums[i] = sums[i].plus(to_end);
      to_end = to_end.advanced(tokens.decay, ab[i]);
    }
    const Global<scalar_t> to_k = places.of(grad_k), to_v = places.of(grad_v);
    places.each([&](int i) {
      places.at(to_k, i) = static_cast<scalar_t>(fma(tokens.weighted[i], sums[i].num, -tokens.weight[i] * sums[i].den));
      places.at(to_v, i) = static_cast<scalar_t>(tokens.weight[i] * sums[i].num);
    });
  }

  // This segment's share of the gradients of w and u.
  __device__ __forceinline__ S shares(const FastSegment<scalar_t>& tokens, const Around<S>& entering) const {
    const acc_t forwards = split.product(entering.after, grad_w);
    const acc_t backwards = mirrored.product(entering.before, grad_w_mirrored);
    return {-fma(tokens.decay, backwards, forwards), tokens.bonus * grad_u};
  }
};

}  // namespace
}  // namespace vrwkv
