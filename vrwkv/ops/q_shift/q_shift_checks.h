// Checks of the arguments of Q-Shift, for the CPU and for CUDA.
#pragma once

#include "../op_checks.h"

namespace vrwkv {

inline void check_shift(const char* op, const Tensor& x, const std::vector<Tensor>& mixes, int64_t height,
                        int64_t width) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have shape (B, T, C), got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(height >= 0 && width >= 0 && height * width == x.size(1), op, ": H * W must be T = ", x.size(1),
                  ", got ", height, " * ", width);
  for (const Tensor& mix : mixes) check_per_channel(op, "each of mixes", mix, "x", x);
}

inline void check_gradients(const char* op, const std::vector<Tensor>& grads, const Tensor& x,
                            const std::vector<Tensor>& mixes) {
  STD_TORCH_CHECK(grads.size() == mixes.size(), op, ": grads must be as many as mixes, ", mixes.size(), ", got ",
                  grads.size());
  for (const Tensor& grad : grads) check_same(op, "each of grads", grad, "x", x);
}

}  // namespace vrwkv
