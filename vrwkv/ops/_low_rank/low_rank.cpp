// Schemas of the low-rank functions; what they compute stands in __init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def("low_rank(Tensor h, Tensor matrix, Tensor offset) -> Tensor");
  m.def("low_rank_mix(Tensor x, Tensor y, Tensor h, Tensor matrices, Tensor offsets) -> Tensor[]");
}
