// Checks of the arguments of Q-Shift, for the CPU and for CUDA.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

// Whether a grid of height * width holds `tokens`, for products that would overflow too.
inline bool is_grid_of(int64_t tokens, int64_t height, int64_t width) {
  if (height <= 0 || width <= 0) return tokens == 0 && height >= 0 && width >= 0;
  return tokens % width == 0 && tokens / width == height;
}

inline void check_q_shift(const char* op, const Tensor& x, int64_t height, int64_t width, double channel_gamma,
                          int64_t heads) {
  check_tokens(op, "x", x);
  if (!is_grid_of(x.size(1), height, width)) {
    refuse(op, ": patch_resolution (H, W) must satisfy H * W = T = ", x.size(1), ", got (", height, ", ", width,
           ") for x of shape ", shape_of(x));
  }
  if (!(channel_gamma >= 0 && channel_gamma <= 0.25)) {
    refuse(op, ": channel_gamma must lie in [0, 1/4], four groups share the channels, got ", channel_gamma);
  }
  if (heads < 1 || x.size(2) % heads != 0) {
    refuse(op, ": heads must be at least 1 and divide C = ", x.size(2), ", got ", heads);
  }
}

inline void check_q_shift_mix(const char* op, const Tensor& x, const std::vector<Tensor>& mixes, int64_t height,
                              int64_t width, double channel_gamma, int64_t heads) {
  check_q_shift(op, x, height, width, channel_gamma, heads);
  for (int64_t i = 0; i < static_cast<int64_t>(mixes.size()); ++i)
    check_per_channel(op, {"mixes", i}, mixes[i], "x", x);
}

inline void check_q_shift_mix_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                       const std::vector<Tensor>& mixes, int64_t height, int64_t width,
                                       double channel_gamma, int64_t heads) {
  constexpr const char* kName = "_q_shift_mix_backward";
  check_q_shift_mix(kName, x, mixes, height, width, channel_gamma, heads);
  if (grads.size() != mixes.size()) {
    refuse(kName, ": grads must be as many as mixes, ", mixes.size(), ", got ", grads.size());
  }
  for (int64_t i = 0; i < static_cast<int64_t>(grads.size()); ++i) check_same(kName, {"grads", i}, grads[i], "x", x);
}

}  // namespace vrwkv
