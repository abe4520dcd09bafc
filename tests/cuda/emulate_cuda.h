// Runs CUDA kernels on the CPU: included by vrwkv/ops/common/cuda_utils.cuh in place of the CUDA runtime when
// VRWKV_EMULATE_CUDA is defined, so that g++ compiles the very sources that nvcc compiles.
//
// The threads of a block are fibres that run in a random order from barrier to barrier; blocks run one after the other
// in a random order. It is an error, with the place named, if
// - a global access lies outside its tensor or is not aligned,
// - a shared access lies outside what the launch asked for, reads what nobody wrote in this block (it is NaN besides),
// or
//   races: two threads touch one element between two barriers and one of them writes,
// - the threads of a block wait at different barriers, or some have left the kernel while others wait,
// - a warp operation is reached by part of the lanes that its mask names.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

inline dim3 thread_index, block_index, block_size, grid_size;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "emulated CUDA: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

struct Settings {
  int64_t max_blocks = 1 << 20;
  unsigned int seed = 0;
  int64_t largest_shared_bytes = 0;  // of a launch so far
};
inline Settings settings;

// ---- Approximate instructions ----

// `exact` off by up to `error` of itself, as the manual of the instruction grants: a fixed function of the argument, as
// the hardware is, whose error jumps about like a random number. Subnormal results are zero.
inline float approximate(float argument, double exact, double error) {
  uint64_t bits = 0;
  std::memcpy(&bits, &argument, sizeof(argument));
  bits = (bits + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ bits >> 31) * 0x94d049bb133111ebu;
  const double uniform = static_cast<double>(bits >> 11) * 0x1p-52 - 1;                // in [-1, 1)
  const float result = static_cast<float>(exact * (1 + (error - 0x1p-24) * uniform));  // 2^-24: of rounding it here
  return fabsf(result) < 0x1p-126f ? 0 * result : result;
}

// ---- Fibres ----

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fibre {
  State state;
  const char* file;  // where it waits
  int line;
  unsigned int mask;  // of a warp operation: the lanes that take part, what this lane gives, whose value it gets
  uint64_t given;
  unsigned int source;
  jmp_buf resume;
};

// One block at a time.
class Machine {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;
  static constexpr unsigned int kWarp = 32;

  void run_block(const std::function<void()>& kernel, size_t shared_bytes, std::mt19937& random) {
    const unsigned int threads = block_size.x * block_size.y * block_size.z;
    kernel_ = &kernel;
    error_.clear();
    fibres_.assign(threads, Fibre{State::kReady, "", 0, 0, 0, 0, {}});
    started_.assign(threads, false);
    turns_.assign(threads, 0);
    for (auto& given : fragments_) given.resize(threads);
    while (stacks_.size() < threads) stacks_.emplace_back(new char[kStackBytes]);
    begin_shared(shared_bytes);
    std::vector<unsigned int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    while (true) {
      std::shuffle(order.begin(), order.end(), random);
      for (unsigned int thread : order) {
        if (fibres_[thread].state == State::kReady) run_thread(thread);
      }
      if (release_warps()) continue;
      if (release_barrier()) continue;
      return;
    }
  }

  void wait(State state, const char* file, int line) {
    Fibre& fibre = fibres_[current_];
    fibre.state = state;
    fibre.file = file;
    fibre.line = line;
    if (_setjmp(fibre.resume) == 0) _longjmp(scheduler_, 1);
  }

  uint64_t exchange(unsigned int mask, uint64_t given, unsigned int source, const char* file, int line) {
    Fibre& fibre = fibres_[current_];
    fibre.mask = mask;
    fibre.given = given;
    fibre.source = source;
    wait(State::kAtWarp, file, line);
    return exchanged_[current_];
  }

  unsigned int lane() const { return current_ % kWarp; }

  // What each lane of the warp gives, for all of them. No lane comes by twice before all have been here, so that two
  // places suffice.
  using Fragment = std::array<float, 6>;
  const Fragment* gather(const Fragment& given, const char* file, int line) {
    std::vector<Fragment>& all = fragments_[turns_[current_] ^= 1];
    all[current_] = given;
    exchange(~0u, 0, 0, file, line);
    return &all[current_ / kWarp * kWarp];
  }

  // ---- Shared memory ----

