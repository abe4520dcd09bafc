// Checks of the arguments of the low-rank functions.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

// `tensor` must have the given shape, lie with `other` and have the dtype that sums over it are taken in.
inline void check_parameter(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                            const char* other_name, const Tensor& other) {
  check_device(op, name, tensor, other_name, other);
  check_floating(op, name, tensor);
  const auto sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) {
    std::string wanted;
    for (const int64_t size : shape) wanted += (wanted.empty() ? "(" : ", ") + std::to_string(size);
    refuse(op, ": ", name, " must have shape ", wanted, shape.size() == 1 ? ",)" : ")", " to match ", other_name,
           ", got ", shape_of(tensor));
  }
  check_accumulated(op, name, tensor, other);
}

inline void check_low_rank(const Tensor& h, const Tensor& matrix, const Tensor& offset) {
  check_tokens("low_rank", "h", h);
  if (matrix.dim() != 2) refuse("low_rank: matrix must have shape (R, C), got ", shape_of(matrix));
  check_parameter("low_rank", "matrix", matrix, {h.size(2), matrix.size(1)}, "h", h);
  check_parameter("low_rank", "offset", offset, {matrix.size(1)}, "matrix", matrix);
}

inline void check_low_rank_mix(const Tensor& x, const Tensor& y, const Tensor& h, const Tensor& matrices,
                               const Tensor& offsets) {
  constexpr const char* kName = "low_rank_mix";
  check_tokens(kName, "x", x);
  check_same(kName, "y", y, "x", x);
  if (matrices.dim() != 3) refuse(kName, ": matrices must have shape (J, R, C), got ", shape_of(matrices));
  check_tokens(kName, "h", h);
  if (h.size(0) != x.size(0) || h.size(1) != x.size(1) || h.size(2) != matrices.size(0) * matrices.size(1)) {
    refuse(kName, ": h must have shape (B, T, J * R) = (", x.size(0), ", ", x.size(1), ", ",
           matrices.size(0) * matrices.size(1), ") to match x and matrices, got ", shape_of(h));
  }
  check_device(kName, "h", h, "x", x);
  check_dtype(kName, "h", h, "x", x);
  check_parameter(kName, "matrices", matrices, {matrices.size(0), matrices.size(1), x.size(2)}, "x", x);
  check_parameter(kName, "offsets", offsets, {matrices.size(0), x.size(2)}, "matrices", matrices);
}

}  // namespace vrwkv
