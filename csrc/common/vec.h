// Portable vectors of floats, as wide as the processor has: a kernel is a template over the width W, inlined into one function a
// processor level, and chosen once at run time (STELLAR_FAST_BY_LEVEL). All helpers are always inlined, so that each copy is compiled for
// its level.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace stellar_fast {

#define STELLAR_FAST_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define STELLAR_FAST_LEVELS  // of the processor, chosen at run time
inline const bool rounds_to_bfloat16 = __builtin_cpu_supports("avx512bf16");
#endif

struct bfloat16 {
  uint16_t bits;
};

template <int W>
struct Vec;
#define STELLAR_FAST_VEC(W)                                                  \
  template <>                                                                \
  struct Vec<W> {                                                            \
    typedef float f32 __attribute__((vector_size(4 * W)));                   \
    typedef int32_t i32 __attribute__((vector_size(4 * W)));                 \
    typedef uint32_t u32 __attribute__((vector_size(4 * W)));                \
    typedef uint16_t u16 __attribute__((vector_size(2 * W)));                \
  }
STELLAR_FAST_VEC(4);
STELLAR_FAST_VEC(8);
STELLAR_FAST_VEC(16);
#undef STELLAR_FAST_VEC

template <int W>
using f32v = typename Vec<W>::f32;
template <int W>
using i32v = typename Vec<W>::i32;

