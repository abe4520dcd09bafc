// Checks of the host functions. The public functions have checked shapes and dtypes; an op that is called past them
// must not read out of bounds, nor in a layout that it does not know.
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
