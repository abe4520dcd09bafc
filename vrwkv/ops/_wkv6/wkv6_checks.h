// Checks of the arguments of the RWKV-6 recurrence, for the CPU and for CUDA.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

inline void check_wkv6(const char* op, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                       const Tensor& u) {
  check_floating(op, "r", r);
  if (r.dim() != 4) refuse(op, ": r must have shape (B, T, H, N), got ", shape_of(r));
  check_same(op, "k", k, "r", r);
  check_same(op, "v", v, "r", r);
  check_same(op, "w", w, "r", r);
  check_device(op, "u", u, "r", r);
  check_floating(op, "u", u);
  if (u.dim() != 2 || u.size(0) != r.size(2) || u.size(1) != r.size(3)) {
    refuse(op, ": u must have shape (H, N) = (", r.size(2), ", ", r.size(3), ") to match r, got ", shape_of(u));
  }
  check_accumulated(op, "u", u, r);
}

inline void check_wkv6_backward(const Tensor& grad, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                const Tensor& u) {
  constexpr const char* kName = "_wkv6_backward";
  check_wkv6(kName, r, k, v, w, u);
  check_same(kName, "grad", grad, "r", r);
}

}  // namespace vrwkv
