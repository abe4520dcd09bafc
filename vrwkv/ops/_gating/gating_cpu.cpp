// The pointwise functions on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <tuple>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"
#include "gating_checks.h"

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

template <typename scalar_t, typename Function, size_t Inputs, size_t Outputs>
struct MapBlocks {
  template <int Bytes>
  static VRWKV_INLINE void run(const std::array<const scalar_t*, Inputs>& inputs,
                               const std::array<scalar_t*, Outputs>& outputs, int64_t begin, int64_t end) {
    using L = Lanes<accumulate_t<scalar_t>, Bytes>;
    const auto from = inputs;  // copies, so that no store to an output can change a pointer
    const auto to = outputs;
    each_block<accumulate_t<scalar_t>>(begin, end, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      std::array<L, Inputs> in;
      for (size_t j = 0; j < Inputs; ++j) in[j] = read_block<scalar_t, Bytes>(from[j] + i, count);
      const std::array<L, Outputs> out = Function::apply(in);
      for (size_t j = 0; j < Outputs; ++j) write_block<scalar_t, Bytes>(out[j], to[j] + i, count);
    });
  }
};

template <typename Function, typename scalar_t, size_t Inputs, size_t Outputs>
void map_typed(const std::array<Tensor, Inputs>& inputs, const std::array<Tensor, Outputs>& outputs, scalar_t) {
  std::array<const scalar_t*, Inputs> from;
  std::array<scalar_t*, Outputs> to;
  for (size_t j = 0; j < Inputs; ++j) from[j] = inputs[j].template const_data_ptr<scalar_t>();
  for (size_t j = 0; j < Outputs; ++j) to[j] = outputs[j].template mutable_data_ptr<scalar_t>();
  static const auto function = Dispatch<MapBlocks<scalar_t, Function, Inputs, Outputs>, const decltype(from)&,
                                        const decltype(to)&, int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, inputs[0].numel(), kGrain,
                              [&](int64_t begin, int64_t end) { function(from, to, begin, end); });
}

// Writes Function of all elements of the inputs to the outputs; all are contiguous.
template <typename Function, size_t Inputs, size_t Outputs>
void map_into(const std::array<Tensor, Inputs>& inputs, const std::array<Tensor, Outputs>& outputs) {
  dispatch_floating(inputs[0].scalar_type(), [&](auto zero) { map_typed<Function>(inputs, outputs, zero); });
}

// Applies Function to all elements of the inputs; returns its outputs, each like the last input.
template <typename Function, size_t Outputs, size_t Inputs>
std::array<Tensor, Outputs> map(std::array<Tensor, Inputs> inputs) {
  std::array<Tensor, Outputs> outputs;
  for (Tensor& input : inputs) input = contiguous(input);
  for (Tensor& output : outputs) output = empty_output(inputs.back());
  map_into<Function>(inputs, outputs);
  return outputs;
}

Tensor sigmoid_gate(const Tensor& r, const Tensor& y) {
  check_sigmoid_gate("sigmoid_gate", r, y);
  return map<SigmoidGate, 1, 2>({r, y})[0];
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& grad, const Tensor& r, const Tensor& y) {
  check_sigmoid_gate_backward(grad, r, y);
  const auto grads = map<SigmoidGateBackward, 2, 3>({grad, r, y});
  return {grads[0], grads[1]};
}

Tensor squared_relu(const Tensor& x) {
  check_floating("squared_relu", "x", x);
  return map<SquaredRelu, 1, 1>({x})[0];
}

void squared_relu_in_place(Tensor x) {
  check_squared_relu_in_place(x);
  map_into<SquaredRelu, 1, 1>({x}, {x});
}

Tensor squared_relu_backward(const Tensor& grad, const Tensor& y) {
  check_squared_relu_backward(grad, y);
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
