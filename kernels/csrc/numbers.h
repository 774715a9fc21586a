// Number formats, and what all of the kernels' files need.
//
// Everything is in an unnamed namespace and no standard library template is used: an inline function that is compiled
// with several sets of flags is merged by the linker into one of them, which older CPUs may not be able to run.
#pragma once
#include <string.h>

#include "isa.h"

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// x & kAbs orders |x| as integers, NaN above Inf above all else; value() is exact where x is finite, any() everywhere.

struct F32 {
  using Bits = uint32_t;
  static constexpr Bits kAbs = 0x7fffffff, kInf = 0x7f800000;
  static INLINE float value(Bits x) { return bits<float>(x); }
  static INLINE float any(Bits x) { return value(x); }
  static INLINE Bits round(float y) { return bits<Bits>(y); }
};

struct BF16 {
  using Bits = uint16_t;
  static constexpr Bits kAbs = 0x7fff, kInf = 0x7f80;
  static INLINE float value(Bits x) { return bits<float>(uint32_t(x) << 16); }
  static INLINE float any(Bits x) { return value(x); }
  static INLINE Bits round(float y) {
    const uint32_t u = bits<uint32_t>(y);
    const uint32_t even = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return Bits((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
  }
};

struct F16 {
  using Bits = uint16_t;
  static constexpr Bits kAbs = 0x7fff, kInf = 0x7c00;
  static INLINE float value(Bits x) {  // the exponents' biases differ by 112; Inf and NaN come out finite
    const float magnitude = bits<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
    return bits<float>(bits<uint32_t>(magnitude) | uint32_t(x & 0x8000) << 16);
  }
  static INLINE float any(Bits x) { return bits<float>(bits<uint32_t>(value(x)) | ((x & kAbs) >= kInf ? 0x7f800000 : 0)); }
  static INLINE Bits round(float y) {
    const uint32_t u = bits<uint32_t>(y), a = u & 0x7fffffff;
    // Below the smallest normal number (2^-14) float32 addition rounds at 2^-24, the spacing there, all by itself.
    const uint32_t tiny = bits<uint32_t>(bits<float>(a) + 0.5f) - bits<uint32_t>(0.5f);
    const uint32_t normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    uint32_t h = a < (113u << 23) ? tiny : normal;
    h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to Inf
    h = a > 0x7f800000 ? 0x7e00 : h;
    return Bits(h | (u >> 16 & 0x8000));
  }
};

// The values of a block's scales, Inf and NaN included.
INLINE void widen_scales(const uint16_t* half, float* values) {
  for (int i = 0; i < kBlockRows; ++i) values[i] = F16::any(half[i]);
}

}  // namespace
