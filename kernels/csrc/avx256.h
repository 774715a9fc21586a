// What AVX2 and AVX-VNNI have in common: 256-bit vectors on 2-bit weights.
#pragma once
#include <cpuid.h>
#include <immintrin.h>

#include "body.h"

namespace {

struct Avx256 {
  using Vec = __m256i;
  using Sum = __m256i;
  using Int = __m256i;
  struct Packed {};
  static constexpr int kForm = kTwoBits, kFields = 4, kFactor = 1, kZero = 1;
  static constexpr int kBytes = 32, kTileVecs = 2;
  static constexpr int kPlaneVecs = 2;  // with four, 16 registers do not hold the sums, the activations and the masks

  static INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static INLINE void store(void* p, Vec v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static INLINE Vec splat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static INLINE Vec load32(const int32_t* p) { return load(p); }
  static INLINE void store32(int32_t* p, Vec v) { store(p, v); }
  static INLINE Vec splat32(int32_t i) { return _mm256_set1_epi32(i); }
  static INLINE Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static INLINE Vec sub32(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static INLINE Vec times256(Vec v) { return _mm256_slli_epi32(v, 8); }
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    const Vec w = load(p);
    return _mm256_and_si256(_mm256_srli_epi16(w, 2 * J), _mm256_set1_epi8(3));
  }
  template <int J>
  static INLINE Vec bit(Vec w) {
    return _mm256_and_si256(_mm256_srli_epi16(w, J), _mm256_set1_epi8(1));
  }
  template <int J>
  static INLINE Vec nibble(Vec w) {
    return _mm256_and_si256(J ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15));
  }
  static INLINE void add_scaled(float* to, Vec i, const float* scale) {
    const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(i), _mm256_loadu_ps(scale));
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), y));
  }
  static INLINE void widen(const uint16_t* half, float* values) {
    for (int i = 0; i < kBlockRows; i += 8) store_float(values + i, load_half(half + i));
  }
  using Float = __m256;
  static INLINE Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE Float load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE Float load_byte(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static INLINE Float splat_float(float x) { return _mm256_set1_ps(x); }
  static INLINE void store_float(float* p, Float v) { _mm256_storeu_ps(p, v); }
};

// Two planes a sum, so that one shift serves four of them (16 registers do not hold four sums for each of four
// vectors): even planes as they are, odd ones times 4.
template <class I>
struct TwoSums {
  __m256i even, odd;
  INLINE void add(__m256i w, const __m256i (&s)[4]) {
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), v = _mm256_srli_epi16(w, 4);
    I::dot(even, _mm256_and_si256(w, low), s[0]);
    I::dot(odd, _mm256_and_si256(w, high), s[1]);
    I::dot(even, _mm256_and_si256(v, low), s[2]);
    I::dot(odd, _mm256_and_si256(v, high), s[3]);
  }
  INLINE __m256i total() const { return I::add32(I::total(even), _mm256_srai_epi32(I::total(odd), 2)); }
};

// The same for 1-bit weights: bits j and j + 4 a sum, times 2^j.
template <class I>
struct FourSums {
  __m256i sum[4];
  INLINE void add(__m256i w, const __m256i (&s)[8]) {
    const __m256i v = _mm256_srli_epi16(w, 4);
    UNROLL for (int j = 0; j < 4; ++j) {
      const __m256i mask = _mm256_set1_epi8(char(1 << j));
      I::dot(sum[j], _mm256_and_si256(w, mask), s[j]);
      I::dot(sum[j], _mm256_and_si256(v, mask), s[j + 4]);
    }
  }
  INLINE __m256i total() const {
    const __m256i low = I::add32(I::total(sum[0]), _mm256_srai_epi32(I::total(sum[1]), 1));
    const __m256i high = I::add32(I::total(sum[2]), _mm256_srai_epi32(I::total(sum[3]), 1));
    return I::add32(low, _mm256_srai_epi32(high, 2));
  }
};

// Every CPU with AVX2 has it; scales are float16.
INLINE bool f16c_supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

}  // namespace
