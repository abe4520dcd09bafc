// Small kernels with known results and known mistakes, for the tests of the emulation itself.
#include <common/cuda_utils.cuh>

using vrwkv::Global;
using vrwkv::Shared;
using vrwkv::shared_at;

// Sum over the block: shuffles within warps, shared memory between them.
__global__ void block_sum(Global<const float> x, Global<float> out) {
  const Shared<float> warps = shared_at<float>(0);
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned int i = 0; i < blockDim.x / 32; ++i) sum += warps[i];
    out[blockIdx.x] = sum;
  }
}

// Each warp multiplies whole numbers; the lanes' places are those that the PTX manual gives.
__global__ void tensor_core(Global<const float> x, Global<float> out) {
  const int i = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  const auto a = [&](int row, int k) -> float { return x[(row * 8 + k) % 96]; };
  const auto b = [&](int k, int column) -> float { return x[(k * 8 + column) * 5 % 96]; };
  const float left[4] = {a(i, j), a(i + 8, j), a(i, j + 4), a(i + 8, j + 4)}, right[2] = {b(j, i), b(j + 4, i)};
  float c[4] = {};
  vrwkv::multiply_tf32(c, left, right);
  for (int element = 0; element < 4; ++element) {
    const int place = (i + element / 2 * 8) * 8 + 2 * j + element % 2;
    if (place < 96) out[place] = c[element];
  }
}

__global__ void approximate_exp2(Global<const float> x, Global<float> out) {
  out[threadIdx.x] = vrwkv::exp2_approximate(x[threadIdx.x]);
}

__global__ void approximate_reciprocal(Global<const float> x, Global<float> out) {
  out[threadIdx.x] = vrwkv::reciprocal_approximate(x[threadIdx.x]);
}

__global__ void shuffle_of_half_a_warp(Global<const float> x, Global<float> out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(~0u, x[threadIdx.x], 1);
}

__global__ void different_barriers(Global<const float>, Global<float>) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_without_all(Global<const float>, Global<float>) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void unwritten_shared(Global<const float>, Global<float> out) {
  out[threadIdx.x] = shared_at<float>(0)[threadIdx.x];
}

__global__ void race(Global<const float> x, Global<float> out) {
  const Shared<float> shared = shared_at<float>(0);
  shared[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x > 0) out[threadIdx.x] = shared[threadIdx.x - 1];
}

__global__ void overwrite_after_read(Global<const float> x, Global<float> out) {
  const Shared<float> shared = shared_at<float>(0);
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
  shared[threadIdx.x] = 0;
}

__global__ void shared_out_of_bounds(Global<const float> x, Global<float>) {
  shared_at<float>(0)[threadIdx.x + 1] = x[threadIdx.x];
}

__global__ void read_out_of_bounds(Global<const float> x, Global<float> out) { out[threadIdx.x] = x[threadIdx.x + 1]; }

__global__ void write_out_of_bounds(Global<const float> x, Global<float> out) {
  out[threadIdx.x - 1ll] = x[threadIdx.x];
}

__global__ void misaligned_vector(Global<const float> x, Global<float> out) {
  using V = vrwkv::Vector<float, 4>;
  if (threadIdx.x == 0) vrwkv::vector_at<V>(out) = vrwkv::vector_at<V>(x + 1);
}

// Runs the kernel on x (n,) with one block of n threads and n floats of shared memory; null, or the error.
extern "C" __attribute__((visibility("default"))) const char* self_test(const char* name, float* x, float* out, int n) {
  static std::string message;
  const std::pair<const char*, void (*)(Global<const float>, Global<float>)> kernels[] = {
      {"block_sum", block_sum},
      {"tensor_core", tensor_core},
      {"approximate_exp2", approximate_exp2},
      {"approximate_reciprocal", approximate_reciprocal},
      {"shuffle_of_half_a_warp", shuffle_of_half_a_warp},
      {"different_barriers", different_barriers},
      {"barrier_without_all", barrier_without_all},
      {"unwritten_shared", unwritten_shared},
      {"race", race},
      {"overwrite_after_read", overwrite_after_read},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"read_out_of_bounds", read_out_of_bounds},
      {"write_out_of_bounds", write_out_of_bounds},
      {"misaligned_vector", misaligned_vector},
  };
  for (const auto& [known, kernel] : kernels) {
    if (std::string(known) != name) continue;
    const auto function = kernel;
    try {
      emulation::run_grid(1, dim3(n), n * sizeof(float),
                          [&] { function(Global<const float>(x, n), Global<float>(out, n)); });
      return nullptr;
    } catch (const std::exception& error) {
      message = error.what();
      return message.c_str();
    }
  }
  return "no such kernel";
}
