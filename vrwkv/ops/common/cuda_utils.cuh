// What every CUDA kernel of the package shares: memory access, launches, and arithmetic that is no library call.
//
// Kernels reach memory only through Global and Shared, and are launched only through launch(). Under nvcc these are
// plain pointers and <<<>>>; tests/cuda compiles the same sources with g++ and puts checked pointers and fibres in
// their place.
#pragma once

#if !defined(VRWKV_EMULATE_CUDA) && !defined(USE_CUDA)
#define USE_CUDA  // or torch hides the CUDA part of its C interface
#endif

#include <math.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "checks.h"

#ifdef VRWKV_EMULATE_CUDA
#include "emulate_cuda.h"
#else
#include <cuda_runtime.h>

namespace vrwkv {

template <typename T>
using Global = T*;

template <typename T>
using Shared = T*;

// The block's dynamic shared memory from byte `offset` on.
template <typename T>
__device__ __forceinline__ Shared<T> shared_at(int offset) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory + offset);
}

// The elements from `position` on as one V, a vector that fills an aligned access.
template <typename V, typename T>
__device__ __forceinline__ const V& vector_at(const T* position) {
  return *reinterpret_cast<const V*>(position);
}

template <typename V, typename T>
__device__ __forceinline__ V& vector_at(T* position) {
  return *reinterpret_cast<V*>(position);
}

// Element `times * stride` from `position` on. The product is opaque to the compiler: the address of each element is
// one multiplication and addition, and none is computed before the loop around it, from where it would hold registers.
template <typename T>
__device__ __forceinline__ T& strided(T* position, int stride, int times) {
  int64_t bytes;
  asm volatile("mul.wide.s32 %0, %1, %2;" : "=l"(bytes) : "r"(stride), "r"(times * static_cast<int>(sizeof(T))));
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return *reinterpret_cast<T*>(reinterpret_cast<Byte*>(position) + bytes);
}

// `x`, opaque to the compiler: what follows from it is computed here, not before the branch or loop around, where it
// would hold registers and often be computed in vain.
__device__ __forceinline__ int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ int64_t computed_here(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// 2^x with a relative error below 2^-22 and 1 / x with one below 2^-23, by one instruction each: subnormal numbers
// count as zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasTf32 = false;
#else
constexpr bool kHasTf32 = true;
#endif

// The nearest number of 11 significant bits.
__device__ __forceinline__ float to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// c (16, 8) += a (16, 8) b (8, 8) by the warp's tensor core. Lane 4 i + j holds
//   a: (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4);  b: (j, i), (j + 4, i);
//   c: (i, 2 j), (i, 2 j + 1), (i + 8, 2 j), (i + 8, 2 j + 1).
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

template <typename T>
Global<T> global(const torch::stable::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

// Makes the device of `tensor` current for its lifetime and holds that device's current stream.
class Context {
 public:
  explicit Context(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
           const Arguments&... arguments) const {
    // clang-format off
    kernel<<<blocks, threads, shared_bytes, stream_>>>(arguments...);
    // clang-format on
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

constexpr int64_t kMaxBlocks = 2147483647;

}  // namespace vrwkv
#endif

namespace vrwkv {

template <typename scalar_t, int N>
struct alignas(N * sizeof(scalar_t)) Vector {
  scalar_t values[N];
};

// Elements of one 128-bit access.
template <typename scalar_t>
constexpr int kVector = 16 / sizeof(scalar_t);

// e^x. For float 2^(x log2 e): the instruction is off by 2^-22 of the result, rounding the product and log2 e by |x|
// 2^-24
// + |x| 2^-26 more, which grows as the result shrinks: where e^x is a weight beside a weight of one, and x <= 0, the
// error is below 2^-22 of that one, for |x| e^-|x| <= 0.37. Results below 2^-126 are zero: beside one they do not count
// either.
__device__ __forceinline__ float exponential(float x) { return exp2_approximate(x * 1.4426950408889634f); }

// For double 2^n times the Taylor series in r = x - n log 2, within two units in the last place; zero below e^-708.
// exp() would be a call on some architectures, around which registers spill.
__device__ __forceinline__ double exponential(double x) {
  const double n = rint(x * 1.4426950408889634);
  const double r = fma(n, -2.3190468138462996e-17, fma(n, -0.69314718055994529, x));
  double sum = 1.0 / 6227020800;
  constexpr double kInverseFactorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
#pragma unroll
  for (int i = 0; i < 13; ++i) sum = fma(sum, r, kInverseFactorials[i]);
  if (x < -708) return 0;
  if (x > 709) return INFINITY;
  return sum * __longlong_as_double((static_cast<long long>(n) + 1023) << 52);
}

// 1 / x; for float zero where |x| > 2^126, infinite where |x| < 2^-126.
__device__ __forceinline__ float reciprocal(float x) { return reciprocal_approximate(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// Numbers of tasks in up to three directions.
struct Tasks {
  int64_t x, y, z;

  Tasks(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

// Launches a kernel that strides over its tasks with its blocks, so that no number of tasks exceeds a grid.
template <typename... Parameters, typename... Arguments>
void launch(const Context& context, void (*kernel)(Parameters...), const Tasks& tasks, dim3 threads,
            size_t shared_bytes, const Arguments&... arguments) {
  if (tasks.x == 0 || tasks.y == 0 || tasks.z == 0) return;
  const auto blocks = [](int64_t number, int64_t limit) {
    return static_cast<unsigned int>(std::min({number, limit, kMaxBlocks}));
  };
  context.run(kernel, dim3(blocks(tasks.x, kMaxBlocks), blocks(tasks.y, 65535), blocks(tasks.z, 65535)), threads,
              shared_bytes, arguments...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `elements` elements may be read and written 128 bits at a time, if they start at such an address.
inline bool has_vector_rows(const Tensor& tensor, int64_t elements) {
  return elements * tensor.element_size() % 16 == 0;
}

inline bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// `tensor`, or a copy that is contiguous and starts where 128 bits may be read: how a call is cut then depends on
// shapes alone. Only a view from within another tensor, at an odd offset, costs the copy.
inline Tensor aligned(const Tensor& tensor) {
  const Tensor result = torch::stable::contiguous(tensor);
  return is_aligned(result) ? result : torch::stable::clone(result);
}

inline std::vector<Tensor> aligned_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(aligned(tensor));
  return result;
}

}  // namespace vrwkv
