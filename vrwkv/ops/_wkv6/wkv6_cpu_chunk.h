// A chunk of tokens of the RWKV-6 recurrence in one direction: decays, and the weights with which its tokens meet.
//
// Tokens are numbered in the order of the direction, and a token receives from earlier ones. Groups of 4 tokens are
// written out; then neighbouring blocks of 4, 8, 16 ... tokens are joined. The tokens of either block carry the decays
// to the border between them, r of the later block (r_in) those from its start, k of the earlier one (k_out) those to
// its end, so that their weights are plain products; then the decays of the other block are multiplied on, and both are
// one block. No factor exceeds one, none is divided by, and each is a product of at most log2(kChunk) + 1 exponentials
// of sums of log decays.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/cpu_matmul.h"
#include "../common/cpu_memory.h"

namespace vrwkv {

constexpr int64_t kChunk = 32;  // tokens, at most; a power of two
constexpr int64_t kGroup = 4;

// The memory of a chunk: rows of `width` elements, N rounded up to whole blocks of lanes, with zeros behind N.
template <typename acc_t>
struct Chunk {
  int64_t width, size;  // size: N
  int64_t tokens;       // a multiple of kGroup; what is behind the last token has r = k = v = 0 and no decay
  const acc_t* u;       // null: tokens do not meet themselves
  acc_t *r, *k, *v, *w;
  acc_t *r_in, *k_out;  // may be r and k
  acc_t* logs;          // of the decays of each block: a row for each group, the sum in that of its first group
  RowsAhead* ahead;     // of what is loaded and stored next
  acc_t* weights;       // (kChunk, kChunk): of the token of a column for that of a row; zero from the start
};

// What the backward needs of each step of joining blocks, the steps one behind the other: r_in and k_out of before, in
// the rows of their tokens, and the decays of the blocks, in the rows of their first groups.
template <typename acc_t>
struct Kept {
  acc_t *parts, *decays;

  VRWKV_INLINE Kept step(int64_t steps, int64_t width) const {
    return {parts + steps * kChunk * width, decays + steps * kChunk / kGroup * width};
  }
};

// Sums over the lanes of products, as elements (4, columns) of a matrix.
template <typename acc_t, int Bytes, int Columns>
struct Dots {
  using L = Lanes<acc_t, Bytes>;
  typename L::Vector at[4 * Columns] = {};

  VRWKV_INLINE void add(int i, int j, const L& a, const L& b) {
#pragma GCC unroll 4
    for (int part = 0; part < L::kVectors; ++part) at[i * Columns + j] += a.part[part] * b.part[part];
  }
  VRWKV_INLINE void store(acc_t* to, int64_t row) {
    acc_t sums[4 * Columns];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * Columns; i += L::kWidth) {
      sum_lanes<acc_t, Bytes>(at + i);
      std::memcpy(sums + i, at + i, Bytes);
    }
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * row, sums + i * Columns, Columns * sizeof(acc_t));
  }
};

// to (4, 4) = the products of 4 rows of a with 4 rows of b.
template <typename acc_t, int Bytes>
VRWKV_INLINE void multiply_rows(const acc_t* a, const acc_t* b, int64_t width, acc_t* to, int64_t row) {
  using L = Lanes<acc_t, Bytes>;
  constexpr int kColumns = Bytes == 64 ? 4 : 2;  // as many sums as there are registers for
  for (int first = 0; first < 4; first += kColumns) {
    Dots<acc_t, Bytes, kColumns> dots;
    for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
      L right[kColumns];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) right[j] = L::load(b + (first + j) * width + n);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const L left = L::load(a + i * width + n);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) dots.add(i, j, left, right[j]);
      }
    }
    dots.store(to + first, row);
  }
}

// The logarithm of the decay, -e^w.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> log_decay(const Lanes<acc_t, Bytes>& w) {
  using L = Lanes<acc_t, Bytes>;
  const L zero = L::all(0), largest = L::all(30);  // e^-e^30 is zero
  return zero - exp(zero - max(zero - largest, zero - w));
}

