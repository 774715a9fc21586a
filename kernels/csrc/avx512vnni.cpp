// AVX512-VNNI on 2-bit, 1-bit, 8-bit and 4-bit weights.
#include "avx512.h"

namespace {

struct Avx512Vnni : Avx512 {
  struct Packed {};
  static constexpr int kForm = kTwoBits, kFields = 4, kFactor = 1, kZero = 1;
  static constexpr int kWideVecs = 2;  // 16 sums; the forms that need more registers have them in memory
  using Planes = FourPlanes;

  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return plane<J>(load(p));
  }
};

}  // namespace

const Isa kAvx512Vnni = make_isa<Avx512Vnni>("avx512-vnni", vnni_supported);
const Isa kAvx512VnniBinary = make_isa<OneBit<Avx512, Avx512::EightPlanes>>("avx512-vnni", vnni_supported);
const Isa kAvx512VnniInt8 = make_isa<EightBits<Avx512>>("avx512-vnni", vnni_supported);
const Isa kAvx512VnniInt4 = make_isa<FourBits<Avx512>>("avx512-vnni", vnni_supported);
