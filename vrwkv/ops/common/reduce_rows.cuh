// Sums of partial results over blocks, in an order that depends on nothing but their number.
#pragma once

#include <vector>

#include "cuda_utils.cuh"

namespace vrwkv {
namespace {

constexpr int kReduceColumns = 32;
constexpr int kReduceLanes = 32;
constexpr int kMaxSums = 4;

template <typename acc_t>
struct Outputs {
  Global<acc_t> each[kMaxSums];
};

// For each sum, `columns` totals from partials (sums, rows, columns). Each of the block's lanes adds up every
// kReduceLanes-th row, with eight loads under way, then the lanes are added in order; double, because rows are few
// beside the tokens that they stand for.
template <typename acc_t>
__global__ void __launch_bounds__(kReduceColumns* kReduceLanes)
    reduce_rows_kernel(Global<const acc_t> partials, Outputs<acc_t> out, int64_t sums, int64_t rows, int64_t columns) {
  const Shared<double> totals = shared_at<double>(0);
  const int64_t groups = (columns + kReduceColumns - 1) / kReduceColumns;
  for (int64_t task = blockIdx.x; task < sums * groups; task += gridDim.x) {
    const int64_t sum = task / groups, column = task % groups * kReduceColumns + threadIdx.x;
    double total = 0;
    if (column < columns) {
#pragma unroll 8
      for (int64_t row = threadIdx.y; row < rows; row += kReduceLanes) {  // count: rows / 32, unrolled 8
        total += static_cast<double>(partials[(sum * rows + row) * columns + column]);
      }
    }
    totals[threadIdx.y * kReduceColumns + threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {  // count: 1 / 32
      for (int lane = 1; lane < kReduceLanes; ++lane) total += totals[lane * kReduceColumns + threadIdx.x];
#pragma unroll
      for (int i = 0; i < kMaxSums; ++i) {
        if (i == sum) out.each[i][column] = static_cast<acc_t>(total);
      }
    }
    __syncthreads();  // before the next task overwrites the totals
  }
}

template <typename acc_t>
void reduce_rows(const Context& context, const Tensor& partials, const std::vector<Tensor>& outs, int64_t rows,
                 int64_t columns) {
  const int64_t sums = outs.size();
  Outputs<acc_t> out{};
  for (int64_t i = 0; i < sums; ++i) out.each[i] = global<acc_t>(outs[i]);
  launch(context, reduce_rows_kernel<acc_t>, sums * divide_up(columns, kReduceColumns),
         dim3(kReduceColumns, kReduceLanes), kReduceColumns * kReduceLanes * sizeof(double),
         global<const acc_t>(partials), out, sums, rows, columns);
}

}  // namespace
}  // namespace vrwkv
