// How a call of the RWKV-6 recurrence is cut on the CPU: sequences in either direction, the chunks of a sequence, and
// the state that goes from chunk to chunk.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "../common/cpu_convert.h"
#include "../common/cpu_memory.h"
#include "wkv6_cpu_chunk.h"

namespace vrwkv {

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Shape {
  int64_t batch, tokens, heads, size;

  int64_t sequences() const { return batch * heads; }
};

template <typename acc_t>
int64_t row_width(const Shape& shape) {
  return round_up(shape.size, kLanes<acc_t>);
}

// One head of one image in one direction: token t, in the order of that direction, lies at offset + t * step.
struct Sequence {
  int64_t head, offset, step;
  bool backwards;

  Sequence(const Shape& shape, int64_t index, bool backwards)
      : head(index % shape.heads), step(shape.heads * shape.size), backwards(backwards) {
    offset = index / shape.heads * shape.tokens * step + head * shape.size;
    if (backwards) {
      offset += (shape.tokens - 1) * step;
      step = -step;
    }
  }
};

// Tokens of each chunk but the last of some: chunks of at most `most` tokens, as even as groups allow.
inline int64_t chunk_length(int64_t tokens, int64_t most) {
  const int64_t chunks = (tokens + most - 1) / most;
  return round_up((tokens + chunks - 1) / chunks, kGroup);
}

// `count` rows of a sequence as rows of accumulator values; `rows` - `count` of `fill` follow, and zeros behind `size`.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct LoadRows {
  template <int Bytes>
  static VRWKV_INLINE void run(const scalar_t* from, int64_t step, int64_t count, int64_t rows, int64_t size,
                               acc_t fill, acc_t* to, int64_t width) {
    for (int64_t row = 0; row < count; ++row, from += step, to += width) {
      each_block<acc_t>(0, size, [&](int64_t first, int64_t lanes) __attribute__((always_inline)) {
        read_block<scalar_t, Bytes>(from + first, lanes).store(to + first);
      });
    }
    std::fill(to, to + (rows - count) * width, fill);
  }
};

// The other way; `added`, unless null, points to values at the places of `to` that are added.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
struct StoreRows {
  template <int Bytes>
  static VRWKV_INLINE void run(const acc_t* from, int64_t width, int64_t count, int64_t size, const acc_t* added,
                               scalar_t* to, int64_t step) {
    for (int64_t row = 0; row < count; ++row, from += width, to += step, added += added ? step : 0) {
      each_block<acc_t>(0, size, [&](int64_t first, int64_t lanes) __attribute__((always_inline)) {
        auto block = Lanes<acc_t, Bytes>::load(from + first);
        if (added) block = read_block<acc_t, Bytes>(added + first, lanes) + block;
        write_block<scalar_t, Bytes>(block, to + first, lanes);
      });
    }
  }
};

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void load_rows(const scalar_t* tensor, const Sequence& sequence, int64_t first, int64_t count, acc_t fill,
               const Chunk<acc_t>& chunk, acc_t* to) {
  static const auto function =
      Dispatch<LoadRows<scalar_t>, const scalar_t*, int64_t, int64_t, int64_t, int64_t, acc_t, acc_t*, int64_t>::pick();
  function(tensor + sequence.offset + first * sequence.step, sequence.step, count, chunk.tokens, chunk.size, fill, to,
           chunk.width);
}

template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void store_rows(const acc_t* rows, const Chunk<acc_t>& chunk, const Sequence& sequence, int64_t first, int64_t count,
                const acc_t* added, scalar_t* tensor) {
  static const auto function =
      Dispatch<StoreRows<scalar_t>, const acc_t*, int64_t, int64_t, int64_t, const acc_t*, scalar_t*, int64_t>::pick();
  const int64_t offset = sequence.offset + first * sequence.step;
  function(rows, chunk.width, count, chunk.size, added ? added + offset : nullptr, tensor + offset, sequence.step);
}

// Store results of one direction: in `partial`, or with `add` in `output`, added to what the other has left in
// `partial`.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void store_share(const acc_t* rows, const Chunk<acc_t>& chunk, const Sequence& sequence, int64_t first, int64_t count,
                 bool add, acc_t* partial, scalar_t* output) {
  if (add) {
    store_rows(rows, chunk, sequence, first, count, partial, output);
  } else {
    store_rows(rows, chunk, sequence, first, count, static_cast<const acc_t*>(nullptr), partial);
  }
}

