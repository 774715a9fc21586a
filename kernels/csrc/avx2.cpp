// AVX2: vpmaddubsw adds two products u8 * s8 into 16 bits, so sums stay 16 bits wide as long as they can.
#include "avx256.h"

namespace {

struct Avx2 : Avx256 {  // sums are 16 x int16
  static constexpr int kMaxTokens = 5, kStoredPanels = 1, kFewVecs = 1, kFewTokens = 8;
  // A step adds at most 4 planes * 2 products * 2 * 128 = 2^11; 16 of them reach -2^15, and 127 stays below 2^15.
  // Of two sums the odd one grows by at most 2 planes * 2 products * 8 * 128 = 2^12 a step.
  static constexpr int64_t kSumSteps = 16, kPlaneSteps = 8;
  using Planes = TwoSums<Avx2>;

  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s));
    asm("" : "+x"(sum));  // gcc would add products first, and spill most of them
  }
  static INLINE Vec total(Sum sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

// Products of 8-bit weights do not fit 16 bits: even and odd bytes are widened, and vpmaddwd adds two products in 32.
struct Avx2Wide : Avx2 {  // sums are 8 x int32
  static constexpr int kStoredPanels = kAnyPanels, kFewTokens = kMaxTokens;  // there is nothing to unpack
  static constexpr int64_t kSumSteps = kMaxFeatures;
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    const Vec even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                       _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const Vec odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
  static INLINE Vec total(Sum sum) { return sum; }
};

// What takes half as many instructions: vpmaddubsw of |w| and of the code with w's sign, whose two products fit 16 bits
// unless a code is -128, which has no opposite.
struct Avx2Signed : Avx2Wide {
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    const Vec w = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
    const Vec products = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(s, w));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
};
struct SignedBytes : EightBits<Avx2Signed> {
  static constexpr int kZero = 0;
};

void gemm_bytes(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, void* scratch, void* y,
                int32_t y_type) {
  const int64_t codes = panels.tokens * ((layer.k + 3) / 4 * 4);
  bool lowest = false;
  for (int64_t i = 0; i < codes; ++i) lowest |= panels.codes[i] == -128;
  (lowest ? gemm<EightBits<Avx2Wide>> : gemm<SignedBytes>)(layer, first, last, panels, scratch, y, y_type);
}

bool supported() {
  static const bool answer = __builtin_cpu_supports("avx2") && f16c_supported();
  return answer;
}

}  // namespace

const Isa kAvx2 = make_isa<Avx2>("avx2", supported);
const Isa kAvx2Binary = make_isa<OneBitTables<Avx2>>("avx2", supported);
const Isa kAvx2Int8 = [] {
  Isa isa = make_isa<EightBits<Avx2Wide>>("avx2", supported);
  isa.gemm = gemm_bytes;
  return isa;
}();
const Isa kAvx2Int4 = make_isa<FourBits<Avx2>>("avx2", supported);
