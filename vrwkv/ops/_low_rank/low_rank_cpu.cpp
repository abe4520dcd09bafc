// Low-rank functions of tokens on the CPU; the definition stands in __init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"
#include "low_rank_checks.h"

namespace vrwkv {
namespace {

constexpr int kMaxTile = 8;  // tokens that share what is loaded of a matrix

// What a tile of tokens is computed from; `x` and `y` are null but for mixes.
template <typename scalar_t>
struct Arguments {
  using acc_t = accumulate_t<scalar_t>;
  const scalar_t *x, *y, *h;
  const acc_t *matrices, *offsets;
  std::vector<scalar_t*> outs;
  int64_t rank, channels;
};

// tanh(x) for a block: -m / (2 + m) with m = e^(-2 |x|) - 1.
template <typename acc_t, int Bytes>
VRWKV_INLINE Lanes<acc_t, Bytes> tanh(const Lanes<acc_t, Bytes>& x) {
  using L = Lanes<acc_t, Bytes>;
  const L zero = L::all(0), m = decay_of(L::all(-2) * max(zero - x, x)).minus_one;
  const L magnitude = (zero - m) / (L::all(2) + m);
  L result;
  for (int i = 0; i < L::kVectors; ++i) result.part[i] = x.part[i] < 0 ? -magnitude.part[i] : magnitude.part[i];
  return result;
}

// out_j = weight, or x + (y - x) * weight, with weight = offset_j + tanh(h_j) @ matrix_j.
template <typename scalar_t>
struct LowRank {
  using acc_t = accumulate_t<scalar_t>;

  // `count` channels from `c` on, in `Blocks` blocks, for `Tile` tokens from `token` on, whose tanh(h_j) stands in `t`.
  template <int Bytes, int Tile, int Blocks>
  static VRWKV_INLINE void blocks(const Arguments<scalar_t>& a, const acc_t* t, const acc_t* matrix,
                                  const acc_t* offset, scalar_t* out, int64_t token, int64_t c, int64_t count) {
    using L = Lanes<acc_t, Bytes>;
    constexpr int kLane = kLanes<acc_t>;
    L sums[Tile][Blocks];
#pragma GCC unroll 8
    for (int i = 0; i < Tile; ++i) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) sums[i][b] = read_block<acc_t, Bytes>(offset + c + b * kLane, count);
    }
    for (int64_t k = 0; k < a.rank; ++k) {
      L row[Blocks];
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        row[b] = read_block<acc_t, Bytes>(matrix + k * a.channels + c + b * kLane, count);
#pragma GCC unroll 8
      for (int i = 0; i < Tile; ++i) {
        const L factor = L::all(t[i * a.rank + k]);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) sums[i][b] = sums[i][b] + factor * row[b];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Tile; ++i) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
        const int64_t at = (token + i) * a.channels + c + b * kLane;
        L result = sums[i][b];
        if (a.x != nullptr) {
          const L x = read_block<scalar_t, Bytes>(a.x + at, count);
          result = x + (read_block<scalar_t, Bytes>(a.y + at, count) - x) * result;
        }
        write_block<scalar_t, Bytes>(result, out + at, count);
      }
    }
  }

  template <int Bytes, int Tile>
  static VRWKV_INLINE void tile(const Arguments<scalar_t>& a, acc_t* t, int64_t token) {
    const int64_t parts = a.outs.size(), width = parts * a.rank;
    for (int64_t j = 0; j < parts; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < Tile; ++i) {
        const scalar_t* h = a.h + (token + i) * width + j * a.rank;
        each_block<acc_t>(0, a.rank, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
          write_block<acc_t, Bytes>(tanh(read_block<scalar_t, Bytes>(h + k, count)), t + i * a.rank + k, count);
        });
      }
      const acc_t *matrix = a.matrices + j * a.rank * a.channels, *offset = a.offsets + j * a.channels;
      scalar_t* out = a.outs[j];
      int64_t c = 0;
      if constexpr (Bytes == 64) {  // which has registers for twice the sums
        for (; c + 2 * kLanes<acc_t> <= a.channels; c += 2 * kLanes<acc_t>) {
          blocks<Bytes, Tile, 2>(a, t, matrix, offset, out, token, c, kLanes<acc_t>);
        }
      }
      each_block<acc_t>(c, a.channels, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        blocks<Bytes, Tile, 1>(a, t, matrix, offset, out, token, c, count);
      });
    }
  }

  template <int Bytes>
  static VRWKV_INLINE void run(const Arguments<scalar_t>& a, acc_t* t, int64_t begin, int64_t end) {
    constexpr int kTile = Bytes == 64 ? kMaxTile : 4;  // as many sums as there are registers for
    int64_t token = begin;
    for (; token + kTile <= end; token += kTile) tile<Bytes, kTile>(a, t, token);
    for (; token < end; ++token) tile<Bytes, 1>(a, t, token);
  }
};

