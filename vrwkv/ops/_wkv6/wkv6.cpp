// Schemas of the bidirectional RWKV-6 recurrence; the formula and the shapes stand in __init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def("wkv6(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> Tensor");
  m.def(
      "_wkv6_backward(Tensor grad, Tensor r, Tensor k, Tensor v, Tensor w, Tensor u) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}