  template <typename T>
  T* shared(int64_t offset, bool write) {
    constexpr int kGranules = (sizeof(T) + 1) / 2;
    if (offset < 0 || offset + sizeof(T) > shared_bytes_) {
      fail("shared access at byte ", offset, " of ", shared_bytes_, where());
    }
    if (offset % alignof(T) != 0) fail("shared access at byte ", offset, " is not aligned to ", alignof(T), where());
    for (int i = 0; i < kGranules; ++i) touch(offset / 2 + i, write);
    return reinterpret_cast<T*>(memory_.data() + offset);
  }

  std::string where() const {
    std::ostringstream text;
    text << " (block " << block_index.x << ", " << block_index.y << ", " << block_index.z << ", thread " << current_
         << ")";
    return text.str();
  }

 private:
  static constexpr unsigned int kMany = ~0u;  // more than one reader

  // Of two bytes of shared memory: the last write and the last reads. Intervals between barriers are counted through.
  struct Shadow {
    uint64_t written = 0, read = 0;
    unsigned int writer = 0, reader = 0;
  };

  void begin_shared(size_t bytes) {
    shared_bytes_ = bytes;
    memory_.assign(bytes, 0xff);  // NaN in every floating type
    if (shadow_.size() < bytes) shadow_.resize(bytes);
    block_start_ = ++interval_;
  }

  void touch(size_t granule, bool write) {
    Shadow& shadow = shadow_[granule];
    const auto race = [&](const char* what, unsigned int other) {
      fail("race in shared memory at byte ", 2 * granule, ": thread ", current_, what, other,
           " with no barrier between", where());
    };
    if (shadow.written == interval_ && shadow.writer != current_) {
      race(write ? " writes what was written by thread " : " reads what was written by thread ", shadow.writer);
    }
    if (write) {
      if (shadow.read == interval_ && shadow.reader != current_)
        race(" writes what was read by thread ", shadow.reader);
      shadow.written = interval_;
      shadow.writer = current_;
    } else {
      if (shadow.written < block_start_) fail("read of unwritten shared memory at byte ", 2 * granule, where());
      shadow.reader = shadow.read == interval_ && shadow.reader != current_ ? kMany : current_;
      shadow.read = interval_;
    }
  }