template <typename scalar_t>
void low_rank_tokens(const Arguments<scalar_t>& arguments, int64_t tokens) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kGrain = 64;  // tokens that are worth a thread, a multiple of every tile
  static const auto function =
      Dispatch<LowRank<scalar_t>, const Arguments<scalar_t>&, acc_t*, int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, (tokens + kGrain - 1) / kGrain, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<acc_t[]> t(new acc_t[kMaxTile * arguments.rank]);
    function(arguments, t.get(), first * kGrain, std::min(last * kGrain, tokens));
  });
}

Tensor low_rank(const Tensor& h, const Tensor& matrix, const Tensor& offset) {
  check_low_rank(h, matrix, offset);
  const Tensor h_ = contiguous(h), matrix_ = contiguous(matrix), offset_ = contiguous(offset);
  Tensor out = torch::stable::new_empty(h_, {h.size(0), h.size(1), matrix.size(1)});
  dispatch_floating(h_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    const Arguments<scalar_t> arguments{nullptr,
                                        nullptr,
                                        h_.const_data_ptr<scalar_t>(),
                                        matrix_.const_data_ptr<acc_t>(),
                                        offset_.const_data_ptr<acc_t>(),
                                        {out.mutable_data_ptr<scalar_t>()},
                                        matrix_.size(0),
                                        matrix_.size(1)};
    low_rank_tokens(arguments, h_.size(0) * h_.size(1));
  });
  return out;
}

std::vector<Tensor> low_rank_mix(const Tensor& x, const Tensor& y, const Tensor& h, const Tensor& matrices,
                                 const Tensor& offsets) {
  check_low_rank_mix(x, y, h, matrices, offsets);
  const Tensor x_ = contiguous(x), y_ = contiguous(y), h_ = contiguous(h);
  const Tensor matrices_ = contiguous(matrices), offsets_ = contiguous(offsets);
  std::vector<Tensor> outs;
  for (int64_t j = 0; j < matrices.size(0); ++j) outs.push_back(empty_output(x_));
  dispatch_floating(x_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    Arguments<scalar_t> arguments{x_.const_data_ptr<scalar_t>(),
                                  y_.const_data_ptr<scalar_t>(),
                                  h_.const_data_ptr<scalar_t>(),
                                  matrices_.const_data_ptr<acc_t>(),
                                  offsets_.const_data_ptr<acc_t>(),
                                  {},
                                  matrices_.size(1),
                                  matrices_.size(2)};
    for (Tensor& out : outs) arguments.outs.push_back(out.mutable_data_ptr<scalar_t>());
    low_rank_tokens(arguments, x_.size(0) * x_.size(1));
  });
  return outs;
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) {
  m.impl("low_rank", TORCH_BOX(&vrwkv::low_rank));
  m.impl("low_rank_mix", TORCH_BOX(&vrwkv::low_rank_mix));
}
