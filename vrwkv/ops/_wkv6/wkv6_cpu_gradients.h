// The gradients of a chunk of the RWKV-6 recurrence in one direction.
//
// With P_ij the decays between tokens j < i and p_ij = grad_i . v_j,
//   grad_r_i = sum_j p_ij P_ij k_j,  grad_k_j = sum_i p_ij P_ij r_i,  grad_v_j = sum_i (r_i . P_ij k_j) grad_i,
//   grad_log_t = sum_{j < t < i} p_ij r_i P_ij k_j.
// Beyond the chunk the state stands for its tokens, and the gradient of the state behind it for those of later ones.
// Inside, the blocks that weigh_tokens joined are split again: r_in and k_out of a pair of blocks hand their gradients
// to those of before, and as each is a product with a decay, grad times value to the log of that decay. So all terms of
// grad_log_t hold the decay of t as a factor, and nothing is subtracted: a decay that vanishes has no gradient.
#pragma once

#include "wkv6_cpu_chunk.h"

namespace vrwkv {

template <typename acc_t>
struct GradientChunk : Chunk<acc_t> {
  acc_t* grad;                      // of the outputs
  acc_t *grad_r, *grad_k, *grad_v;  // of r_in and k_out on the way; that of w comes to the place of w
  acc_t *grad_logs, *grad_u;        // as logs; of one row
  acc_t* pairs;                     // p_ij, where weights has r_i . P_ij k_j
  Kept<acc_t> kept;
};

template <typename acc_t, int Bytes>
VRWKV_INLINE void find_pairs(const GradientChunk<acc_t>& chunk, int64_t width) {
  for (int64_t i = 0; i < chunk.tokens; i += 4) {
    chunk.ahead->ask();
    for (int64_t j = 0; j <= i; j += 4) {
      multiply_rows<acc_t, Bytes>(chunk.grad + i * width, chunk.v + j * width, width, chunk.pairs + i * kChunk + j,
                                  kChunk);
    }
  }
}

// rows += a b, or with `clear` rows = a b.
template <typename acc_t, int Bytes>
VRWKV_INLINE void multiply_into(RowsAhead* ahead, acc_t* to, int64_t rows, int64_t width, const Matrix<acc_t>& a,
                                const Matrix<acc_t>& b, int64_t count, bool clear) {
  each_product<acc_t, Bytes>(rows, width, [&](auto product, int64_t i, int64_t j) __attribute__((always_inline)) {
    acc_t* const at = to + i * width + j;
    ahead->ask();
    if (clear) {
      product.clear();
    } else {
      product.load(at, width);
    }
    product.add(a.from(i, 0), b.from(0, j), count);
    product.store(at, width);
  });
}

// Split the blocks that join_blocks has joined: their gradients, r_in, k_out and grad_logs become those of either
// block.
template <typename acc_t, int Bytes>
VRWKV_INLINE void split_blocks(const GradientChunk<acc_t>& chunk, int64_t width, int64_t left, int64_t half,
                               const Kept<acc_t>& kept) {
  using L = Lanes<acc_t, Bytes>;
  const int64_t right = left + half, end = std::min(right + half, chunk.tokens);
  const int64_t left_row = left / kGroup * width, right_row = right / kGroup * width;
  for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
    // The decay of the other block stands in the rows of one.
    const auto divide = [&](acc_t* values, acc_t* grads, int64_t first, int64_t last, const L& decay)
                            __attribute__((always_inline)) {
                              L sum = L::load(chunk.grad_logs + left_row + n);
                              for (int64_t at = first * width + n; at < last * width; at += width) {
                                const L grad = L::load(grads + at);
                                sum = sum + grad * L::load(values + at);
                                (grad * decay).store(grads + at);
                                L::load(kept.parts + at).store(values + at);
                              }
                              return sum;
                            };
    const L left_sum = divide(chunk.r_in, chunk.grad_r, right, end, L::load(kept.decays + left_row + n));
    const L right_sum = divide(chunk.k_out, chunk.grad_k, left, right, L::load(kept.decays + right_row + n));
    left_sum.store(chunk.grad_logs + left_row + n);
    right_sum.store(chunk.grad_logs + right_row + n);
  }
  const Matrix<acc_t> pairs = Matrix<acc_t>{chunk.pairs, kChunk, 1}.from(right, left);
  multiply_into<acc_t, Bytes>(chunk.ahead, chunk.grad_r + right * width, end - right, width, pairs,
                              {chunk.k_out + left * width, width, 1}, half, false);
  multiply_into<acc_t, Bytes>(chunk.ahead, chunk.grad_k + left * width, half, width, pairs.transposed(),
                              {chunk.r_in + right * width, width, 1}, end - right, false);
}

