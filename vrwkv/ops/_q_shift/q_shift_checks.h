// Checks of the arguments of Q-Shift, for the CPU and for CUDA.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

// Whether a grid of height * width holds `tokens`, for products that would overflow too.
inline bool is_grid_of(int64_t tokens, int64_t height, int64_t width) {
  if (height <= 0 || width <= 0) return tokens == 0 && height >= 0 && width >= 0;
  return tokens % width == 0 && tokens / width == height;
}

inline void check_shift(const char* op, const Tensor& x, const std::vector<Tensor>& mixes, int64_t height,
                        int64_t width, double channel_gamma) {
  check_tokens(op, "x", x);
  STD_TORCH_CHECK(is_grid_of(x.size(1), height, width), op, ": H * W must be T = ", x.size(1), ", got ", height, " * ",
                  width);
  STD_TORCH_CHECK(channel_gamma >= 0 && channel_gamma <= 0.25, op, ": channel_gamma must lie in [0, 1/4], got ",
                  channel_gamma);
  for (const Tensor& mix : mixes) check_per_channel(op, "each of mixes", mix, "x", x);
}

inline void check_gradients(const char* op, const std::vector<Tensor>& grads, const Tensor& x,
                            const std::vector<Tensor>& mixes) {
  STD_TORCH_CHECK(grads.size() == mixes.size(), op, ": grads must be as many as mixes, ", mixes.size(), ", got ",
                  grads.size());
  for (const Tensor& grad : grads) check_same(op, "each of grads", grad, "x", x);
}

}  // namespace vrwkv