// The weights of the group of tokens from `first` on, its r_in, k_out and log decay.
template <typename acc_t, int Bytes>
VRWKV_INLINE void start_group(const Chunk<acc_t>& chunk, int64_t width, int64_t first) {
  using L = Lanes<acc_t, Bytes>;
  chunk.ahead->ask();
  Dots<acc_t, Bytes, 4> dots;
  for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
    const int64_t at = first * width + n;
    L r[4], k[4], log[4], d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = L::load(chunk.r + at + i * width);
      k[i] = L::load(chunk.k + at + i * width);
      log[i] = log_decay(L::load(chunk.w + at + i * width));
      d[i] = decay_of(log[i]).value;
    }
    if (chunk.u) {
      const L u = L::load(chunk.u + n);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) dots.add(i, i, r[i] * u, k[i]);
    }
    const L r2 = r[2] * d[1], r3 = r[3] * d[2], r3_from_1 = r3 * d[1];
#pragma GCC unroll 3
    for (int i = 1; i < 4; ++i) dots.add(i, i - 1, r[i], k[i - 1]);
    dots.add(2, 0, r2, k[0]);
    dots.add(3, 1, r3, k[1]);
    dots.add(3, 0, r3_from_1, k[0]);

    r[0].store(chunk.r_in + at);
    (r[1] * d[0]).store(chunk.r_in + at + width);
    (r2 * d[0]).store(chunk.r_in + at + 2 * width);
    (r3_from_1 * d[0]).store(chunk.r_in + at + 3 * width);
    const L d_last = d[2] * d[3];
    (k[0] * d[1] * d_last).store(chunk.k_out + at);
    (k[1] * d_last).store(chunk.k_out + at + width);
    (k[2] * d[3]).store(chunk.k_out + at + 2 * width);
    k[3].store(chunk.k_out + at + 3 * width);
    ((log[0] + log[1]) + (log[2] + log[3])).store(chunk.logs + first / kGroup * width + n);
  }
  dots.store(chunk.weights + first * kChunk + first, kChunk);
}

// Join the blocks of `half` tokens from `left` and from `left` + `half` on.
template <typename acc_t, int Bytes, bool Keep>
VRWKV_INLINE void join_blocks(const Chunk<acc_t>& chunk, int64_t width, int64_t left, int64_t half,
                              const Kept<acc_t>& kept) {
  using L = Lanes<acc_t, Bytes>;
  const int64_t right = left + half, end = std::min(right + half, chunk.tokens);
  for (int64_t i = right; i < end; i += 4) {
    for (int64_t j = left; j < right; j += 4) {
      multiply_rows<acc_t, Bytes>(chunk.r_in + i * width, chunk.k_out + j * width, width,
                                  chunk.weights + i * kChunk + j, kChunk);
    }
  }
  acc_t *const left_log = chunk.logs + left / kGroup * width, *const right_log = chunk.logs + right / kGroup * width;
  for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
    const L log_of_left = L::load(left_log + n), log_of_right = L::load(right_log + n);
    const L left_decay = decay_of(log_of_left).value, right_decay = decay_of(log_of_right).value;
    const auto multiply = [&](acc_t* rows, int64_t first, int64_t last, const L& decay) __attribute__((always_inline)) {
      for (int64_t at = first * width + n; at < last * width; at += width) {
        const L part = L::load(rows + at);
        if (Keep) part.store(kept.parts + at);
        (part * decay).store(rows + at);
      }
    };
    multiply(chunk.r_in, right, end, left_decay);
    multiply(chunk.k_out, left, right, right_decay);
    if (Keep) {
      left_decay.store(kept.decays + left / kGroup * width + n);
      right_decay.store(kept.decays + right / kGroup * width + n);
    }
    (log_of_left + log_of_right).store(left_log + n);
  }
}

// All weights of a chunk; then r_in holds the decays from the start of the chunk, k_out those to its end, and the first
// row of logs that of all its decays.
template <typename acc_t, int Bytes, bool Keep>
VRWKV_INLINE void weigh_tokens(const Chunk<acc_t>& chunk, int64_t width, Kept<acc_t> kept) {
  for (int64_t first = 0; first < chunk.tokens; first += kGroup) start_group<acc_t, Bytes>(chunk, width, first);
  for (int64_t half = kGroup; half < chunk.tokens; half *= 2) {
    for (int64_t left = 0; left + half < chunk.tokens; left += 2 * half) {
      join_blocks<acc_t, Bytes, Keep>(chunk, width, left, half, kept);
    }
    if (Keep) kept = kept.step(1, width);
  }
}

}  // namespace vrwkv
