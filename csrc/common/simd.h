// STELLAR_FAST_SIMD_CLONES before a function compiles its loops once per x86-64 level; the loader picks the best at start-up.
// Needs GCC 12 or later and glibc; elsewhere there is one version, for the processor that the compiler's flags name.
#pragma once

#include <cstddef>  // defines __GLIBC__, whose dynamic loader the choice needs

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define STELLAR_FAST_HAS_SIMD_CLONES 1
#define STELLAR_FAST_SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STELLAR_FAST_HAS_SIMD_CLONES 0
#define STELLAR_FAST_SIMD_CLONES
#endif
