// In front of every source by setup.py: a library that is linked on a new glibc loads on 2.28, manylinux's, too.
//
// The linker binds each function to the newest version that the C library has of it. These have had versions with the
// same results since the architecture's first glibc.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && !defined(__CUDA_ARCH__) && (defined(__x86_64__) || defined(__aarch64__))

#ifdef __x86_64__
#define VRWKV_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define VRWKV_FIRST_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver dlsym,dlsym@" VRWKV_FIRST_GLIBC);  // else 2.34
__asm__(".symver exp,exp@" VRWKV_FIRST_GLIBC);      // else 2.29
__asm__(".symver expf,expf@" VRWKV_FIRST_GLIBC);    // else 2.27
#undef VRWKV_FIRST_GLIBC

extern "C" {
// libstdc++'s shared_ptr counts without atomics where glibc 2.32 says that there is one thread; ours never says so.
__attribute__((visibility("hidden"), weak)) char __libc_single_threaded = 0;
}

#endif
