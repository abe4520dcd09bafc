// The dtypes that the kernels take.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace vrwkv {

using torch::headeronly::ScalarType;

// The type that values of a tensor are computed in; `acc_t` where it has a short name.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// Call function(scalar_t()) with the type of the elements of `dtype`, which is floating.
template <typename Function>
void dispatch_floating(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) return function(float());
  if (dtype == ScalarType::Double) return function(double());
  if (dtype == ScalarType::Half) return function(c10::Half());
  return function(c10::BFloat16());
}

// As Python prints it.
inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

}  // namespace vrwkv
