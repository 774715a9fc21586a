// AVX512-VNNI and VBMI on base-3 and 1-bit weights.
//
// Base 3: two lookups in registers turn five trits into four 2-bit planes and a rest.
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

constexpr auto kPicks = make_picks<64>(1);  // a table for each byte of a lane

// Form D, for few tokens by exact look-ups, as form F in avx256.h: four bits of each byte of a lane select one of the 16
// sums of their codes, which are 16 high + low with high in -8..7 and low, less a bias, in bytes. vpermb looks the four
// bytes of a lane up in tables of their own, 64 bytes together, and vpdpbusd adds what it finds. 64 bytes of weights take
// 11 vector operations, where masks take 17.
struct OneBitVbmi : OneBit<Avx512, Avx512::EightPlanes> {
  static constexpr int kTableLimbs = 16;
  static constexpr int kTable = 64, kBias = 30;  // bytes of a table: of sums of low parts, then of high ones

  static void make_tables(const int8_t* codes, int64_t count, int limbs, int8_t* tables) {
    const Vec mask = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t at = 0; at < count; at += 32, tables += (limbs - 1) * 4 * kTable)
      for (int half = 0; half < 2; ++half) {
        const Vec x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at + 16 * half)));
        const Vec high = _mm512_sub_epi8(_mm512_xor_si512(nibble<1>(x), eight), eight), low = _mm512_and_si512(x, mask);
        Vec lows = _mm512_set1_epi8(-kBias), highs = _mm512_setzero_si512();
        for (const auto& code : kPicks.code) {
          lows = _mm512_add_epi8(lows, _mm512_shuffle_epi8(low, load(code)));
          highs = _mm512_add_epi8(highs, _mm512_shuffle_epi8(high, load(code)));
        }
        store(tables, lows);
        store(tables + kTable, highs);
        tables += 2 * kTable;
      }
  }

  // As multiply_planes.
  template <int kLimbs, class Take>
  static INLINE void look_up(const uint8_t* w, const int8_t* tables, int64_t steps, const Take& take) {
    constexpr int kVecs = kStepBytes / kBytes;
    const Vec one = _mm512_set1_epi8(1), sixteen = _mm512_set1_epi8(16), mask = _mm512_set1_epi8(15);
    const Vec table = _mm512_set1_epi32(0x30201000);  // of each byte
    Vec sum[kVecs][kLimbs];
    UNROLL for (auto& limbs : sum)
      UNROLL for (Vec& limb : limbs) limb = splat32(int32_t(steps * 8 * kBias));
    for (; steps > 0; --steps, w += kStepBytes) {
      Vec first[kVecs], second[kVecs];
      UNROLL for (int v = 0; v < kVecs; ++v) {
        __builtin_prefetch(w + 8192 + v * kBytes, 0, 2);  // to the second cache: the first one holds the tables
        const Vec bits = load(w + v * kBytes);
        first[v] = _mm512_or_si512(_mm512_and_si512(bits, mask), table);
        second[v] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(bits, 4), mask), table);
      }
      UNROLL for (int l = 0; l < kLimbs; ++l, tables += 4 * kTable) {
        UNROLL for (int v = 0; v < kVecs; ++v) {
          const Vec low = _mm512_add_epi8(_mm512_permutexvar_epi8(first[v], load(tables)),
                                          _mm512_permutexvar_epi8(second[v], load(tables + 2 * kTable)));
          const Vec high = _mm512_add_epi8(_mm512_permutexvar_epi8(first[v], load(tables + kTable)),
                                           _mm512_permutexvar_epi8(second[v], load(tables + 3 * kTable)));
          dot(sum[v][l], one, low);
          dot(sum[v][l], sixteen, high);
        }
      }
    }
    UNROLL for (int v = 0; v < kVecs; ++v) take(v, sum[v]);
  }
};

bool supported() { return vnni_supported() && __builtin_cpu_supports("avx512vbmi"); }

}  // namespace

const Isa kAvx512Vbmi = make_isa<Avx512Vbmi>("avx512-vbmi", supported);
const Isa kAvx512VbmiBinary = make_isa<OneBitVbmi>("avx512-vbmi", supported);
