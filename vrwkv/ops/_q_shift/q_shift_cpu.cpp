// Q-Shift on the CPU, alone and fused with its mixes; the definition stands in __init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"
#include "q_shift_checks.h"

namespace vrwkv {
namespace {

constexpr int kGroups = 5;       // of the channels of a head: four that move and one that stays
constexpr int64_t kChunk = 128;  // tokens of one task; fixed, so that sums do not depend on the number of threads

// The grid of tokens, the channels of a head, and the first one of each group in it.
struct Grid {
  int64_t height, width, channels, shift, head;
  std::array<int64_t, kGroups + 1> bounds;

  Grid(int64_t height, int64_t width, int64_t channels, int64_t shift, double gamma, int64_t heads)
      : height(height), width(width), channels(channels), shift(shift), head(channels / heads) {
    for (int i = 0; i < kGroups; ++i) bounds[i] = static_cast<int64_t>(head * gamma * i);
    bounds[kGroups] = head;
  }

  // Call function(first, last) for the channels of a group, head by head.
  template <typename Function>
  VRWKV_INLINE void each_part(int group, const Function& function) const {
    const int64_t first = bounds[group], last = bounds[group + 1];
    if (first == last) return;
    for (int64_t begin = 0; begin < channels; begin += head) function(begin + first, begin + last);
  }
};

// A token and its place on the grid; walks in the order of memory.
struct Place {
  const Grid& grid;
  int64_t token, column, row;

  Place(const Grid& grid, int64_t token)
      : grid(grid), token(token), column(token % grid.width), row(token / grid.width % grid.height) {}

  void advance() {
    ++token;
    if (++column == grid.width) {
      column = 0;
      if (++row == grid.height) row = 0;
    }
  }

  // Index of the token that `group` of this one reads, -1 outside the grid; `direction` -1 asks who reads this one.
  int64_t source(int group, int64_t direction) const {
    const int64_t s = grid.shift * direction;
    const auto inside = [](int64_t position, int64_t size) { return position >= 0 && position < size; };
    switch (group) {
      case 0:
        return inside(column - s, grid.width) ? token - s : -1;
      case 1:
        return inside(column + s, grid.width) ? token + s : -1;
      case 2:
        return inside(row - s, grid.height) ? token - s * grid.width : -1;
      case 3:
        return inside(row + s, grid.height) ? token + s * grid.width : -1;
      default:
        return token;
    }
  }
};

void shift_tokens(const Grid& grid, size_t element, const char* zeros, const char* x, char* out, int64_t begin,
                  int64_t end) {
  for (Place place(grid, begin); place.token < end; place.advance()) {
    char* to = out + place.token * grid.channels * element;
    for (int group = 0; group < kGroups; ++group) {
      const int64_t source = place.source(group, 1);
      const char* from = source < 0 ? zeros : x + source * grid.channels * element;
      grid.each_part(group, [&](int64_t first, int64_t last) {
        std::memcpy(to + first * element, from + first * element, (last - first) * element);
      });
    }
  }
}

// Some of the mixes, and what is written for them.
template <typename scalar_t, size_t Count>
struct Mixes {
  std::array<const accumulate_t<scalar_t>*, Count> mix;
  std::array<scalar_t*, Count> out;
};

// Rows of zeros stand in for tokens outside the grid, so that the loops over channels have no branch.
template <typename scalar_t, size_t Count>
struct MixTokens {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Grid& grid, const scalar_t* zeros, const scalar_t* x,
                               const Mixes<scalar_t, Count>& mixes, int64_t begin, int64_t end) {
    const Mixes<scalar_t, Count> own = mixes;  // a copy, so that no store to an output can change a pointer
    for (Place place(grid, begin); place.token < end; place.advance()) {
      const int64_t row = place.token * grid.channels;
      for (int group = 0; group < kGroups; ++group) {
        const int64_t source = place.source(group, 1);
        const scalar_t* other = source < 0 ? zeros : x + source * grid.channels;
        const auto mix_block = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          const auto shifted = read_block<scalar_t, Bytes>(other + c, count);
          const auto difference = read_block<scalar_t, Bytes>(x + row + c, count) - shifted;
          for (size_t j = 0; j < Count; ++j) {
            const auto share = read_block<acc_t, Bytes>(own.mix[j] + c, count);
            write_block<scalar_t, Bytes>(shifted + difference * share, own.out[j] + row + c, count);
          }
        };
        grid.each_part(group, [&](int64_t first, int64_t last)
                                  __attribute__((always_inline)) { each_block<acc_t>(first, last, mix_block); });
      }
    }
  }
};

// grad_x collects from the token itself and from the token that reads it; `partials` (mixes, C) receives this chunk's
// sums of grad * (x - shifted).
template <typename scalar_t>
struct MixTokensBackward {
  using acc_t = accumulate_t<scalar_t>;
  template <int Bytes>
  static VRWKV_INLINE void run(const Grid& grid, const scalar_t* zeros, const scalar_t* x,
                               const std::vector<const acc_t*>& mixes, const std::vector<const scalar_t*>& grads,
                               scalar_t* grad_x, acc_t* partials, int64_t begin, int64_t end) {
    const int64_t channels = grid.channels;
    std::fill(partials, partials + mixes.size() * channels, acc_t(0));
    for (Place place(grid, begin); place.token < end; place.advance()) {
      const int64_t row = place.token * channels;
      for (int group = 0; group < kGroups; ++group) {
        const int64_t source = place.source(group, 1), reader = place.source(group, -1);
        const scalar_t* other = source < 0 ? zeros : x + source * channels;
        const auto mix_block = [&](int64_t c, int64_t count) __attribute__((always_inline)) {
          const auto difference =
              read_block<scalar_t, Bytes>(x + row + c, count) - read_block<scalar_t, Bytes>(other + c, count);
          auto sum = Lanes<acc_t, Bytes>::all(0);
          for (size_t j = 0; j < mixes.size(); ++j) {
            const auto mix = read_block<acc_t, Bytes>(mixes[j] + c, count);
            const auto grad = read_block<scalar_t, Bytes>(grads[j] + row + c, count);
            const scalar_t* reading = reader < 0 ? zeros : grads[j] + reader * channels;
            const auto grad_reader = read_block<scalar_t, Bytes>(reading + c, count);
            sum = sum + (grad_reader + (grad - grad_reader) * mix);
            acc_t* partial = partials + j * channels + c;
            write_block<acc_t, Bytes>(read_block<acc_t, Bytes>(partial, count) + grad * difference, partial, count);
          }
          write_block<scalar_t, Bytes>(sum, grad_x + row + c, count);
        };
        grid.each_part(group, [&](int64_t first, int64_t last)
                                  __attribute__((always_inline)) { each_block<acc_t>(first, last, mix_block); });
      }
    }
  }
};

// Call function(chunk, begin, end) for chunks of kChunk tokens, in parallel.
template <typename Function>
void each_chunk(int64_t tokens, const Function& function) {
  torch::stable::parallel_for(0, (tokens + kChunk - 1) / kChunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      function(chunk, chunk * kChunk, std::min((chunk + 1) * kChunk, tokens));
    }
  });
}

template <typename scalar_t, size_t Count>
void mix_some(const Grid& grid, int64_t tokens, const scalar_t* x, const accumulate_t<scalar_t>* const* mixes,
              scalar_t* const* outs) {
  static const auto function = Dispatch<MixTokens<scalar_t, Count>, const Grid&, const scalar_t*, const scalar_t*,
                                        const Mixes<scalar_t, Count>&, int64_t, int64_t>::pick();
  Mixes<scalar_t, Count> some;
  std::copy(mixes, mixes + Count, some.mix.begin());
  std::copy(outs, outs + Count, some.out.begin());
  const std::vector<scalar_t> zeros(grid.channels, scalar_t(0));
  each_chunk(tokens, [&](int64_t, int64_t begin, int64_t end) { function(grid, zeros.data(), x, some, begin, end); });
}

// Three at a time, the most a layer has: with their number known the pointers stay in registers.
template <typename scalar_t>
void mix_forward(const Grid& grid, int64_t tokens, const scalar_t* x,
                 const std::vector<const accumulate_t<scalar_t>*>& mixes, const std::vector<scalar_t*>& outs) {
  size_t j = 0;
  for (; j + 3 <= mixes.size(); j += 3) mix_some<scalar_t, 3>(grid, tokens, x, &mixes[j], &outs[j]);
  if (mixes.size() - j == 2) mix_some<scalar_t, 2>(grid, tokens, x, &mixes[j], &outs[j]);
  if (mixes.size() - j == 1) mix_some<scalar_t, 1>(grid, tokens, x, &mixes[j], &outs[j]);
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void mix_backward(const Grid& grid, int64_t tokens, const scalar_t* x, const std::vector<const acc_t*>& mixes,
                  const std::vector<const scalar_t*>& grads, scalar_t* grad_x, const std::vector<acc_t*>& grad_mixes) {
  static const auto function = Dispatch<MixTokensBackward<scalar_t>, const Grid&, const scalar_t*, const scalar_t*,
                                        const std::vector<const acc_t*>&, const std::vector<const scalar_t*>&,
                                        scalar_t*, acc_t*, int64_t, int64_t>::pick();
  const std::vector<scalar_t> zeros(grid.channels, scalar_t(0));
  const int64_t chunks = (tokens + kChunk - 1) / kChunk, size = mixes.size() * grid.channels;
  const std::unique_ptr<acc_t[]> partials(new acc_t[chunks * size]);
  each_chunk(tokens, [&](int64_t chunk, int64_t begin, int64_t end) {
    function(grid, zeros.data(), x, mixes, grads, grad_x, &partials[chunk * size], begin, end);
  });
  for (size_t j = 0; j < mixes.size(); ++j) {
    std::vector<double> sum(grid.channels, 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const acc_t* partial = &partials[chunk * size + j * grid.channels];
      for (int64_t c = 0; c < grid.channels; ++c) sum[c] += partial[c];
    }
    std::copy(sum.begin(), sum.end(), grad_mixes[j]);
  }
}

std::vector<Tensor> empty_like_all(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(empty_output(tensor));
  return result;
}

template <typename scalar_t>
std::vector<const scalar_t*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const scalar_t*> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.const_data_ptr<scalar_t>());
  return result;
}