  void run_thread(unsigned int thread) {
    current_ = thread;
    thread_index =
        dim3(thread % block_size.x, thread / block_size.x % block_size.y, thread / block_size.x / block_size.y);
    fibres_[thread].state = State::kDone;  // unless it comes back to wait
    if (_setjmp(scheduler_) == 0) {
      if (started_[thread]) _longjmp(fibres_[thread].resume, 1);
      started_[thread] = true;
      ucontext_t context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_[thread].get();
      context.uc_stack.ss_size = kStackBytes;
      context.uc_link = nullptr;
      makecontext(&context, &Machine::enter, 0);
      setcontext(&context);
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  static void enter();

  bool release_warps() {
    bool released = false;
    exchanged_.resize(fibres_.size());
    for (unsigned int thread = 0; thread < fibres_.size(); ++thread) {
      const Fibre& fibre = fibres_[thread];
      if (fibre.state != State::kAtWarp) continue;
      const unsigned int first = thread / kWarp * kWarp;
      bool complete = true;
      for (unsigned int lane = 0; lane < kWarp; ++lane) {
        if (!(fibre.mask >> lane & 1)) continue;
        const unsigned int other = first + lane;
        complete &= other < fibres_.size() && fibres_[other].state == State::kAtWarp &&
                    fibres_[other].line == fibre.line && fibres_[other].mask == fibre.mask;
      }
      if (!complete) continue;
      for (unsigned int lane = 0; lane < kWarp; ++lane) {
        if (!(fibre.mask >> lane & 1)) continue;
        Fibre& other = fibres_[first + lane];
        const unsigned int source = first + other.source;
        exchanged_[first + lane] = source < fibres_.size() ? fibres_[source].given : ~uint64_t{0};
        other.state = State::kReady;
      }
      released = true;
    }
    return released;
  }

  // False if every thread has left the kernel.
  bool release_barrier() {
    const Fibre* waiting = nullptr;
    const Fibre* done = nullptr;
    for (const Fibre& fibre : fibres_) {
      if (fibre.state == State::kAtWarp) {
        fail("the warp operation at ", fibre.file, ":", fibre.line, " is reached by part of the lanes of its mask");
      }
      if (fibre.state == State::kDone) done = &fibre;
      if (fibre.state != State::kAtBarrier) continue;
      if (waiting && (waiting->line != fibre.line || std::strcmp(waiting->file, fibre.file) != 0)) {
        fail("threads of a block wait at different barriers, ", waiting->file, ":", waiting->line, " and ", fibre.file,
             ":", fibre.line);
      }
      waiting = &fibre;
    }
    if (!waiting) return false;
    if (done) fail("threads have left the kernel while others wait at ", waiting->file, ":", waiting->line);
    for (Fibre& fibre : fibres_) fibre.state = State::kReady;
    ++interval_;
    return true;
  }

  std::vector<Fibre> fibres_;
  std::vector<bool> started_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<uint64_t> exchanged_;
  std::vector<Fragment> fragments_[2];
  std::vector<unsigned char> turns_;
  std::vector<unsigned char> memory_;
  std::vector<Shadow> shadow_;
  size_t shared_bytes_ = 0;
  uint64_t interval_ = 0, block_start_ = 0;
  unsigned int current_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  jmp_buf scheduler_;
};

inline Machine machine;

inline void Machine::enter() {
  try {
    (*machine.kernel_)();
  } catch (const std::exception& error) {
    machine.error_ = error.what();
  }
  _longjmp(machine.scheduler_, 1);
}

template <typename Kernel>
void run_grid(dim3 blocks, dim3 threads, size_t shared_bytes, const Kernel& kernel) {
  const unsigned int count = blocks.x * blocks.y * blocks.z, size = threads.x * threads.y * threads.z;
  if (count == 0 || blocks.y > 65535 || blocks.z > 65535 || size == 0 || size > 1024) {
    fail("a launch of (", blocks.x, ", ", blocks.y, ", ", blocks.z, ") blocks of (", threads.x, ", ", threads.y, ", ",
         threads.z, ") threads");
  }
  if (shared_bytes > 48 * 1024) fail("a launch with ", shared_bytes, " bytes of shared memory");
  settings.largest_shared_bytes = std::max<int64_t>(settings.largest_shared_bytes, shared_bytes);
  std::mt19937 random(settings.seed);
  std::vector<unsigned int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  grid_size = blocks;
  block_size = threads;
  for (unsigned int block : order) {
    block_index = dim3(block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y);
    machine.run_block(kernel, shared_bytes, random);
  }
}

// ---- Checked memory ----

template <typename T>
class GlobalPointer {
 public:
  GlobalPointer() = default;
  GlobalPointer(T* begin, int64_t size) : begin_(begin), size_(size) {}

  T& operator[](int64_t i) const { return *access<T>(i); }
  GlobalPointer operator+(int64_t i) const {
    GlobalPointer moved = *this;
    moved.position_ += i;
    return moved;
  }

  // The elements from here on as one V.
  template <typename V>
  V* access(int64_t i = 0) const {
    const int64_t at = position_ + i, count = sizeof(V) / sizeof(T);
    if (at < 0 || at + count > size_) fail("global access at element ", at, " of ", size_, machine.where());
    T* address = begin_ + at;
    if (reinterpret_cast<uintptr_t>(address) % alignof(V) != 0) fail("global access not aligned", machine.where());
    return reinterpret_cast<V*>(address);
  }

 private:
  T* begin_ = nullptr;
  int64_t size_ = 0, position_ = 0;
};

template <typename T>
class SharedReference {
 public:
  using Value = std::remove_const_t<T>;
  explicit SharedReference(int64_t offset) : offset_(offset) {}
  operator Value() const { return *machine.shared<Value>(offset_, false); }
  const SharedReference& operator=(const Value& value) const {
    *machine.shared<T>(offset_, true) = value;
    return *this;
  }
  const SharedReference& operator=(const SharedReference& other) const { return *this = static_cast<Value>(other); }

 private:
  int64_t offset_;
};

template <typename T>
class SharedPointer {
 public:
  SharedPointer() = default;
  explicit SharedPointer(int64_t offset) : offset_(offset) {}
  operator SharedPointer<const T>() const { return SharedPointer<const T>(offset_); }
  SharedReference<T> operator[](int64_t i) const {
    return SharedReference<T>(offset_ + i * static_cast<int64_t>(sizeof(T)));
  }
  SharedPointer operator+(int64_t i) const { return SharedPointer(offset_ + i * static_cast<int64_t>(sizeof(T))); }
  int64_t offset() const { return offset_; }

 private:
  int64_t offset_ = 0;
};

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size

// ---- Built-in functions ----

inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::machine.wait(emulation::State::kAtBarrier, file, line);
}

inline void __syncwarp(unsigned int mask = ~0u, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::machine.exchange(mask, 0, 0, file, line);
}

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::machine.exchange(mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int bits, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, emulation::machine.lane() ^ bits, file, line);
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const unsigned int lane = emulation::machine.lane(), source = lane + delta;
  return __shfl_sync(mask, value, source < emulation::Machine::kWarp ? source : lane, file, line);
}

