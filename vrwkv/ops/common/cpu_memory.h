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

}  // namespace vrwkv