// What the tokens of a group of 4 give each other, and from the gradients of its r_in, k_out and log those of r, k and
// w.
template <typename acc_t, int Bytes>
VRWKV_INLINE void end_group(const GradientChunk<acc_t>& chunk, int64_t width, int64_t first) {
  using L = Lanes<acc_t, Bytes>;
  chunk.ahead->ask();
  const auto pair = [&](int i, int j) __attribute__((always_inline)) {
    return L::all(chunk.pairs[(first + i) * kChunk + first + j]);
  };
  for (int64_t n = 0; n < width; n += kLanes<acc_t>) {
    const int64_t at = first * width + n;
    L r[4], k[4], log[4], d[4], grad_r[4], grad_k[4], from_r[4], from_k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t row = at + i * width;
      r[i] = L::load(chunk.r + row);
      k[i] = L::load(chunk.k + row);
      log[i] = log_decay(L::load(chunk.w + row));
      d[i] = decay_of(log[i]).value;
      grad_r[i] = L::load(chunk.grad_r + row);
      grad_k[i] = L::load(chunk.grad_k + row);
      from_r[i] = grad_r[i] * L::load(chunk.r_in + row);
      from_k[i] = grad_k[i] * L::load(chunk.k_out + row);
    }
    const L d01 = d[0] * d[1], d23 = d[2] * d[3];
    const L to_k0 = d[1] * (pair(2, 0) * r[2] + pair(3, 0) * (d[2] * r[3]));
    const L to_r3 = d[2] * (pair(3, 1) * k[1] + pair(3, 0) * (d[1] * k[0]));

    const L outside = L::load(chunk.grad_logs + first / kGroup * width + n);
    const L from_r23 = from_r[2] + from_r[3], from_k01 = from_k[0] + from_k[1];
    (log[0] * (outside + (from_r[1] + from_r23))).store(chunk.w + at);
    (log[1] * (outside + (from_r23 + from_k[0]) + k[0] * to_k0)).store(chunk.w + at + width);
    (log[2] * (outside + (from_r[3] + from_k01) + r[3] * to_r3)).store(chunk.w + at + 2 * width);
    (log[3] * (outside + (from_k01 + from_k[2]))).store(chunk.w + at + 3 * width);

    grad_r[1] = grad_r[1] * d[0] + pair(1, 0) * k[0];
    grad_r[2] = grad_r[2] * d01 + pair(2, 1) * k[1] + pair(2, 0) * (d[1] * k[0]);
    grad_r[3] = grad_r[3] * (d01 * d[2]) + pair(3, 2) * k[2] + to_r3;
    grad_k[0] = grad_k[0] * (d[1] * d23) + pair(1, 0) * r[1] + to_k0;
    grad_k[1] = grad_k[1] * d23 + pair(2, 1) * r[2] + pair(3, 1) * (d[2] * r[3]);
    grad_k[2] = grad_k[2] * d[3] + pair(3, 2) * r[3];
    if (chunk.u) {
      const L u = L::load(chunk.u + n);
      L grad_u = L::load(chunk.grad_u + n);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const L own = pair(i, i);
        grad_u = grad_u + own * r[i] * k[i];
        grad_r[i] = grad_r[i] + own * u * k[i];
        grad_k[i] = grad_k[i] + own * u * r[i];
      }
      grad_u.store(chunk.grad_u + n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      grad_r[i].store(chunk.grad_r + at + i * width);
      grad_k[i].store(chunk.grad_k + at + i * width);
    }
  }
}

// The gradients of r, k and w, from those of r_in, k_out and of the log of all decays.
template <typename acc_t, int Bytes>
VRWKV_INLINE void split_chunk(const GradientChunk<acc_t>& chunk, int64_t width) {
  int64_t half = kGroup, step = 0;
  for (; 2 * half < chunk.tokens; half *= 2) ++step;
  for (; step >= 0; half /= 2, --step) {
    for (int64_t left = 0; left + half < chunk.tokens; left += 2 * half) {
      split_blocks<acc_t, Bytes>(chunk, width, left, half, chunk.kept.step(step, width));
    }
  }
  for (int64_t first = 0; first < chunk.tokens; first += kGroup) end_group<acc_t, Bytes>(chunk, width, first);
}

}  // namespace vrwkv
