// How Bi-WKV is cut on the CPU, and the loops over the parts.
//
// The token axis is cut into tiles that stay in cache, the channels into blocks of lanes. A block in which a channel's
// decay or bonus is too steep for sums relative to one reference (kMaxSlope) is computed token by token in double
// precision with a running maximum instead (bi_wkv_cpu_safe.h).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"

namespace vrwkv {

// Tokens of a tile: its scratch (4 rows of kBlockBytes a token forward, 7 backward) stays in the second-level cache.
constexpr int64_t kTile = 256;

// Largest |w| * tile and |u| of the fast path. A denominator then lies above e^-2*slope, and the product of two sums of
// the backward below e^4*slope, inside the range of the type.
template <typename acc_t>
constexpr acc_t kMaxSlope = sizeof(acc_t) == 4 ? acc_t(16) : acc_t(150);

// How one call is cut: the token axis in tiles of `tile` tokens, the channels in blocks of `lanes`.
struct Tiling {
  int64_t batch, tokens, channels, lanes, tile;
  int64_t tiles() const { return (tokens + tile - 1) / tile; }
  int64_t blocks() const { return (channels + lanes - 1) / lanes; }
  int64_t items() const { return batch * tiles() * blocks(); }
};

template <typename acc_t>
Tiling make_tiling(int64_t batch, int64_t tokens, int64_t channels) {
  return {batch, tokens, channels, kLanes<acc_t>, std::min(tokens, kTile)};
}

// One tile of one block of channels; items are numbered with the block running fastest.
struct Item {
  int64_t index, image, tile, block, tokens, lanes, offset;  // offset: of its first element in a (B, T, C) tensor
  Item(const Tiling& tiling, int64_t index)
      : index(index),
        image(index / (tiling.tiles() * tiling.blocks())),
        tile(index / tiling.blocks() % tiling.tiles()),
        block(index % tiling.blocks()),
        tokens(std::min(tiling.tile, tiling.tokens - tile * tiling.tile)),
        lanes(std::min(tiling.lanes, tiling.channels - block * tiling.lanes)),
        offset((image * tiling.tokens + tile * tiling.tile) * tiling.channels + block * tiling.lanes) {}
};

// An item of a whole block: its loops are compiled without the padding of read_block and write_block.
template <typename acc_t>
struct WholeItem : Item {
  static constexpr int64_t lanes = kLanes<acc_t>;
};

// What is constant along the tokens, padded to whole blocks: growth = e^-w - 1, bonus = e^u, and which blocks are fast.
template <typename acc_t>
struct Channels {
  std::vector<acc_t> growth, bonus;
  std::vector<double> w;
  std::vector<char> fast;

