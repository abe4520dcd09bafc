// What the forward pass of the RWKV-6 recurrence lends to the backward one: all its tensors are contiguous, on one CUDA
// device and not empty.
#pragma once

#include "../common/checks.h"

namespace vrwkv {

// The states that enter each chunk of k and v, of u's dtype: (B, H, chunks, 2, width, width), from the left and from
// the right, width being N rounded up to a multiple of 8, with zeros behind N. Empty where there is one chunk.
Tensor wkv6_states(const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u);

// y of wkv6, from its states.
void wkv6_outputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
                  const Tensor& states, const Tensor& y);

}  // namespace vrwkv
