// Checks of the arguments of Bi-WKV, for the CPU and for CUDA.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

inline void check_bi_wkv(const char* op, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) {
  check_tokens(op, "k", k);
  check_same(op, "v", v, "k", k);
  check_per_channel(op, "w", w, "k", k);
  check_per_channel(op, "u", u, "k", k);
}

inline void check_bi_wkv_backward(const Tensor& grad, const Tensor& w, const Tensor& u, const Tensor& k,
                                  const Tensor& v) {
  constexpr const char* kName = "_bi_wkv_backward";
  check_bi_wkv(kName, w, u, k, v);
  check_same(kName, "grad", grad, "k", k);
}

}  // namespace vrwkv