  Channels(const Tiling& tiling, const acc_t* w_, const acc_t* u)
      : growth(tiling.blocks() * tiling.lanes), bonus(growth.size(), 1), w(growth.size()), fast(tiling.blocks(), true) {
    const int64_t span = std::min(tiling.tile, tiling.tokens);
    for (int64_t c = 0; c < tiling.channels; ++c) {
      w[c] = w_[c];
      growth[c] = std::expm1(-w_[c]);
      bonus[c] = std::exp(u[c]);
      // Written so that NaN takes the safe path.
      const bool gentle = std::abs(w_[c]) * span <= kMaxSlope<acc_t> && std::abs(u[c]) <= kMaxSlope<acc_t>;
      if (!gentle) fast[c / tiling.lanes] = false;
    }
  }
  bool any_safe() const { return std::find(fast.begin(), fast.end(), false) != fast.end(); }
};

template <typename scalar_t>
struct Inputs {
  using acc_t = accumulate_t<scalar_t>;
  Tiling tiling;
  const Channels<acc_t>& channels;
  const scalar_t *k, *v;
  // Bound below k - reference. A member: of a maximum with a constant that it knows, GCC makes a comparison and a blend
  // instead of one instruction.
  acc_t lowest = ExpTraits<acc_t>::kLowest;

  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<acc_t, Bytes> row(const scalar_t* tensor, const AnyItem& item, int64_t t) const {
    return read_block<scalar_t, Bytes>(tensor + item.offset + t * tiling.channels, item.lanes);
  }
  // e^(k - reference), with `least` the member `lowest` in all lanes
  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<acc_t, Bytes> weight(const AnyItem& item, int64_t t, const Lanes<acc_t, Bytes>& reference,
                                          const Lanes<acc_t, Bytes>& least) const {
    return exp_in_range(max(least, row<Bytes>(k, item, t) - reference));
  }
  template <int Bytes, typename AnyItem>
  VRWKV_INLINE Lanes<acc_t, Bytes> largest_key(const AnyItem& item) const {
    auto result = Lanes<acc_t, Bytes>::all(std::numeric_limits<acc_t>::lowest());
    for (int64_t t = 0; t < item.tokens; ++t) result = max(row<Bytes>(k, item, t), result);
    return result;
  }
};

// Asks for memory ahead of its use, in the order of memory: the items of kGroup neighbouring blocks of a tile share out
// the rows of the next such group, or of the next tile.
template <typename scalar_t>
class Ahead {
 public:
  Ahead(const Tiling& tiling, const Item& item) : channels_(tiling.channels) {
    const int64_t first = item.block / kGroup * kGroup, size = std::min(kGroup, tiling.blocks() - first);
    const int64_t following = first + size;
    int64_t start = item.offset + (following - item.block) * tiling.lanes;
    size_ = std::min(kGroup, tiling.blocks() - following);
    if (size_ == 0) {
      start = item.offset - item.block * tiling.lanes + item.tokens * tiling.channels;
      size_ = std::min(kGroup, tiling.blocks());
    }
    const int64_t share = (item.block - first) * item.tokens * size_ / size;
    column_ = share % size_;
    offset_ = start + share / size_ * channels_;
  }
  template <typename... Tensors>
  VRWKV_INLINE void ask(const Tensors*... tensors) {
    (prefetch<scalar_t>(tensors + offset_ + column_ * kLanes<accumulate_t<scalar_t>>), ...);
    if (++column_ == size_) {
      column_ = 0;
      offset_ += channels_;
    }
  }

 private:
  static constexpr int64_t kGroup = 12;
  int64_t channels_, size_, offset_, column_;
};

// Call function(item) for the items whose block is fast.
template <typename acc_t, typename Function>
VRWKV_INLINE void each_fast_item(const Tiling& tiling, const Channels<acc_t>& channels, int64_t begin, int64_t end,
                                 const Function& function) {
  for (int64_t index = begin; index < end; ++index) {
    const Item item(tiling, index);
    if (!channels.fast[item.block]) continue;
    if (item.lanes == kLanes<acc_t>) {
      function(WholeItem<acc_t>{item});
    } else {
      function(item);
    }
  }
}

// Run the kernel for the best instruction set over all items, in parallel. Which thread takes an item changes nothing.
template <typename Kernel, typename... Args>
void run_items(const Tiling& tiling, Args... args) {
  static const auto function = Dispatch<Kernel, Args..., int64_t, int64_t>::pick();
  torch::stable::parallel_for(0, tiling.items(), 1, [&](int64_t begin, int64_t end) { function(args..., begin, end); });
}

// Call function(image, channel) in parallel for the channels of every block that is not fast.
template <typename acc_t, typename Function>
void each_safe_channel(const Tiling& tiling, const Channels<acc_t>& channels, const Function& function) {
  if (!channels.any_safe()) return;
  torch::stable::parallel_for(0, tiling.batch * tiling.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!channels.fast[i % tiling.channels / tiling.lanes]) function(i / tiling.channels, i % tiling.channels);
    }
  });
}

}  // namespace vrwkv
