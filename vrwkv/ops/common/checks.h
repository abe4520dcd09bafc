// Checks of the host functions: all that keeps a kernel from reading out of bounds or in a layout that it does not
// know. A refusal is a RuntimeError in Python; _checks.py uses the same words where no kernel runs.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace vrwkv {

using torch::stable::Tensor;

// Not STD_TORCH_CHECK, which puts the paths of the machine that compiled it before the words.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// What messages call an argument, or one of a list: "k", "mixes[0]".
struct Name {
  const char* text;
  int64_t index;

  Name(const char* text, int64_t index = -1) : text(text), index(index) {}
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  if (name.index >= 0) out << "[" << name.index << "]";
  return out;
}

// "(2, 4, 3)"
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + (tensor.dim() == 1 ? ",)" : ")");
}

// "cpu", "cuda:1"
inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device:") + std::to_string(tensor.get_device_index());
}

inline bool has_shape_of(const Tensor& tensor, const Tensor& other) {
  const auto sizes = tensor.sizes(), other_sizes = other.sizes();
  return std::equal(sizes.begin(), sizes.end(), other_sizes.begin(), other_sizes.end());
}

inline void check_floating(const char* op, Name name, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    refuse(op, ": ", name, " must be float16, bfloat16, float32 or float64, got ", name_of(tensor.scalar_type()));
  }
}

inline void check_tokens(const char* op, Name name, const Tensor& tensor) {
  check_floating(op, name, tensor);
  if (tensor.dim() != 3) refuse(op, ": ", name, " must have shape (B, T, C), got ", shape_of(tensor));
}

inline void check_device(const char* op, Name name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.device() != other.device()) {
    refuse(op, ": ", name, " must be on the device of ", other_name, ", ", device_of(other), ", got ",
           device_of(tensor));
  }
}

inline void check_dtype(const char* op, Name name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.scalar_type() != other.scalar_type()) {
    refuse(op, ": ", name, " must have the dtype of ", other_name, ", ", name_of(other.scalar_type()), ", got ",
           name_of(tensor.scalar_type()));
  }
}

inline void check_same(const char* op, Name name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  check_device(op, name, tensor, other_name, other);
  if (!has_shape_of(tensor, other)) {
    refuse(op, ": ", name, " must have the shape of ", other_name, ", ", shape_of(other), ", got ", shape_of(tensor));
  }
  check_dtype(op, name, tensor, other_name, other);
}

// Refuses a dtype that sums over `tokens` are not taken in.
inline void check_accumulated(const char* op, Name name, const Tensor& tensor, const Tensor& tokens) {
  const ScalarType dtype = tokens.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (tensor.scalar_type() != dtype) {
    refuse(op, ": ", name, " must have dtype ", name_of(dtype), ", got ", name_of(tensor.scalar_type()));
  }
}

inline void check_per_channel(const char* op, Name name, const Tensor& tensor, const char* tokens_name,
                              const Tensor& tokens) {
  check_device(op, name, tensor, tokens_name, tokens);
  check_floating(op, name, tensor);
  if (tensor.dim() != 1 || tensor.size(0) != tokens.size(2)) {
    refuse(op, ": ", name, " must have shape (C,) = (", tokens.size(2), ",) to match ", tokens_name, ", got ",
           shape_of(tensor));
  }
  check_accumulated(op, name, tensor, tokens);
}

inline std::vector<Tensor> contiguous_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(torch::stable::contiguous(tensor));
  return result;
}

}  // namespace vrwkv
