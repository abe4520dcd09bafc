// Memory of the CPU kernels: for their outputs, and of a thread.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace vrwkv {

// An uninitialised tensor of the shape of `tensor`. Memory of this size comes from the system with every call, and its
// pages cost several times what a kernel needs to fill them: ask for huge ones, as torch does under
// THP_MEM_ALLOC_ENABLE=1.
inline torch::stable::Tensor empty_output(const torch::stable::Tensor& tensor, ScalarType dtype) {
  torch::stable::Tensor output = torch::stable::new_empty(tensor, tensor.sizes(), dtype);
#ifdef __linux__
  constexpr int64_t kLarge = 32 << 20;  // from here on glibc maps memory anew for each request
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = output.numel() * output.element_size();
  if (bytes >= kLarge) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(output.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), bytes - kPage, MADV_HUGEPAGE);  // a hint: failing changes nothing
  }
#endif
  return output;
}

inline torch::stable::Tensor empty_output(const torch::stable::Tensor& tensor) {
  return empty_output(tensor, tensor.scalar_type());
}

// Memory of one thread for the part of a call that it works on, kept from call to call; aligned for any vector.
template <typename acc_t>
acc_t* scratch_memory(int64_t size) {
  thread_local std::vector<acc_t> memory;
  constexpr int64_t kAlign = 64 / sizeof(acc_t);
  if (static_cast<int64_t>(memory.size()) < size + kAlign) memory.resize(size + kAlign);
  return memory.data() + (-(reinterpret_cast<uintptr_t>(memory.data()) / sizeof(acc_t)) & (kAlign - 1));
}

// Asks the second-level cache for rows of memory that are used soon, a share at a time between other work. Rows that
// lie outside of their tensor do no harm.
class RowsAhead {
 public:
  // `count` rows of each tensor are asked for, in `times` calls of ask.
  RowsAhead(int64_t count, int64_t times) : count_(count), times_(times) {}

  template <typename scalar_t>
  void add(const scalar_t* first, int64_t step, int64_t size) {
    const int64_t element = sizeof(scalar_t);
    tensors_[tensor_count_++] = {reinterpret_cast<uintptr_t>(first), step * element, size * element};
    share_ = (tensor_count_ * count_ + times_ - 1) / times_;
  }

  __attribute__((noinline)) void ask() {
    for (int64_t i = 0; i < share_ && row_ < count_; ++i) {
      const Tensor& tensor = tensors_[tensor_];
      const char* const row = reinterpret_cast<const char*>(tensor.first + row_ * tensor.step);
      for (int64_t byte = 0; byte < tensor.bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++tensor_ == tensor_count_) {
        tensor_ = 0;
        ++row_;
      }
    }
  }

 private:
  struct Tensor {
    uintptr_t first;
    int64_t step, bytes;
  };
  static constexpr int kMaxTensors = 9;
  Tensor tensors_[kMaxTensors];
  int tensor_count_ = 0, tensor_ = 0;
  int64_t count_, times_, share_ = 0, row_ = 0;
};

}  // namespace vrwkv