template <int W>
STELLAR_FAST_INLINE f32v<W> load(const float *p) {
  f32v<W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Of 16 bits to 32 and back GCC 12 makes 6 and 2 instructions for AVX-512, which has one each.
template <int W>
STELLAR_FAST_INLINE typename Vec<W>::u32 widen(typename Vec<W>::u16 half) {
#ifdef STELLAR_FAST_LEVELS
  if constexpr (W == 16) {
    typename Vec<W>::u32 out;
    asm("vpmovzxwd %1, %0" : "=v"(out) : "vm"(half));
    return out;
  }
#endif
  return __builtin_convertvector(half, typename Vec<W>::u32);
}

// The lower halves.
template <int W>
STELLAR_FAST_INLINE typename Vec<W>::u16 narrow(typename Vec<W>::u32 bits) {
#ifdef STELLAR_FAST_LEVELS
  if constexpr (W == 16) {
    typename Vec<W>::u16 out;
    asm("vpmovdw %1, %0" : "=v"(out) : "v"(bits));
    return out;
  }
#endif
  return __builtin_convertvector(bits, typename Vec<W>::u16);
}

template <int W>
STELLAR_FAST_INLINE f32v<W> load(const bfloat16 *p) {
  typename Vec<W>::u16 half;
  std::memcpy(&half, p, sizeof half);
  return (f32v<W>)(widen<W>(half) << 16);
}

template <int W>
STELLAR_FAST_INLINE void store(float *p, f32v<W> v) {
  std::memcpy(p, &v, sizeof v);
}

// Past the caches, where there is an instruction for it; `p` is aligned to the vector. The caller ends with finish_streaming().
template <int W>
STELLAR_FAST_INLINE void stream(float *p, f32v<W> v) {
#ifdef STELLAR_FAST_LEVELS
  if constexpr (W == 16) {
    asm volatile("vmovntps %1, %0" : "=m"(*(f32v<W> *)p) : "v"(v));
    return;
  }
#endif
  store<W>(p, v);
}

STELLAR_FAST_INLINE void finish_streaming() {
#ifdef STELLAR_FAST_LEVELS
  __builtin_ia32_sfence();
#endif
}

// Rounds to nearest, ties to even; a NaN stays a NaN. A processor that rounds by itself takes what is below the normal floats for zero.
template <int W>
STELLAR_FAST_INLINE void store(bfloat16 *p, f32v<W> v) {
  typedef typename Vec<W>::u32 u32;
  typename Vec<W>::u16 half;
#ifdef STELLAR_FAST_LEVELS
  if constexpr (W == 16) {
    if (rounds_to_bfloat16) {
      asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
      std::memcpy(p, &half, sizeof half);
      return;
    }
  }
#endif
  const u32 bits = (u32)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (u32)(v != v);
  half = narrow<W>((rounded & ~nan) | (nan & 0x7fc0));
  std::memcpy(p, &half, sizeof half);
}

STELLAR_FAST_INLINE float to_float(float x) { return x; }
STELLAR_FAST_INLINE float to_float(bfloat16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
STELLAR_FAST_INLINE void from_float(float *p, float x) { *p = x; }
STELLAR_FAST_INLINE void from_float(bfloat16 *p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int kWidest = 16;  // floats in a vector at the highest processor level

inline size_t pad(size_t width) { return (width + kWidest - 1) / kWidest * kWidest; }

// The first `n` elements of a vector; the others are `rest`.
template <int W, typename T>
STELLAR_FAST_INLINE f32v<W> load_first(const T *p, int n, float rest = 0.0f) {
  if (n == W) return load<W>(p);
  float part[W];
  for (int i = 0; i < W; ++i) part[i] = i < n ? to_float(p[i]) : rest;
  return load<W>(part);
}

template <int W, typename T>
STELLAR_FAST_INLINE void store_first(T *p, f32v<W> v, int n) {
  if (n == W) return store<W>(p, v);
  float part[W];
  store<W>(part, v);
  for (int i = 0; i < n; ++i) from_float(p + i, part[i]);
}

template <int W>
STELLAR_FAST_INLINE f32v<W> select(i32v<W> mask, f32v<W> a, f32v<W> b) {
  return (f32v<W>)((mask & (i32v<W>)a) | (~mask & (i32v<W>)b));
}

template <int W>
STELLAR_FAST_INLINE f32v<W> maximum(f32v<W> a, f32v<W> b) {
  return a > b ? a : b;
}

// Lane i gets lane i ^ step.
template <int W>
STELLAR_FAST_INLINE f32v<W> swap_lanes(f32v<W> v, int step) {
  i32v<W> from;
  for (int i = 0; i < W; ++i) from[i] = i ^ step;
  return __builtin_shuffle(v, from);
}

template <int W>
STELLAR_FAST_INLINE float sum(f32v<W> v) {
  if (W > 8) v += swap_lanes<W>(v, 8);
  if (W > 4) v += swap_lanes<W>(v, 4);
  v += swap_lanes<W>(v, 2);
  v += swap_lanes<W>(v, 1);
  return v[0];
}

template <int W>
STELLAR_FAST_INLINE float maximum_of(f32v<W> v) {
  if (W > 8) v = maximum<W>(v, swap_lanes<W>(v, 8));
  if (W > 4) v = maximum<W>(v, swap_lanes<W>(v, 4));
  v = maximum<W>(v, swap_lanes<W>(v, 2));
  v = maximum<W>(v, swap_lanes<W>(v, 1));
  return v[0];
}

// exp for x <= 88.7 within 2 units in the last place; below -87.3, where the result leaves the normal floats, zero.
template <int W>
STELLAR_FAST_INLINE f32v<W> exp(f32v<W> x) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  const I tiny = x < -87.3f;
  x = select<W>(tiny, F{}, x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  F shifted = x * 1.44269504f + magic;
  I n = (I)shifted - 0x4b400000;
  F k = shifted - magic;
  F r = x - k * 0.693145752f;
  r = r - k * 1.42860677e-6f;
  F p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  F scale = (F)((n + 127) << 23);
  F out = p * scale + scale;
  return select<W>(tiny, F{}, out);
}

// log for normal x > 0 within 2 units in the last place; a NaN stays a NaN.
template <int W>
STELLAR_FAST_INLINE f32v<W> log(f32v<W> x) {
  typedef f32v<W> F;
  typedef i32v<W> I;
  const I n = ((I)x - 0x3f3504f3) >> 23;  // x = 2^n times 0.707 to 1.414
  const F k = __builtin_convertvector(n, F), f = (F)((I)x - (n << 23)) - 1;
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * (f * f) - k * 2.12194440e-4f - 0.5f * (f * f);
  return (f + p + k * 0.693359375f) + (x - x);
}

// Level of this processor: 4 (AVX-512), 3 (AVX2 and FMA), else 1.
inline int processor_level() {
#ifdef STELLAR_FAST_LEVELS
  static const int level = __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
  return level;
#else
  return 1;
#endif
}

// STELLAR_FAST_BY_LEVEL(name, (parameters), (arguments)) defines `name`, which runs the template `name_body<W>` compiled for the processor's
// level: W = 16 floats with AVX-512, 8 with AVX2, else 4.
#ifdef STELLAR_FAST_LEVELS
#define STELLAR_FAST_BY_LEVEL(name, parameters, arguments)                                                  \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) static void name##_v4 parameters {     \
    name##_body<16> arguments;                                                                              \
  }                                                                                                         \
  __attribute__((target("arch=x86-64-v3"))) static void name##_v3 parameters { name##_body<8> arguments; } \
  static void name##_v1 parameters { name##_body<4> arguments; }                                            \
  static void name parameters {                                                                             \
    const int level = processor_level();                                                                    \
    level == 4 ? name##_v4 arguments : level == 3 ? name##_v3 arguments : name##_v1 arguments;              \
  }
#else
#define STELLAR_FAST_BY_LEVEL(name, parameters, arguments) \
  static void name parameters { name##_body<4> arguments; }
#endif

}  // namespace stellar_fast
