// AVX512-VNNI and VBMI on base-3 weights: two lookups in registers turn five trits into four 2-bit planes and a rest.
//
// A byte is v = u + 84 t4 with u = t0 + 3 t1 + 9 t2 + 27 t3 <= 80. As 84 = 4 * 21, t4 = (v >> 2) / 21: a table of 64
// entries, which vpermb looks up by the low six bits of every byte (so the bits that a 16-bit shift drags in from the
// neighbour do no harm). v - 84 t4 = u then selects one of 128 entries by vpermi2b.
#include "avx512.h"

namespace {

struct Table {
  alignas(64) uint8_t rest[64], planes[128];
};

constexpr Table make_table() {
  Table t{};
  for (int i = 0; i < 64; ++i) t.rest[i] = uint8_t(84 * (i / 21));
  for (int u = 0; u < 81; ++u) t.planes[u] = uint8_t(u % 3 | u / 3 % 3 << 2 | u / 9 % 3 << 4 | u / 27 << 6);
  return t;
}

constexpr Table kTable = make_table();

struct Avx512Vbmi : Avx512 {
  struct Packed {
    Vec planes, rest;  // t0..t3 as 2-bit fields; 84 t4
  };
  static constexpr int kForm = kBase3, kFields = 5, kFactor = 1, kZero = 1;

  static INLINE Packed split(Vec v) {
    const Vec rest = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 2), load(kTable.rest)), u = _mm512_sub_epi8(v, rest);
    return {_mm512_permutex2var_epi8(load(kTable.planes), u, load(kTable.planes + 64)), rest};
  }

  static INLINE Packed unpack(const uint8_t* p) { return split(load(p)); }
  template <int J>
  static INLINE Vec field(const uint8_t*, Packed p) {
    if constexpr (J < 4) return plane<J>(p.planes);
    else return plane<3>(p.rest);  // the upper two bits of 0, 84 and 168 are 0, 1 and 2
  }

  // 84 t4 is multiplied as it is; its sum is divided at the end, exactly: by 4, and by 21 as a product with 21's
  // inverse modulo 2^32.
  struct Planes {
    FourPlanes low;
    Sum high;
    INLINE void add(Vec v, const Vec (&s)[kFields]) {
      const Packed p = split(v);
      low.add(p.planes, s);
      dot(high, p.rest, s[4]);
    }
    INLINE Vec total() const {
      static_assert(21u * 0x3cf3cf3du == 1u, "");
      const Vec t4 = _mm512_mullo_epi32(_mm512_srai_epi32(high, 2), _mm512_set1_epi32(0x3cf3cf3d));
      return add32(low.total(), t4);
    }
  };
  static constexpr int64_t kPlaneSteps = int64_t(1) << 14;  // 4 products * 168 * 128 < 2^17 a step
};

bool supported() { return vnni_supported() && __builtin_cpu_supports("avx512vbmi"); }

}  // namespace

const Isa kAvx512Vbmi = make_isa<Avx512Vbmi>("avx512-vbmi", supported);
