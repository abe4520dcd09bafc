// Products of small matrices that lie in cache, with sums in registers.
#pragma once

#include "cpu_simd.h"

namespace vrwkv {

// A matrix in memory: element (i, j) lies at data[i * row + j * column].
template <typename acc_t>
struct Matrix {
  const acc_t* data;
  int64_t row, column;

  VRWKV_INLINE Matrix from(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  VRWKV_INLINE Matrix transposed() const { return {data, column, row}; }
};

// `Rows` rows and `Blocks` blocks of lanes of a product.
template <typename acc_t, int Bytes, int Rows, int Blocks>
struct Product {
  using L = Lanes<acc_t, Bytes>;
  static constexpr int64_t kRows = Rows;
  L sums[Rows][Blocks];

  VRWKV_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Blocks; ++j) sums[i][j] = L::all(0);
    }
  }
  VRWKV_INLINE void load(const acc_t* from, int64_t row) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Blocks; ++j) sums[i][j] = L::load(from + i * row + j * kLanes<acc_t>);
    }
  }

  // sums += a b, over `count` columns of a; the elements of a row of b are neighbours.
  VRWKV_INLINE void add(const Matrix<acc_t>& a, const Matrix<acc_t>& b, int64_t count) {
    const acc_t *a_column = a.data, *b_row = b.data;
    int64_t row = a.row;
    // Of strided elements with a stride that it knows GCC 12 loads whole vectors, to take one lane of each.
    if (!(__builtin_constant_p(row) && row == 1)) asm("" : "+r"(row));
    for (int64_t k = 0; k < count; ++k, a_column += a.column, b_row += b.row) {
      L right[Blocks];
#pragma GCC unroll 4
      for (int j = 0; j < Blocks; ++j) right[j] = L::load(b_row + j * kLanes<acc_t>);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const L left = L::all(a_column[i * row]);
#pragma GCC unroll 4
        for (int j = 0; j < Blocks; ++j) sums[i][j] = sums[i][j] + left * right[j];
      }
    }
  }

  // Call function(row, column, sum) for each block of lanes.
  template <typename Function>
  VRWKV_INLINE void each(const Function& function) const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Blocks; ++j) function(i, j * kLanes<acc_t>, sums[i][j]);
    }
  }
  VRWKV_INLINE void store(acc_t* to, int64_t row) const {
    each([&](int64_t i, int64_t j, const L& sum) __attribute__((always_inline)) { sum.store(to + i * row + j); });
  }
};

// Call function(product, i, j) for the parts of a matrix of `rows`, a multiple of 4, times `columns`, a multiple of
// kLanes: with an empty Product, the number of its first row and of its first column.
template <typename acc_t, int Bytes, typename Function>
VRWKV_INLINE void each_product(int64_t rows, int64_t columns, const Function& function) {
  constexpr int kRows = Bytes == 64 ? 8 : 4, kBlocks = Bytes == 64 ? 2 : 1;
  const auto columns_of = [&](auto product_rows, int64_t i) __attribute__((always_inline)) {
    constexpr int kProductRows = decltype(product_rows)::value;
    int64_t j = 0;
    for (; j + kBlocks * kLanes<acc_t> <= columns; j += kBlocks * kLanes<acc_t>) {
      function(Product<acc_t, Bytes, kProductRows, kBlocks>(), i, j);
    }
    if (kBlocks > 1 && j < columns) function(Product<acc_t, Bytes, kProductRows, 1>(), i, j);
  };
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) columns_of(std::integral_constant<int, kRows>(), i);
  if (kRows > 4 && i < rows) columns_of(std::integral_constant<int, 4>(), i);
}

// to = the transpose of `from`, a square of `size` rows, a multiple of kLanes.
template <typename acc_t, int Bytes>
VRWKV_INLINE void transpose(const acc_t* from, acc_t* to, int64_t size) {
  using L = Lanes<acc_t, Bytes>;
  constexpr int kSquare = L::kWidth;
  for (int64_t i = 0; i < size; i += kSquare) {
    for (int64_t j = 0; j < size; j += kSquare) {
      typename L::Vector square[kSquare];
      for (int row = 0; row < kSquare; ++row) {
        square[row] = *reinterpret_cast<const typename L::Unaligned*>(from + (i + row) * size + j);
      }
      transpose_square<acc_t, Bytes>(square);
      for (int row = 0; row < kSquare; ++row) {
        *reinterpret_cast<typename L::Unaligned*>(to + (j + row) * size + i) = square[row];
      }
    }
  }
}

}  // namespace vrwkv
