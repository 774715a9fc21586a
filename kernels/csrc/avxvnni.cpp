// AVX-VNNI: vpdpbusd on 256-bit vectors, for the CPUs that have it without AVX-512.
#include "avx256.h"

namespace {

struct AvxVnni : Avx256 {  // sums are 8 x int32
  static constexpr int kMaxTokens = 6, kStoredPanels = 1, kFewVecs = 1, kFewTokens = 8;
  // Planes of 8 steps: more would fit the sums, but not the first cache, through which they pass twice.
  static constexpr int64_t kSumSteps = kMaxFeatures, kPlaneSteps = 8;
  using Planes = TwoSums<AvxVnni>;

  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    sum = _mm256_dpbusd_avx_epi32(sum, u, s);
    asm("" : "+x"(sum));  // gcc would move sums from register to register
  }
  static INLINE Vec total(Sum sum) { return sum; }
};

bool supported() {
  static const bool answer = [] {  // a hypervisor may take microseconds to answer, and every call asks
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_supports("avx2") && f16c_supported() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
  }();
  return answer;
}

}  // namespace

const Isa kAvxVnni = make_isa<AvxVnni>("avx-vnni", supported);
const Isa kAvxVnniBinary = make_isa<OneBitTables<AvxVnni>>("avx-vnni", supported);
const Isa kAvxVnniInt8 = make_isa<EightBits<AvxVnni>>("avx-vnni", supported);
const Isa kAvxVnniInt4 = make_isa<FourBits<AvxVnni>>("avx-vnni", supported);