template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const unsigned int lane = emulation::machine.lane();
  return __shfl_sync(mask, value, delta <= lane ? lane - delta : lane, file, line);
}

// ---- What cuda_utils.cuh takes from the CUDA runtime otherwise ----

namespace vrwkv {

template <typename T>
using Global = emulation::GlobalPointer<T>;
template <typename T>
using Shared = emulation::SharedPointer<T>;

template <typename T>
Shared<T> shared_at(int offset) {
  return Shared<T>(offset);
}

template <typename V, typename T>
auto& vector_at(const emulation::GlobalPointer<T>& position) {
  return *position.template access<std::conditional_t<std::is_const_v<T>, const V, V>>();
}

template <typename V, typename T>
auto vector_at(const emulation::SharedPointer<T>& position) {
  return emulation::SharedReference<std::conditional_t<std::is_const_v<T>, const V, V>>(position.offset());
}

template <typename T>
Global<T> global(const torch::stable::Tensor& tensor) {
  const int64_t bytes = tensor.numel() * tensor.element_size();
  return Global<T>(static_cast<T*>(tensor.data_ptr()), bytes / static_cast<int64_t>(sizeof(T)));
}

template <typename T>
T& strided(const Global<T>& position, int stride, int times) {
  return position[static_cast<int64_t>(stride) * times];
}

inline int computed_here(int x) { return x; }
inline int64_t computed_here(int64_t x) { return x; }

inline float exp2_approximate(float x) {
  if (fabsf(x) < 0x1p-126f) return 1;  // exact, as the manual says; subnormal numbers count as zero
  return emulation::approximate(x, ::exp2(static_cast<double>(x)), 0x1p-22);
}
inline float reciprocal_approximate(float x) {
  if (fabsf(x) < 0x1p-126f) x = copysignf(0, x);
  return emulation::approximate(x, 1 / static_cast<double>(x), 0x1p-23);
}

constexpr bool kHasTf32 = true;

inline float with_bits(float x, uint32_t added, uint32_t kept) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  if (x - x == 0) bits += added;  // infinity and NaN stay
  bits &= kept;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float to_tf32(float x) { return with_bits(x, 0x1000, 0xffffe000); }

// As the tensor core: it ignores the low 13 bits of a and b.
inline void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2], const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  const auto* lanes = emulation::machine.gather({a[0], a[1], a[2], a[3], b[0], b[1]}, file, line);
  const auto truncated = [&](int lane, int which) { return with_bits(lanes[lane][which], 0, 0xffffe000); };
  const int row = emulation::machine.lane() / 4, column = emulation::machine.lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 8; ++k) {
      const int from_a = row * 4 + k % 4, from_b = (column + i % 2) * 4 + k % 4;
      c[i] += truncated(from_a, i / 2 + k / 4 * 2) * truncated(from_b, 4 + k / 4);
    }
  }
}

class Context {
 public:
  explicit Context(const torch::stable::Tensor&) {}

  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
           const Arguments&... arguments) const {
    emulation::run_grid(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  }
};

inline int64_t& kMaxBlocks = emulation::settings.max_blocks;

}  // namespace vrwkv

// Kernels and schemas register beside the real ones: VRWKV_EMULATE_CUDA names the library, whose tensors lie on the
// CPU.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(VRWKV_EMULATE_CUDA, CPU, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_FRAGMENT(library, m) _STABLE_TORCH_LIBRARY_FRAGMENT(VRWKV_EMULATE_CUDA, m, C10_UID)
