// Checks of the host functions: all that keeps a kernel from reading out of bounds or in a layout that it does not
// know. Where one fails, the public function says in Python's terms what was wrong.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

namespace vrwkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* device_name(const Tensor& tensor) { return tensor.is_cpu() ? "the CPU" : "another device"; }

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  op, ": ", name, " must have a floating dtype, got ", torch::headeronly::toString(dtype));
}

inline void check_tokens(const char* op, const char* name, const Tensor& tensor) {
  check_floating(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 3, op, ": ", name, " must have shape (B, T, C), got ", tensor.dim(), " dimensions");
}

inline void check_same(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), op, ": ", name, " must be on the device of ", other_name,
                  ", CUDA device ", other.get_device_index(), ", got one on ", device_name(tensor));
  const auto sizes = tensor.sizes(), other_sizes = other.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), other_sizes.begin(), other_sizes.end()), op, ": ", name,
                  " must have the shape of ", other_name);
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " must have the dtype of ", other_name,
                  ", ", torch::headeronly::toString(other.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_per_channel(const char* op, const char* name, const Tensor& tensor, const char* tokens_name,
                              const Tensor& tokens) {
  STD_TORCH_CHECK(tensor.device() == tokens.device(), op, ": ", name, " must be on the device of ", tokens_name,
                  ", CUDA device ", tokens.get_device_index(), ", got one on ", device_name(tensor));
  const ScalarType dtype = tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == tokens.size(2), op, ": ", name, " must have shape (C,) = (",
                  tokens.size(2), ",) to match ", tokens_name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline std::vector<Tensor> contiguous_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::contiguous(tensor));
  return result;
}

}  // namespace vrwkv
