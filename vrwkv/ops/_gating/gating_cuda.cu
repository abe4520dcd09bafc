// The pointwise functions on CUDA: every input is read once and every output written once.
#include <tuple>

#include "../common/cuda_utils.cuh"
#include "gating_checks.h"

namespace vrwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTensors = 3;

// ---- Device code ----

// sigmoid(x) from e^-|x|, which cannot overflow.
template <typename acc_t>
__device__ __forceinline__ acc_t sigmoid(acc_t x) {
  const acc_t e = exponential(-fabs(x));
  return (x < 0 ? e : acc_t(1)) * reciprocal(acc_t(1) + e);
}

// Each function maps the values of its inputs at one place to those of its outputs.
struct SigmoidGate {
  static constexpr int kInputs = 2, kOutputs = 1;
  template <typename acc_t>
  static __device__ __forceinline__ void apply(const acc_t (&in)[kInputs], acc_t (&out)[kOutputs]) {
    out[0] = sigmoid(in[0]) * in[1];
  }
};

struct SigmoidGateBackward {
  static constexpr int kInputs = 3, kOutputs = 2;
  template <typename acc_t>
  static __device__ __forceinline__ void apply(const acc_t (&in)[kInputs], acc_t (&out)[kOutputs]) {
    const acc_t gate = sigmoid(in[1]);
    out[1] = in[0] * gate;
    out[0] = out[1] * in[2] * (acc_t(1) - gate);
  }
};

// Written so that NaN stays NaN.
template <typename acc_t>
__device__ __forceinline__ acc_t positive(acc_t x) {
  return x < 0 ? acc_t(0) : x;
}

struct SquaredRelu {
  static constexpr int kInputs = 1, kOutputs = 1;
  template <typename acc_t>
  static __device__ __forceinline__ void apply(const acc_t (&in)[kInputs], acc_t (&out)[kOutputs]) {
    out[0] = positive(in[0]) * positive(in[0]);
  }
};

// From the output: its square root is relu(x).
struct SquaredReluBackward {
  static constexpr int kInputs = 2, kOutputs = 1;
  template <typename acc_t>
  static __device__ __forceinline__ void apply(const acc_t (&in)[kInputs], acc_t (&out)[kOutputs]) {
    out[0] = in[0] * (2 * sqrt(in[1]));
  }
};

template <typename scalar_t>
struct Pointers {
  Global<const scalar_t> in[kMaxTensors];
  Global<scalar_t> out[kMaxTensors];
};

// ---- Kernel ----

// A thread takes V neighbouring elements at a time; `vectors` is the number of elements over V.
template <typename Function, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads) map_kernel(Pointers<scalar_t> pointers, int64_t vectors) {
  using acc_t = accumulate_t<scalar_t>;
  using Values = Vector<scalar_t, V>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < vectors; i += stride) {  // count: 1
    Values in[Function::kInputs], out[Function::kOutputs];
#pragma unroll
    for (int j = 0; j < Function::kInputs; ++j) in[j] = vector_at<Values>(pointers.in[j] + i * V);
#pragma unroll
    for (int element = 0; element < V; ++element) {
      acc_t from[Function::kInputs], to[Function::kOutputs];
#pragma unroll
      for (int j = 0; j < Function::kInputs; ++j) from[j] = static_cast<acc_t>(in[j].values[element]);
      Function::apply(from, to);
#pragma unroll
      for (int j = 0; j < Function::kOutputs; ++j) out[j].values[element] = static_cast<scalar_t>(to[j]);
    }
#pragma unroll
    for (int j = 0; j < Function::kOutputs; ++j) vector_at<Values>(pointers.out[j] + i * V) = out[j];
  }
}

// ---- Host functions ----

template <typename Function, typename scalar_t>
void map_typed(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, scalar_t) {
  const Context context(inputs[0]);
  Pointers<scalar_t> pointers{};
  for (size_t j = 0; j < inputs.size(); ++j) pointers.in[j] = global<const scalar_t>(inputs[j]);
  for (size_t j = 0; j < outputs.size(); ++j) pointers.out[j] = global<scalar_t>(outputs[j]);
  const int64_t elements = inputs[0].numel();
  const auto vectorizable = [&](const Tensor& tensor) {
    return has_vector_rows(tensor, elements) && is_aligned(tensor);
  };
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t vectors = elements / kWidth;
    launch(context, map_kernel<Function, scalar_t, kWidth>, divide_up(vectors, kThreads), dim3(kThreads), 0, pointers,
           vectors);
  };
  if (std::all_of(inputs.begin(), inputs.end(), vectorizable)) {  // outputs are as large, and new or the input itself
    run(std::integral_constant<int, kVector<scalar_t>>());
  } else {
    run(std::integral_constant<int, 1>());
  }
}

// Writes Function of all elements of the inputs to the outputs; all are contiguous.
template <typename Function>
void map_into(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
  dispatch_floating(inputs[0].scalar_type(), [&](auto zero) { map_typed<Function>(inputs, outputs, zero); });
}

// Applies Function to all elements of the inputs; returns its outputs, each like the last input.
template <typename Function>
std::vector<Tensor> map(std::vector<Tensor> inputs) {
  for (Tensor& input : inputs) input = contiguous(input);
  std::vector<Tensor> outputs;
  for (int j = 0; j < Function::kOutputs; ++j) outputs.push_back(torch::stable::empty_like(inputs.back()));
  map_into<Function>(inputs, outputs);
  return outputs;
}

Tensor sigmoid_gate(const Tensor& r, const Tensor& y) {
  check_sigmoid_gate("sigmoid_gate", r, y);
  return map<SigmoidGate>({r, y})[0];
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor& grad, const Tensor& r, const Tensor& y) {
  check_sigmoid_gate_backward(grad, r, y);
  const std::vector<Tensor> grads = map<SigmoidGateBackward>({grad, r, y});
  return {grads[0], grads[1]};
}

Tensor squared_relu(const Tensor& x) {
  check_floating("squared_relu", "x", x);
  return map<SquaredRelu>({x})[0];
}

void squared_relu_in_place(Tensor x) {
  check_squared_relu_in_place(x);
  map_into<SquaredRelu>({x}, {x});
}

Tensor squared_relu_backward(const Tensor& grad, const Tensor& y) {
  check_squared_relu_backward(grad, y);
  return map<SquaredReluBackward>({grad, y})[0];
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CUDA, m) {
  m.impl("sigmoid_gate", TORCH_BOX(&vrwkv::sigmoid_gate));
  m.impl("_sigmoid_gate_backward", TORCH_BOX(&vrwkv::sigmoid_gate_backward));
  m.impl("squared_relu", TORCH_BOX(&vrwkv::squared_relu));
  m.impl("squared_relu_", TORCH_BOX(&vrwkv::squared_relu_in_place));
  m.impl("_squared_relu_backward", TORCH_BOX(&vrwkv::squared_relu_backward));
}
