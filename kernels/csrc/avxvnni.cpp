// AVX-VNNI: vpdpbusd on 256-bit vectors, for the CPUs that have it without AVX-512.
#include <cpuid.h>
#include <immintrin.h>

#include "body.h"

namespace {

struct AvxVnni {
  using Vec = __m256i;
  using Sum = __m256i;  // 8 x int32
  struct Packed {};
  static constexpr int kLayout = kTwoBits, kFields = 4, kZero = 1;
  static constexpr int kBytes = 32, kTileVecs = 2, kMaxTokens = 5;
  static constexpr int64_t kSumGroups = kMaxFeatures;

  static INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static INLINE Vec splat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
  }
  static INLINE Vec load32(const int32_t* p) { return load(p); }
  static INLINE void store32(int32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static INLINE Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    const Vec w = load(p);
    return _mm256_and_si256(_mm256_srli_epi16(w, 2 * J), _mm256_set1_epi8(3));
  }
  static INLINE void dot(Sum& sum, Vec u, Vec s) { sum = _mm256_dpbusd_avx_epi32(sum, u, s); }
  static INLINE Vec total(Sum sum) { return sum; }

  // As in avx2.cpp: 16 registers do not hold four sums for each of four vectors.
  struct Planes {
    Sum even, odd;
    INLINE void add(Vec w, const Vec (&s)[kFields]) {
      const Vec low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), v = _mm256_srli_epi16(w, 4);
      dot(even, _mm256_and_si256(w, low), s[0]);
      dot(odd, _mm256_and_si256(w, high), s[1]);
      dot(even, _mm256_and_si256(v, low), s[2]);
      dot(odd, _mm256_and_si256(v, high), s[3]);
    }
    INLINE Vec total() const { return add32(even, _mm256_srai_epi32(odd, 2)); }
  };
  static constexpr int64_t kPlaneGroups = int64_t(1) << 14;  // 2^13 a group in the odd sum
};

bool supported() {
  static const bool answer = [] {  // a hypervisor may take microseconds to answer, and every call asks
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
  }();
  return answer;
}

}  // namespace

const Isa kAvxVnni = make_isa<AvxVnni>("avx-vnni", supported);
const Isa kAvxVnniInt8 = make_isa<EightBits<AvxVnni>>("avx-vnni", supported);
