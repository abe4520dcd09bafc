// Checks of the arguments of the pointwise functions, for the CPU and for CUDA.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

inline void check_sigmoid_gate(const char* op, const Tensor& r, const Tensor& y) {
  check_floating(op, "r", r);
  check_same(op, "y", y, "r", r);
}

inline void check_sigmoid_gate_backward(const Tensor& grad, const Tensor& r, const Tensor& y) {
  constexpr const char* kName = "_sigmoid_gate_backward";
  check_sigmoid_gate(kName, r, y);
  check_same(kName, "grad", grad, "r", r);
}

inline void check_squared_relu_in_place(const Tensor& x) {
  check_floating("squared_relu_", "x", x);
  if (!x.is_contiguous()) refuse("squared_relu_: x must be contiguous, got shape ", shape_of(x), " in another layout");
}

inline void check_squared_relu_backward(const Tensor& grad, const Tensor& y) {
  constexpr const char* kName = "_squared_relu_backward";
  check_floating(kName, "y", y);
  check_same(kName, "grad", grad, "y", y);
}

}  // namespace vrwkv
