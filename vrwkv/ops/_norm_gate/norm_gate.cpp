// Schema of the normalised gate; what it computes stands in __init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def("norm_gate(Tensor y, Tensor g, Tensor weight, Tensor bias, float eps) -> Tensor");
}
