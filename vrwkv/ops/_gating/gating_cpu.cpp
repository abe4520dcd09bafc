// The pointwise functions on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>

#include <algorithm>
#include <array>

#include "../common/checks.h"
#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"

namespace vrwkv {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

// Each function maps a block of every input to a block of every output.
struct SigmoidGate {
  template <typename L>
  static VRWKV_INLINE std::array<L, 1> apply(const std::array<L, 2>& in) {
    return {sigmoid(in[0]) * in[1]};
  }
};

struct SigmoidGateBackward {
  template <typename L>
  static VRWKV_INLINE std::array<L, 2> apply(const std::array<L, 3>& in) {
    const L gate = sigmoid(in[1]), grad_y = in[0] * gate;
    return {grad_y * in[2] * (L::all(1) - gate), grad_y};
  }
};

struct SquaredRelu {
  template <typename L>
  static VRWKV_INLINE std::array<L, 1> apply(const std::array<L, 1>& in) {
    const L positive = max(L::all(0), in[0]);
    return {positive * positive};
  }
};

// From the output: its square root is relu(x).
struct SquaredReluBackward {
  template <typename L>
  static VRWKV_INLINE std::array<L, 1> apply(const std::array<L, 2>& in) {
    const L positive = sqrt(in[1]);
    return {in[0] * (positive + positive)};
  }
};

template <typename Scalar, typename Function, size_t Inputs, size_t Outputs>
struct MapBlocks {
  template <int Bytes>
  static VRWKV_INLINE void run(const std::array<const Scalar*, Inputs>& inputs,
                               const std::array<Scalar*, Outputs>& outputs, int64_t begin, int64_t end) {
    using L = Lanes<Accumulate<Scalar>, Bytes>;
    const auto from = inputs;  // copies, so that no store to an output can change a pointer
    const auto to = outputs;
    each_block<Accumulate<Scalar>>(begin, end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      std::array<L, Inputs> in;
      for (size_t j = 0; j < Inputs; ++j) in[j] = read_block<Scalar, Bytes>(from[j] + i, count);
      const std::array<L, Outputs> out = Function::apply(in);
      for (size_t j = 0; j < Outputs; ++j) write_block<Scalar, Bytes>(out[j], to[j] + i, count);
    });
  }
};

template <typename Function, typename Scalar, size_t Inputs, size_t Outputs>
void map_typed(const std::array<Tensor, Inputs>& inputs, const std::array<Tensor, Outputs>& outputs, Scalar) {
  std::array<const Scalar*, Inputs> from;
  std::array<Scalar*, Outputs> to;
  for (size_t j = 0; j < Inputs; ++j) from[j] = inputs[j].template const_data_ptr<Scalar>();
  for (size_t j = 0; j < Outputs; ++j) to[j] = outputs[j].template mutable_data_ptr<Scalar>();
  static const auto function = Dispatch<MapBlocks<Scalar, Function, Inputs, Outputs>, const decltype(from)&,
                                        const decltype(to)&, int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, inputs[0].numel(), kGrain,
                              [&](int64_t begin, int64_t end) { function(from, to, begin, end); });
}

// Writes Function of all elements of the inputs to the outputs; all are contiguous.
template <typename Function, size_t Inputs, size_t Outputs>
void map_into(const std::array<Tensor, Inputs>& inputs, const std::array<Tensor, Outputs>& outputs) {
  THO_DISPATCH_V2(inputs[0].scalar_type(), "gating", AT_WRAP([&] { map_typed<Function>(inputs, outputs, scalar_t()); }),
                  ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16);
}

// Applies Function to all elements of the inputs; returns its outputs, each like the last input.
template <typename Function, size_t Outputs, size_t Inputs>
std::array<Tensor, Outputs> map(std::array<Tensor, Inputs> inputs) {
  std::array<Tensor, Outputs> outputs;
  for (const Tensor& input : inputs) check_same("gating", "each input", input, "the last", inputs.back());
  for (Tensor& input : inputs) input = contiguous(input);
  for (Tensor& output : outputs) output = empty_output(inputs.back());
  map_into<Function>(inputs, outputs);
  return outputs;
}

Tensor sigmoid_gate(const Tensor& r, const Tensor& y) { return map<SigmoidGate, 1, 2>({r, y})[0]; }

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& grad, const Tensor& r, const Tensor& y) {
  const auto grads = map<SigmoidGateBackward, 2, 3>({grad, r, y});
  return {grads[0], grads[1]};
}

Tensor squared_relu(const Tensor& x) { return map<SquaredRelu, 1, 1>({x})[0]; }

void squared_relu_in_place(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "squared_relu_: x must be contiguous");
  map_into<SquaredRelu, 1, 1>({x}, {x});
}

Tensor squared_relu_backward(const Tensor& grad, const Tensor& y) {
  return map<SquaredReluBackward, 1, 2>({grad, y})[0];
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) {
  m.impl("sigmoid_gate", TORCH_BOX(&vrwkv::sigmoid_gate));
  m.impl("_sigmoid_gate_backward", TORCH_BOX(&vrwkv::sigmoid_gate_backward));
  m.impl("squared_relu", TORCH_BOX(&vrwkv::squared_relu));
  m.impl("squared_relu_", TORCH_BOX(&vrwkv::squared_relu_in_place));
  m.impl("_squared_relu_backward", TORCH_BOX(&vrwkv::squared_relu_backward));
}
