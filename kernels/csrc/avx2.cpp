// AVX2: vpmaddubsw adds two products u8 * s8 into 16 bits, so sums stay 16 bits wide as long as they can.
#include <immintrin.h>

#include "body.h"

namespace {

struct Avx2 {
  using Vec = __m256i;
  using Sum = __m256i;  // 16 x int16
  struct Packed {};
  static constexpr int kLayout = kTwoBits, kFields = 4, kZero = 1;
  static constexpr int kBytes = 32, kTileVecs = 2, kMaxTokens = 4;
  // A group adds at most 4 planes * 2 products * 2 * 128 = 2^11; 16 of them reach -2^15, and 127 stays below 2^15.
  static constexpr int64_t kSumGroups = 16;

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
  static INLINE void dot(Sum& sum, Vec u, Vec s) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)); }
  static INLINE Vec total(Sum sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  // Two planes a sum, so that one shift serves four of them: even planes as they are, odd ones times 4. The odd sum
  // grows by at most 2 planes * 2 products * 8 * 128 = 2^12 a group.
  struct Planes {
    Sum even, odd;
    INLINE void add(Vec w, const Vec (&s)[kFields]) {
      const Vec low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), v = _mm256_srli_epi16(w, 4);
      dot(even, _mm256_and_si256(w, low), s[0]);
      dot(odd, _mm256_and_si256(w, high), s[1]);
      dot(even, _mm256_and_si256(v, low), s[2]);
      dot(odd, _mm256_and_si256(v, high), s[3]);
    }
    INLINE Vec total() const { return add32(Avx2::total(even), _mm256_srai_epi32(Avx2::total(odd), 2)); }
  };
  static constexpr int64_t kPlaneGroups = 8;
};

// Products of 8-bit weights do not fit 16 bits: even and odd bytes are widened, and vpmaddwd adds two products in 32.
struct Avx2Wide : Avx2 {
  using Sum = __m256i;  // 8 x int32
  static constexpr int64_t kSumGroups = kMaxFeatures;
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    const Vec even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                       _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const Vec odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
  static INLINE Vec total(Sum sum) { return sum; }
};

bool supported() { return __builtin_cpu_supports("avx2"); }

}  // namespace

const Isa kAvx2 = make_isa<Avx2>("avx2", supported);
const Isa kAvx2Int8 = make_isa<EightBits<Avx2Wide>>("avx2", supported);
