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
  static constexpr int kBytes = 32, kTileVecs = 2, kTableLimbs = 0;
  static constexpr int kWideVecs = 1;
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
  static INLINE void add_scaled(float* to, Vec i, __m256 scale) {
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(_mm256_cvtepi32_ps(i), scale)));
  }
  static INLINE void widen(const uint16_t* half, float* values) {
    for (int i = 0; i < kBlockRows; i += 8) store_float(values + i, load_half(half + i));
  }
  using Float = __m256;
  static INLINE Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static INLINE Float load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static INLINE Float load_brain(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
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

constexpr auto kPicks = make_picks<32>(0);  // both halves of a vector have the same

// Form F on the primitives of an instruction set. For one token, four weights of each of 32 rows are looked up at once
// (T-MAC, arXiv 2407.00088): their four bits select one of the 16 sums that the four codes can make. Here exactly: a code is
// 16 high + low with high in -8..7 and low in 0..15, and each part has a table of bytes. As kBias is taken off the sums of
// low parts, those of four look-ups fit bytes, -128..112 and -120..120. They are then widened to 16 bits, which hold the sums
// of kPlaneSteps, 256 codes, once the bias is back: -32768..32512. On the way there they may wrap around.
//
// 32 bytes take 13 vector operations; masks and vpmaddubsw take 25. For many tokens the bytes are transposed
// back, and multiplied like those of other forms.
template <class I>
struct OneBitTables : I {
  using typename I::Vec;
  struct Packed {
    Vec lanes;
  };
  static constexpr int kForm = kOneBitTables, kFields = 8, kFactor = 2, kZero = 1;
  static constexpr int kStoredPanels = 0, kTableLimbs = 16;
  static constexpr int64_t kPlaneSteps = 8;
  static constexpr int kTable = 32, kBias = 30;  // bytes: the sums of low parts, then of high ones

  static void make_tables(const int8_t* codes, int64_t count, int limbs, int8_t* tables) {
    const Vec bias = _mm256_setr_m128i(_mm_set1_epi8(-kBias), _mm_setzero_si128());
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t at = 0; at < count; at += 32, tables += (limbs - 1) * 8 * kTable)
      for (int half = 0; half < 2; ++half) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at + 16 * half));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 4), mask);
        const Vec parts = _mm256_setr_m128i(_mm_and_si128(x, mask), _mm_sub_epi8(_mm_xor_si128(high, eight), eight));
        for (int b = 0; b < 4; ++b, tables += kTable) {
          Vec sums = bias;
          for (const auto& code : kPicks.code) {
            const Vec pick = _mm256_add_epi8(I::load(code), _mm256_set1_epi8(char(b)));
            sums = _mm256_add_epi8(sums, _mm256_shuffle_epi8(parts, pick));
          }
          I::store(tables, sums);
        }
      }
  }

  static INLINE Vec table(const int8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // As multiply_planes, for up to kPlaneSteps.
  template <int kLimbs, class Take>
  static INLINE void look_up(const uint8_t* w, const int8_t* tables, int64_t steps, const Take& take) {
    const Vec weights = _mm256_set1_epi16(16 << 8 | 1);
    Vec sum[kLimbs][2], total[4][kLimbs];  // of 16 and of 32 bits
    UNROLL for (auto& rows : sum) rows[0] = rows[1] = _mm256_set1_epi16(short(steps * 8 * kBias));
    for (; steps > 0; --steps, w += kStepBytes, tables += kLimbs * 8 * kTable) {
      for (int byte = 0; byte < kStepBytes; byte += 64) __builtin_prefetch(w + 4096 + byte);
      UNROLL for (int half = 0; half < 2; ++half) {
        Vec nibble[4];
        UNROLL for (int b = 0; b < 4; ++b) {
          const Vec bytes = I::load(w + 32 * b);
          nibble[b] = half ? I::template nibble<1>(bytes) : I::template nibble<0>(bytes);
        }
        UNROLL for (int l = 0; l < kLimbs; ++l) {
          Vec low, high;
          UNROLL for (int b = 0; b < 4; ++b) {
            const int8_t* t = tables + ((l * 2 + half) * 4 + b) * kTable;
            const Vec some_low = _mm256_shuffle_epi8(table(t), nibble[b]);
            const Vec some_high = _mm256_shuffle_epi8(table(t + kTable / 2), nibble[b]);
            low = b ? _mm256_add_epi8(low, some_low) : some_low;
            high = b ? _mm256_add_epi8(high, some_high) : some_high;
          }
          const Vec first = _mm256_maddubs_epi16(weights, _mm256_unpacklo_epi8(low, high));
          const Vec second = _mm256_maddubs_epi16(weights, _mm256_unpackhi_epi8(low, high));
          sum[l][0] = _mm256_add_epi16(sum[l][0], first);
          sum[l][1] = _mm256_add_epi16(sum[l][1], second);
        }
      }
    }
    UNROLL for (int l = 0; l < kLimbs; ++l)
      UNROLL for (int i = 0; i < 2; ++i) {
        const Vec sign = _mm256_srai_epi16(sum[l][i], 15);
        total[2 * i][l] = _mm256_unpacklo_epi16(sum[l][i], sign);
        total[2 * i + 1][l] = _mm256_unpackhi_epi16(sum[l][i], sign);
      }
    UNROLL for (int v = 0; v < 4; ++v) take(v, total[v]);
  }

  static INLINE void transpose(const uint8_t* w, Packed (&rows)[4]) {
    const Vec even = I::load(w), odd = I::load(w + 32), even2 = I::load(w + 64), odd2 = I::load(w + 96);
    const Vec first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpacklo_epi8(even2, odd2);
    const Vec third = _mm256_unpackhi_epi8(even, odd), fourth = _mm256_unpackhi_epi8(even2, odd2);
    rows[0].lanes = _mm256_unpacklo_epi16(first, second);
    rows[1].lanes = _mm256_unpackhi_epi16(first, second);
    rows[2].lanes = _mm256_unpacklo_epi16(third, fourth);
    rows[3].lanes = _mm256_unpackhi_epi16(third, fourth);
  }
  template <int J>
  static INLINE Vec field(const uint8_t*, Packed packed) {
    return I::template bit<J>(packed.lanes);
  }
};

// Every CPU with AVX2 has it; scales are float16.
INLINE bool f16c_supported() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

}  // namespace
