// Schemas of the pointwise functions; what they compute stands in __init__.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(vrwkv, m) {
  m.def("sigmoid_gate(Tensor r, Tensor y) -> Tensor");
  m.def("_sigmoid_gate_backward(Tensor grad, Tensor r, Tensor y) -> (Tensor, Tensor)");
  m.def("squared_relu(Tensor x) -> Tensor");
  m.def("squared_relu_(Tensor(a!) x) -> ()");
  m.def("_squared_relu_backward(Tensor grad, Tensor y) -> Tensor");
}
