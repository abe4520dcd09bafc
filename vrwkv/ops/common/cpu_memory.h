// Memory for the outputs of the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace vrwkv {

// An uninitialised tensor like `tensor`. Memory of this size comes from the system with every call, and its pages cost
// several times what a kernel needs to fill them: ask for huge ones, as torch does under THP_MEM_ALLOC_ENABLE=1.
inline torch::stable::Tensor empty_output(const torch::stable::Tensor& tensor) {
  torch::stable::Tensor output = torch::stable::empty_like(tensor);
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

}  // namespace vrwkv
