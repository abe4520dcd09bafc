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

// Tokens of each chunk but the last of some: chunks are as even as groups allow.
inline int64_t chunk_length(int64_t tokens) {
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
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

// Load r, k, v and w of `count` tokens; what follows has no decay and adds nothing.
template <typename scalar_t, typename acc_t = accumulate_t<scalar_t>>
void load_chunk(const scalar_t* r, const scalar_t* k, const scalar_t* v, const scalar_t* w, const Sequence& sequence,
                int64_t first, int64_t count, Chunk<acc_t>& chunk) {
  chunk.tokens = round_up(count, kGroup);
  load_rows(r, sequence, first, count, acc_t(0), chunk, chunk.r);
  load_rows(k, sequence, first, count, acc_t(0), chunk, chunk.k);
  load_rows(v, sequence, first, count, acc_t(0), chunk, chunk.v);
  load_rows(w, sequence, first, count, -std::numeric_limits<acc_t>::infinity(), chunk, chunk.w);
}

// Call sweep(index, backwards, begin, end, state, add) for all sequences in both directions, in parallel: for their
// tokens from `begin` to `end`, which are some, in the order of the sweep, that of the direction or with `reverse` the
// opposite one, from `state`, `state_size` values, with `add` to what the other direction has left for these tokens.
// Many sequences are each taken one way and then the other; of few, both directions are under way at a time, and meet
// in the middle.
template <typename acc_t, typename Sweep>
void sweep_both_ways(const Shape& shape, int64_t state_size, bool reverse, const Sweep& sweep) {
  constexpr int64_t kMany = 16;
  const int64_t tokens = shape.tokens, sequences = shape.sequences();
  if (sequences >= kMany) {
    torch::stable::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      std::vector<acc_t> state(state_size);
      for (int64_t i = begin; i < end; ++i) {
        for (const bool backwards : {false, true}) {
          std::fill(state.begin(), state.end(), acc_t(0));
          sweep(i, backwards, 0, tokens, state.data(), backwards);
        }
      }
    });
    return;
  }
  std::vector<acc_t> states(2 * sequences * state_size);
  for (const bool add : {false, true}) {
    torch::stable::parallel_for(0, 2 * sequences, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t i = begin; i < end; ++i) {
        const bool backwards = i % 2;
        const int64_t middle = backwards != reverse ? tokens / 2 : tokens - tokens / 2;
        const int64_t first = reverse == add ? 0 : middle, last = reverse == add ? middle : tokens;
        if (first < last) sweep(i / 2, backwards, first, last, states.data() + i * state_size, add);
      }
    });
  }
}

}  // namespace vrwkv
