// What the AVX-512 instruction sets have in common: vpdpbusd adds four products u8 * s8 to each of 16 int32.
#pragma once
#include <immintrin.h>

#include "body.h"

namespace {

struct Avx512 {
  using Vec = __m512i;
  using Sum = __m512i;  // 16 x int32
  using Int = __m512i;
  static constexpr int kBytes = 64, kPlaneVecs = 2, kWideVecs = 1, kTileVecs = 4, kTableLimbs = 0;
  static constexpr int kMaxTokens = 5;  // 24 sums fit, but run a fifth slower on Zen 4
  static constexpr int kStoredPanels = kAnyPanels, kFewVecs = 2, kFewTokens = 10;
  static constexpr int64_t kSumSteps = kMaxFeatures;

  static INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static INLINE void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
  static INLINE Vec splat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
  }
  static INLINE Vec load32(const int32_t* p) { return load(p); }
  static INLINE void store32(int32_t* p, Vec v) { store(p, v); }
  static INLINE Vec splat32(int32_t i) { return _mm512_set1_epi32(i); }
  static INLINE Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static INLINE Vec sub32(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  static INLINE Vec times256(Vec v) { return _mm512_slli_epi32(v, 8); }
  template <int J>
  static INLINE Vec plane(Vec w) {
    return _mm512_and_si512(_mm512_srli_epi16(w, 2 * J), _mm512_set1_epi8(3));
  }
  template <int J>
  static INLINE Vec bit(Vec w) {
    return _mm512_and_si512(_mm512_srli_epi16(w, J), _mm512_set1_epi8(1));
  }
  template <int J>
  static INLINE Vec nibble(Vec w) {
    return _mm512_and_si512(J ? _mm512_srli_epi16(w, 4) : w, _mm512_set1_epi8(15));
  }
  static INLINE void add_scaled(float* to, Vec i, __m512 scale) {
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(_mm512_cvtepi32_ps(i), scale)));
  }
  static INLINE void widen(const uint16_t* half, float* values) {
    for (int i = 0; i < kBlockRows; i += 16)
      _mm512_storeu_ps(values + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
  }
  using Float = __m512;
  static INLINE Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static INLINE Float load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static INLINE Float load_brain(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static INLINE Float load_byte(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static INLINE Float splat_float(float x) { return _mm512_set1_ps(x); }
  static INLINE void store_float(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    sum = _mm512_dpbusd_epi32(sum, u, s);
    asm("" : "+v"(sum));  // gcc would move sums from register to register
  }
  static INLINE Vec total(Sum sum) { return sum; }

  // Four 2-bit planes for one token: one sum a plane and no shift at all, so plane j comes out times 4^j.
  struct FourPlanes {
    Sum sum[4];
    INLINE void add(Vec w, const Vec* s) {
      UNROLL for (int j = 0; j < 4; ++j) dot(sum[j], _mm512_and_si512(w, _mm512_set1_epi8(char(3 << 2 * j))), s[j]);
    }
    INLINE Vec total() const {
      const Vec low = add32(sum[0], _mm512_srai_epi32(sum[1], 2));
      return add32(low, add32(_mm512_srai_epi32(sum[2], 4), _mm512_srai_epi32(sum[3], 6)));
    }
  };

  // Eight 1-bit planes: two a sum, so plane j and j + 4 come out times 2^j.
  struct EightPlanes {
    Sum sum[4];
    INLINE void add(Vec w, const Vec* s) {
      const Vec v = _mm512_srli_epi16(w, 4);
      UNROLL for (int j = 0; j < 4; ++j) {
        const Vec mask = _mm512_set1_epi8(char(1 << j));
        dot(sum[j], _mm512_and_si512(w, mask), s[j]);
        dot(sum[j], _mm512_and_si512(v, mask), s[j + 4]);
      }
    }
    INLINE Vec total() const {
      const Vec low = add32(sum[0], _mm512_srai_epi32(sum[1], 1));
      return add32(low, _mm512_srai_epi32(add32(sum[2], _mm512_srai_epi32(sum[3], 1)), 2));
    }
  };
  static constexpr int64_t kPlaneSteps = int64_t(1) << 14;  // 4 products * 128 * 128 = 2^16 a step in the top plane
};

INLINE bool vnni_supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace
