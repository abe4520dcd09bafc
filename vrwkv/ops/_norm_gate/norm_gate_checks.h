// Checks of the arguments of the normalised gate.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

inline void check_norm_gate(const Tensor& y, const Tensor& g, const Tensor& weight, const Tensor& bias) {
  constexpr const char* kName = "norm_gate";
  check_tokens(kName, "g", g);
  if (y.dim() != 4 || y.size(0) != g.size(0) || y.size(1) != g.size(1) || y.size(2) * y.size(3) != g.size(2)) {
    refuse(kName, ": y must have shape (B, T, H, N) with B, T and H * N those of g, ", shape_of(g), ", got ",
           shape_of(y));
  }
  check_device(kName, "y", y, "g", g);
  check_dtype(kName, "y", y, "g", g);
  check_per_channel(kName, "weight", weight, "g", g);
  check_per_channel(kName, "bias", bias, "g", g);
}

}  // namespace vrwkv
