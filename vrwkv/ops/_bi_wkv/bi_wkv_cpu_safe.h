// Bi-WKV of one channel, token by token in double precision with a running maximum: for decays and bonuses that the
// tiles cannot hold. Slow, and right for every exponent that a double can tell apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace vrwkv {
namespace safe {

// A numerator and a denominator, relative to e^scale.
struct ScaledSum {
  double num = 0, den = 0, scale = std::numeric_limits<double>::lowest();

  void add(double num_term, double den_term, double term_scale) {
    const double larger = std::max(scale, term_scale);
    const double keep = std::exp(scale - larger), take = std::exp(term_scale - larger);
    num = num * keep + num_term * take;
    den = den * keep + den_term * take;
    scale = larger;
  }
};

inline ScaledSum sum(const ScaledSum& prefix, const ScaledSum& suffix, double num_term, double den_term,
                     double term_scale) {
  ScaledSum total = prefix;
  total.add(suffix.num, suffix.den, suffix.scale);
  total.add(num_term, den_term, term_scale);
  return total;
}

// Exclusive sums before (reverse: after) every token of term(t), decayed by w a step.
template <typename Term>
std::vector<ScaledSum> scan(int64_t tokens, double w, bool reverse, const Term& term) {
  std::vector<ScaledSum> states(tokens);
  ScaledSum state;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = reverse ? tokens - 1 - i : i;
    states[t] = state;
    state.scale -= w;
    const ScaledSum added = term(t);
    state.add(added.num, added.den, added.scale);
  }
  return states;
}

// k, v, y: `tokens` elements `stride` apart.
template <typename scalar_t>
void forward(int64_t tokens, int64_t stride, double w, double u, const scalar_t* k, const scalar_t* v, scalar_t* y) {
  const auto term = [&](int64_t t) { return ScaledSum{double(v[t * stride]), 1, double(k[t * stride])}; };
  const auto prefix = scan(tokens, w, false, term), suffix = scan(tokens, w, true, term);
  for (int64_t t = 0; t < tokens; ++t) {
    const ScaledSum total = sum(prefix[t], suffix[t], double(v[t * stride]), 1, u + double(k[t * stride]));
    y[t * stride] = static_cast<scalar_t>(total.num / total.den);
  }
}

// Gradients by the formulas in bi_wkv_cpu_bwd.cpp; `grad_w` and `grad_u` receive this channel's share.
template <typename scalar_t>
void backward(int64_t tokens, int64_t stride, double w, double u, const scalar_t* grad, const scalar_t* k,
              const scalar_t* v, double* grad_w, double* grad_u, scalar_t* grad_k, scalar_t* grad_v) {
  const auto term = [&](int64_t t) { return ScaledSum{double(v[t * stride]), 1, double(k[t * stride])}; };
  const auto prefix = scan(tokens, w, false, term), suffix = scan(tokens, w, true, term);
  std::vector<ScaledSum> ab(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    const ScaledSum total = sum(prefix[t], suffix[t], double(v[t * stride]), 1, u + double(k[t * stride]));
    const double a = double(grad[t * stride]) / total.den;
    ab[t] = {a, a * total.num / total.den, -total.scale};
  }
  const auto ab_term = [&](int64_t t) { return ab[t]; };
  const auto prefix_ab = scan(tokens, w, false, ab_term), suffix_ab = scan(tokens, w, true, ab_term);
  const auto product = [&](const ScaledSum& s, const ScaledSum& ab_sum) {
    return std::exp(s.scale + ab_sum.scale - w) * (s.num * ab_sum.num - s.den * ab_sum.den);
  };
  double total_w = 0, total_u = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const double key = double(k[t * stride]), value = double(v[t * stride]);
    total_w -= product(prefix[t], suffix_ab[t]) + product(suffix[t], prefix_ab[t]);
    total_u += std::exp(u + key + ab[t].scale) * (value * ab[t].num - ab[t].den);
    const ScaledSum total = sum(prefix_ab[t], suffix_ab[t], ab[t].num, ab[t].den, u + ab[t].scale);
    const double weight = std::exp(key + total.scale);
    grad_k[t * stride] = static_cast<scalar_t>(weight * (value * total.num - total.den));
    grad_v[t * stride] = static_cast<scalar_t>(weight * total.num);
  }
  *grad_w = total_w;
  *grad_u = total_u;
}

}  // namespace safe
}  // namespace vrwkv
