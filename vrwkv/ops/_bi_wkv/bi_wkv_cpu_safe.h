// Bi-WKV of one channel, token by token in double precision with a running maximum: for decays and bonuses that the
// tiles of bi_wkv_cpu.cpp cannot hold. Slow, and right for every exponent that a double can tell apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace vrwkv {
namespace safe {

// Two sums that share a factor e^scale.
struct State {
  double num = 0, den = 0, scale = std::numeric_limits<double>::lowest();

  void add(double num_term, double den_term, double term_scale) {
    const double larger = std::max(scale, term_scale);
    const double keep = std::exp(scale - larger), take = std::exp(term_scale - larger);
    num = num * keep + num_term * take;
    den = den * keep + den_term * take;
    scale = larger;
  }
};

inline State sum(const State& prefix, const State& suffix, double num_term, double den_term, double term_scale) {
  State total = prefix;
  total.add(suffix.num, suffix.den, suffix.scale);
  total.add(num_term, den_term, term_scale);
  return total;
}

// Exclusive sums before (reverse: after) every token of term(t), decayed by w a step.
template <typename Term>
std::vector<State> scan(int64_t tokens, double w, bool reverse, const Term& term) {
  std::vector<State> states(tokens);
  State state;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = reverse ? tokens - 1 - i : i;
    states[t] = state;
    state.scale -= w;
    const State added = term(t);
    state.add(added.num, added.den, added.scale);
  }
  return states;
}

// k, v, y: `tokens` elements `stride` apart.
template <typename Scalar>
void forward(int64_t tokens, int64_t stride, double w, double u, const Scalar* k, const Scalar* v, Scalar* y) {
  const auto term = [&](int64_t t) { return State{double(v[t * stride]), 1, double(k[t * stride])}; };
  const auto prefix = scan(tokens, w, false, term), suffix = scan(tokens, w, true, term);
  for (int64_t t = 0; t < tokens; ++t) {
    const State total = sum(prefix[t], suffix[t], double(v[t * stride]), 1, u + double(k[t * stride]));
    y[t * stride] = static_cast<Scalar>(total.num / total.den);
  }
}

// Gradients by the formulas above BackwardTiles in bi_wkv_cpu.cpp; `dw` and `du` receive this channel's share.
template <typename Scalar>
void backward(int64_t tokens, int64_t stride, double w, double u, const Scalar* g, const Scalar* k, const Scalar* v,
              double* dw, double* du, Scalar* dk, Scalar* dv) {
  const auto term = [&](int64_t t) { return State{double(v[t * stride]), 1, double(k[t * stride])}; };
  const auto prefix = scan(tokens, w, false, term), suffix = scan(tokens, w, true, term);
  std::vector<State> ab(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    const State total = sum(prefix[t], suffix[t], double(v[t * stride]), 1, u + double(k[t * stride]));
    const double a = double(g[t * stride]) / total.den;
    ab[t] = {a, a * total.num / total.den, -total.scale};
  }
  const auto ab_term = [&](int64_t t) { return ab[t]; };
  const auto prefix_ab = scan(tokens, w, false, ab_term), suffix_ab = scan(tokens, w, true, ab_term);
  const auto product = [&](const State& s, const State& ab_sum) {
    return std::exp(s.scale + ab_sum.scale - w) * (s.num * ab_sum.num - s.den * ab_sum.den);
  };
  double sum_w = 0, sum_u = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const double key = double(k[t * stride]), value = double(v[t * stride]);
    sum_w -= product(prefix[t], suffix_ab[t]) + product(suffix[t], prefix_ab[t]);
    sum_u += std::exp(u + key + ab[t].scale) * (value * ab[t].num - ab[t].den);
    const State total = sum(prefix_ab[t], suffix_ab[t], ab[t].num, ab[t].den, u + ab[t].scale);
    const double weight = std::exp(key + total.scale);
    dk[t * stride] = static_cast<Scalar>(weight * (value * total.num - total.den));
    dv[t * stride] = static_cast<Scalar>(weight * total.num);
  }
  *dw = sum_w;
  *du = sum_u;
}

}  // namespace safe
}  // namespace vrwkv
