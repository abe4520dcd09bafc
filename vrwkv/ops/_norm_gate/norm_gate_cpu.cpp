// The normalised gate on the CPU; the definition stands in __init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"
#include "norm_gate_checks.h"

namespace vrwkv {
namespace {

template <typename acc_t, int Bytes>
VRWKV_INLINE acc_t sum(const Lanes<acc_t, Bytes>& x, int64_t count) {
  acc_t total = 0;
  for (int64_t lane = 0; lane < count; ++lane) total += x.part[lane / x.kWidth][lane % x.kWidth];
  return total;
}

template <typename scalar_t>
struct NormGate {
  using acc_t = accumulate_t<scalar_t>;

  // Heads `begin` to `end` of all tokens, `heads` to a token, of `size` channels.
  template <int Bytes>
  static VRWKV_INLINE void run(const scalar_t* y, const scalar_t* g, const acc_t* weight, const acc_t* bias,
                               scalar_t* out, int64_t heads, int64_t size, acc_t eps, int64_t begin, int64_t end) {
    using L = Lanes<acc_t, Bytes>;
    for (int64_t head = begin; head < end; ++head) {
      const scalar_t *values = y + head * size, *gates = g + head * size;
      const acc_t *scale = weight + head % heads * size, *shift = bias + head % heads * size;
      const acc_t mean = total<Bytes>(size,
                                      [&](int64_t c, int64_t count) __attribute__((always_inline)) {
                                        return read_block<scalar_t, Bytes>(values + c, count);
                                      }) /
                         size;
      const acc_t variance = total<Bytes>(size,
                                          [&](int64_t c, int64_t count) __attribute__((always_inline)) {
                                            const L deviation =
                                                read_block<scalar_t, Bytes>(values + c, count) - L::all(mean);
                                            return deviation * deviation;
                                          }) /
                             size;
      const L center = L::all(mean), factor = L::all(1 / std::sqrt(variance + eps));
      each_block<acc_t>(0, size, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const L normal = (read_block<scalar_t, Bytes>(values + c, count) - center) * factor;
        const L scaled =
            normal * read_block<acc_t, Bytes>(scale + c, count) + read_block<acc_t, Bytes>(shift + c, count);
        const L gate = read_block<scalar_t, Bytes>(gates + c, count);
        write_block<scalar_t, Bytes>(scaled * (gate * sigmoid(gate)), out + head * size + c, count);
      });
    }
  }

  // The sum over `size` channels of what `block` returns for each block of them.
  template <int Bytes, typename Block>
  static VRWKV_INLINE acc_t total(int64_t size, const Block& block) {
    auto whole = Lanes<acc_t, Bytes>::all(0);
    acc_t rest = 0;
    each_block<acc_t>(0, size, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      if (count == kLanes<acc_t>) {
        whole = whole + block(c, count);
      } else {
        rest = sum<acc_t, Bytes>(block(c, count), count);
      }
    });
    return sum<acc_t, Bytes>(whole, kLanes<acc_t>) + rest;
  }
};

Tensor norm_gate(const Tensor& y, const Tensor& g, const Tensor& weight, const Tensor& bias, double eps) {
  check_norm_gate(y, g, weight, bias);
  const Tensor y_ = contiguous(y), g_ = contiguous(g), weight_ = contiguous(weight), bias_ = contiguous(bias);
  Tensor out = empty_output(g_);
  const int64_t heads = y_.size(2), size = y_.size(3), rows = y_.size(0) * y_.size(1) * heads;
  if (g_.numel() == 0) return out;
  dispatch_floating(g_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    static const auto function = Dispatch<NormGate<scalar_t>, const scalar_t*, const scalar_t*, const acc_t*,
                                          const acc_t*, scalar_t*, int64_t, int64_t, acc_t, int64_t, int64_t>::pick();
    const int64_t grain = std::max<int64_t>(1, 16384 / size);  // heads that are worth a thread
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      function(y_.const_data_ptr<scalar_t>(), g_.const_data_ptr<scalar_t>(), weight_.const_data_ptr<acc_t>(),
               bias_.const_data_ptr<acc_t>(), out.mutable_data_ptr<scalar_t>(), heads, size, static_cast<acc_t>(eps),
               begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) { m.impl("norm_gate", TORCH_BOX(&vrwkv::norm_gate)); }
