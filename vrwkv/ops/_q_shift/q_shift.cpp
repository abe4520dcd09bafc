// Schemas of Q-Shift; the definition and the shapes stand in __init__.py. Here shift_pixel may be negative: the
// adjoint.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def(
      "q_shift(Tensor x, SymInt height, SymInt width, int shift_pixel, float channel_gamma, int heads) -> "
      "Tensor");
  m.def(
      "q_shift_mix(Tensor x, Tensor[] mixes, SymInt height, SymInt width, int shift_pixel, float channel_gamma, "
      "int heads) -> Tensor[]");
  m.def(
      "_q_shift_mix_backward(Tensor[] grads, Tensor x, Tensor[] mixes, SymInt height, SymInt width, int shift_pixel, "
      "float channel_gamma, int heads) -> (Tensor, Tensor[])");
}