template <typename scalar_t>
std::vector<scalar_t*> mutable_pointers(const std::vector<Tensor>& tensors) {
  std::vector<scalar_t*> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.mutable_data_ptr<scalar_t>());
  return result;
}

Tensor q_shift(const Tensor& x, int64_t height, int64_t width, int64_t shift_pixel, double channel_gamma,
               int64_t heads) {
  check_q_shift("q_shift", x, height, width, channel_gamma, heads);
  const Tensor x_ = contiguous(x);
  Tensor y = empty_output(x_);
  if (x_.numel() == 0) return y;
  const Grid grid(height, width, x_.size(2), shift_pixel, channel_gamma, heads);
  const size_t element = x_.element_size();
  const std::vector<char> zeros(x_.size(2) * element, 0);
  const char* from = static_cast<const char*>(x_.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  each_chunk(x_.size(0) * x_.size(1), [&](int64_t, int64_t begin, int64_t end) {
    shift_tokens(grid, element, zeros.data(), from, to, begin, end);
  });
  return y;
}

std::vector<Tensor> q_shift_mix(const Tensor& x, const std::vector<Tensor>& mixes, int64_t height, int64_t width,
                                int64_t shift_pixel, double channel_gamma, int64_t heads) {
  check_q_shift_mix("q_shift_mix", x, mixes, height, width, channel_gamma, heads);
  const Tensor x_ = contiguous(x);
  const std::vector<Tensor> mixes_ = contiguous_all(mixes);
  const std::vector<Tensor> outs = empty_like_all(std::vector<Tensor>(mixes.size(), x_));
  if (x_.numel() == 0) return outs;
  const Grid grid(height, width, x_.size(2), shift_pixel, channel_gamma, heads);
  dispatch_floating(x_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    mix_forward<scalar_t>(grid, x_.size(0) * x_.size(1), x_.const_data_ptr<scalar_t>(),
                          pointers<accumulate_t<scalar_t>>(mixes_), mutable_pointers<scalar_t>(outs));
  });
  return outs;
}

std::tuple<Tensor, std::vector<Tensor>> q_shift_mix_backward(const std::vector<Tensor>& grads, const Tensor& x,
                                                             const std::vector<Tensor>& mixes, int64_t height,
                                                             int64_t width, int64_t shift_pixel, double channel_gamma,
                                                             int64_t heads) {
  check_q_shift_mix_backward(grads, x, mixes, height, width, channel_gamma, heads);
  const Tensor x_ = contiguous(x);
  const std::vector<Tensor> grads_ = contiguous_all(grads), mixes_ = contiguous_all(mixes);
  Tensor grad_x = empty_output(x_);
  std::vector<Tensor> grad_mixes = empty_like_all(mixes_);
  if (x_.numel() == 0) {
    for (Tensor& grad : grad_mixes) torch::stable::zero_(grad);
    return {grad_x, grad_mixes};
  }
  const Grid grid(height, width, x_.size(2), shift_pixel, channel_gamma, heads);
  dispatch_floating(x_.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = accumulate_t<scalar_t>;
    mix_backward<scalar_t>(grid, x_.size(0) * x_.size(1), x_.const_data_ptr<scalar_t>(), pointers<acc_t>(mixes_),
                           pointers<scalar_t>(grads_), grad_x.mutable_data_ptr<scalar_t>(),
                           mutable_pointers<acc_t>(grad_mixes));
  });
  return {grad_x, grad_mixes};
}

}  // namespace
}  // namespace vrwkv

STABLE_TORCH_LIBRARY_IMPL(vrwkv, CPU, m) {
  m.impl("q_shift", TORCH_BOX(&vrwkv::q_shift));
  m.impl("q_shift_mix", TORCH_BOX(&vrwkv::q_shift_mix));
  m.impl("_q_shift_mix_backward", TORCH_BOX(&vrwkv::q_shift_mix_backward));
}
