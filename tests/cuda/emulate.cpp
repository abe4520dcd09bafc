// The rest of the emulated library: the schemas of the real one, and its settings.
#include <common/cuda_utils.cuh>
// After cuda_utils.cuh, which redirects the registration:
#include <_bi_wkv/bi_wkv.cpp>
#include <_gating/gating.cpp>
#include <_q_shift/q_shift.cpp>
#include <_wkv6/wkv6.cpp>

#define EXPORT extern "C" __attribute__((visibility("default")))

// At most `max_blocks` blocks a launch; `seed` sets the order of blocks and threads.
EXPORT void emulation_configure(int64_t max_blocks, unsigned int seed) {
  emulation::settings.max_blocks = max_blocks;
  emulation::settings.seed = seed;
  emulation::settings.largest_shared_bytes = 0;
}

// Of the launches since then.
EXPORT int64_t emulation_largest_shared_bytes() { return emulation::settings.largest_shared_bytes; }
