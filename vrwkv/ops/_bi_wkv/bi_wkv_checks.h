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

}  // namespace vrwkv
