// Products of matrices in tiles of 16 rows and 8 columns, each by one warp: by tensor cores for half precision, by
// multiply-adds otherwise. Both keep a tile in the warp's lanes alike: lane 4 i + j has the elements 0 to 3 at
// (i, 2 j), (i, 2 j + 1), (i + 8, 2 j), (i + 8, 2 j + 1).
#pragma once

#include "cuda_utils.cuh"

namespace vrwkv {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 8;

// The tiles of a warp: `first`, `first + step`, ... are their first columns, those from `limit` on are left out.
struct TileColumns {
  int first, step, limit;

  __device__ __forceinline__ int of(int tile) const { return first + tile * step; }
  __device__ __forceinline__ bool has(int tile) const { return of(tile) < limit; }
};

// sums += the products a(row, k) b(k, column) for k < `count`, a multiple of 8; row in [0, 16).
//
// In half precision operands are rounded to TF32, which has the 11 bits of fp16 and the range of fp32: inputs are
// exact in it, and states and decayed inputs neither overflow nor vanish, as they would in fp16.
template <typename scalar_t, int kTiles, typename acc_t, typename A, typename B>
__device__ __forceinline__ void multiply(acc_t (&sums)[kTiles][4], int count, const TileColumns& columns, const A& a,
                                         const B& b) {
  const int lane = threadIdx.x % 32, i = lane / 4, j = lane % 4;
  if constexpr (sizeof(scalar_t) == 2 && kHasTf32) {
#pragma unroll 1
    for (int k = 0; k < count; k += 8) {  // count: depth / 8
      const float left[4] = {to_tf32(a(i, k + j)), to_tf32(a(i + 8, k + j)), to_tf32(a(i, k + j + 4)),
                             to_tf32(a(i + 8, k + j + 4))};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (!columns.has(tile)) continue;
        const int column = columns.of(tile) + i;
        const float right[2] = {to_tf32(b(k + j, column)), to_tf32(b(k + j + 4, column))};
        multiply_tf32(sums[tile], left, right);
      }
    }
  } else {
#pragma unroll(kTiles > 1 ? 2 : 4)
    for (int k = 0; k < count; ++k) {  // count: depth, unrolled copies
      const acc_t upper = a(i, k), lower = a(i + 8, k);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (!columns.has(tile)) continue;
        const acc_t left = b(k, columns.of(tile) + 2 * j), right = b(k, columns.of(tile) + 2 * j + 1);
        sums[tile][0] += upper * left;
        sums[tile][1] += upper * right;
        sums[tile][2] += lower * left;
        sums[tile][3] += lower * right;
      }
    }
  }
}

// Call visit(tile, element, row, column) for what the lane holds of a warp's tiles.
template <int kTiles, typename Visit>
__device__ __forceinline__ void each_element(const TileColumns& columns, const Visit& visit) {
  const int lane = threadIdx.x % 32, i = lane / 4, j = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (!columns.has(tile)) continue;
#pragma unroll
    for (int element = 0; element < 4; ++element) {
      visit(tile, element, i + element / 2 * 8, columns.of(tile) + 2 * j + element % 2);
    }
  }
}

// The sum over a warp's lanes, in each of them.
template <typename acc_t>
__device__ __forceinline__ acc_t sum_over_warp(acc_t x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(~0u, x, bits);
  return x;
}

}  // namespace
}  // namespace vrwkv
