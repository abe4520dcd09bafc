// Schemas of Bi-WKV; the formula and the shapes stand in __init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def("bi_wkv(Tensor w, Tensor u, Tensor k, Tensor v) -> Tensor");
  m.def(
      "_bi_wkv_backward(Tensor grad, Tensor w, Tensor u, Tensor k, Tensor v) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