// Run Kernel<acc_t, width>, compiled for any width, as 0, and in float for the one that the published models have.
template <template <typename, int64_t> class Kernel, typename acc_t, typename... Args>
void run_for_width(int64_t width, Args... args) {
  constexpr int64_t kUsual = 64;
  static const auto general = Dispatch<Kernel<acc_t, 0>, Args...>::pick();
  static const auto usual = Dispatch<Kernel<acc_t, std::is_same_v<acc_t, float> ? kUsual : 0>, Args...>::pick();
  (width == kUsual ? usual : general)(args...);
}

// Rows of `length` tokens to ask for in `steps` over a chunk's groups, `products` with its rows and one with a state's.
template <typename acc_t>
RowsAhead rows_ahead(const Chunk<acc_t>& chunk, int64_t length, int64_t steps, int64_t products) {
  const int64_t rows = products * length + chunk.width;  // 8 of them, 32 wide, between two shares, or less
  const int64_t times = steps * length / kGroup + rows / 8 * std::max<int64_t>(chunk.width / 32, 1);
  return RowsAhead(length, std::max<int64_t>(times, 1));
}

template <typename scalar_t>
void ask_for(RowsAhead& ahead, const scalar_t* tensor, const Sequence& sequence, int64_t first, int64_t size) {
  ahead.add(tensor + sequence.offset + first * sequence.step, sequence.step, size);
}

// Load k, v and w of `count` tokens; what follows has no decay and adds nothing.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void load_keys(const scalar_t* k, const scalar_t* v, const scalar_t* w, const Sequence& sequence, int64_t first,
               int64_t count, Chunk<acc_t>& chunk) {
  chunk.tokens = round_up(count, kGroup);
  load_rows(k, sequence, first, count, acc_t(0), chunk, chunk.k);
  load_rows(v, sequence, first, count, acc_t(0), chunk, chunk.v);
  load_rows(w, sequence, first, count, -std::numeric_limits<acc_t>::infinity(), chunk, chunk.w);
}

// How the tokens of a direction are cut: into blocks, an even number of them unless one holds all.
//
// Many short sequences are each taken one way and then the other. Else both directions of a sequence are under way at a
// time: each comes as far as the middle, leaving its share of the results, and then adds to what the other has left.
// The heads of an image, whose tokens lie next to each other, go from block to block together where one thread has
// them.
class Blocks {
 public:
  static constexpr int64_t kBlock = 256;  // tokens, at most

  Blocks(const Shape& shape, bool reverse) : shape_(shape), reverse_(reverse) {
    constexpr int64_t kMany = 16;
    if (shape.tokens > kBlock || shape.sequences() < kMany) count_ = (shape.tokens + 2 * kBlock - 1) / (2 * kBlock) * 2;
  }

  int64_t count() const { return count_; }
  // Token, in the order of the direction, with which block i begins and block i - 1 ends.
  int64_t begin(int64_t i, bool backwards) const {
    return backwards ? shape_.tokens - begin(count_ - i, false) : i * shape_.tokens / count_;
  }

  // Call visit(index, backwards, block, add) for all sequences, directions and blocks, in parallel. The blocks of a
  // direction are visited in their order, or with `reverse` from the last to the first; `add`: the other direction has
  // been there.
  template <typename Visit>
  void each(const Visit& visit) const {
    if (count_ == 1) {
      run(shape_.sequences(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (const bool backwards : {false, true}) visit(i, backwards, 0, backwards);
        }
      });
      return;
    }
    for (const bool add : {false, true}) {
      const int64_t first = add == reverse_ ? 0 : count_ / 2;
      each_of(first, first + count_ / 2, reverse_,
              [&](int64_t i, bool backwards, int64_t block) { visit(i, backwards, block, add); });
    }
  }

  // Call visit(index, backwards, block) for all of them, with the blocks of a direction in their order.
  template <typename Visit>
  void each_in_order(const Visit& visit) const {
    each_of(0, count_, false, visit);
  }

 private:
  template <typename Visit>
  void each_of(int64_t first, int64_t last, bool reverse, const Visit& visit) const {
    const int64_t sequences = shape_.sequences();
    run(2 * sequences, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t next_image = std::min(end, (begin / shape_.heads + 1) * shape_.heads);
        for (int64_t block = first; block < last; ++block) {
          const int64_t which = reverse ? first + last - 1 - block : block;
          for (int64_t i = begin; i < next_image; ++i) {
            const bool backwards = i >= sequences;
            if (this->begin(which, backwards) < this->begin(which + 1, backwards)) {  // or there is one token
              visit(i % sequences, backwards, which);
            }
          }
        }
        begin = next_image;
      }
    });
  }

  template <typename Part>
  static void run(int64_t items, const Part& part) {
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      part(begin, end);
    });
  }

  const Shape shape_;
  const bool reverse_;
  int64_t count_ = 1;
};

}  // namespace vrwkv
