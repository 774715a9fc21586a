// NEON, and with -DBITNET_DOTPROD the dot product instructions of ARMv8.2: two instruction sets from one file.
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "body.h"

namespace {

struct Neon {
  using Vec = int8x16_t;
  using Int = int32x4_t;
  struct Packed {};
  static constexpr int kForm = kTwoBits, kFields = 4, kFactor = 1, kZero = 1;
  static constexpr int kBytes = 16, kPlaneVecs = 8, kWideVecs = 4, kTileVecs = 4, kTableLimbs = 0;

  static INLINE Vec load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
  static INLINE void store(void* p, Vec v) { vst1q_s8(static_cast<int8_t*>(p), v); }
  static INLINE Vec splat(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  static INLINE int32x4_t load32(const int32_t* p) { return vld1q_s32(p); }
  static INLINE void store32(int32_t* p, int32x4_t v) { vst1q_s32(p, v); }
  static INLINE int32x4_t splat32(int32_t i) { return vdupq_n_s32(i); }
  static INLINE int32x4_t add32(int32x4_t a, int32x4_t b) { return vaddq_s32(a, b); }
  static INLINE int32x4_t sub32(int32x4_t a, int32x4_t b) { return vsubq_s32(a, b); }
  static INLINE int32x4_t times256(int32x4_t v) { return vshlq_n_s32(v, 8); }
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return plane<J>(load(p));
  }
  template <int J>
  static INLINE Vec plane(Vec w) {
    if constexpr (J == 0) return vandq_s8(w, vdupq_n_s8(3));
    else if constexpr (J == 3) return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 6));
    else return vandq_s8(vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 2 * J)), vdupq_n_s8(3));
  }

  template <int J>
  static INLINE Vec bit(Vec w) {
    if constexpr (J == 0) return vandq_s8(w, vdupq_n_s8(1));
    else if constexpr (J == 7) return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 7));
    else return vandq_s8(vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), J)), vdupq_n_s8(1));
  }
  template <int J>
  static INLINE Vec nibble(Vec w) {
    if constexpr (J == 0) return vandq_s8(w, vdupq_n_s8(15));
    else return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
  }
  static INLINE void add_scaled(float* to, int32x4_t i, float32x4_t scale) {
    vst1q_f32(to, vaddq_f32(vld1q_f32(to), vmulq_f32(vcvtq_f32_s32(i), scale)));
  }
  static INLINE void widen(const uint16_t* half, float* values) {
    for (int i = 0; i < kBlockRows; i += 4) store_float(values + i, load_half(half + i));
  }
  using Float = float32x4_t;
  static INLINE Float load_float(const float* p) { return vld1q_f32(p); }
  static INLINE Float load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static INLINE Float load_brain(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static INLINE Float load_byte(const int8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word))))));
  }
  static INLINE Float splat_float(float x) { return vdupq_n_f32(x); }
  static INLINE void store_float(float* p, Float v) { vst1q_f32(p, v); }

#ifdef BITNET_DOTPROD
  using Sum = int32x4_t;
  static constexpr int kMaxTokens = 5, kStoredPanels = 1, kFewVecs = 2, kFewTokens = 10;
  static constexpr int64_t kSumSteps = kMaxFeatures, kPlaneSteps = int64_t(1) << 14;
  static INLINE void dot(Sum& sum, Vec u, Vec s) { sum = vdotq_s32(sum, u, s); }
  static INLINE int32x4_t total(Sum sum) { return sum; }

  // Even planes as they are, odd ones times 4: one shift serves all four (see avx256.h).
  struct Planes {
    Sum even, odd;
    INLINE void add(Vec w, const Vec (&s)[kFields]) {
      const Vec low = vdupq_n_s8(3), high = vdupq_n_s8(12);
      const Vec v = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
      dot(even, vandq_s8(w, low), s[0]);
      dot(odd, vandq_s8(w, high), s[1]);
      dot(even, vandq_s8(v, low), s[2]);
      dot(odd, vandq_s8(v, high), s[3]);
    }
    INLINE int32x4_t total() const { return vaddq_s32(even, vshrq_n_s32(odd, 2)); }
  };

  // 1-bit planes j and j + 4 a sum, times 2^j.
  struct BitPlanes {
    Sum sum[4];
    INLINE void add(Vec w, const Vec (&s)[8]) {
      const Vec v = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
      UNROLL for (int j = 0; j < 4; ++j) {
        dot(sum[j], vandq_s8(w, vdupq_n_s8(1 << j)), s[j]);
        dot(sum[j], vandq_s8(v, vdupq_n_s8(1 << j)), s[j + 4]);
      }
    }
    INLINE int32x4_t total() const {
      const int32x4_t low = vaddq_s32(sum[0], vshrq_n_s32(sum[1], 1));
      return vaddq_s32(low, vshrq_n_s32(vaddq_s32(sum[2], vshrq_n_s32(sum[3], 1)), 2));
    }
  };
#else
  struct Sum {
    int16x8_t low, high;  // one product a lane: the bytes of rows 0, 1 and of rows 2, 3
  };
  static constexpr int kMaxTokens = 2, kStoredPanels = 1, kFewVecs = 4, kFewTokens = 2;
  // A step adds at most 4 planes * 2 * 128 = 2^10 (of 1-bit weights 8 * 1 * 128, the same); 32 of them reach -2^15, and 127 stays below 2^15.
  static constexpr int64_t kSumSteps = 32, kPlaneSteps = 32;
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    sum.low = vmlal_s8(sum.low, vget_low_s8(u), vget_low_s8(s));
    sum.high = vmlal_high_s8(sum.high, u, s);
  }
  static INLINE int32x4_t total(Sum sum) { return vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high)); }
  using Planes = PlaneByPlane<Neon>;
  using BitPlanes = BitByBit<Neon>;
#endif
};

// NEON multiplies signed by signed: the 128 comes off the weights in registers, and with it nothing off the result.
struct NeonInt8 : EightBits<Neon> {
  static constexpr int kFactor = 1, kZero = 0;
#ifndef BITNET_DOTPROD
  static constexpr int64_t kSumSteps = 1, kPlaneSteps = 1;  // one product fills 15 bits
#endif
  static INLINE Vec code(Vec w) { return veorq_s8(w, vdupq_n_s8(-128)); }
  template <int>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return code(load(p));
  }
  struct Planes {
    Sum sum;
    INLINE void add(Vec w, const Vec (&s)[kFields]) { dot(sum, code(w), s[0]); }
    INLINE int32x4_t total() const { return Neon::total(sum); }
  };
};

}  // namespace

#ifdef BITNET_DOTPROD
static bool supported() {
#if defined(__APPLE__)
  return true;  // every Apple CPU that runs macOS has it
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
const Isa kNeonDot = make_isa<Neon>("neon-dotprod", supported);
const Isa kNeonDotBinary = make_isa<OneBit<Neon, Neon::BitPlanes>>("neon-dotprod", supported);
const Isa kNeonDotInt8 = make_isa<NeonInt8>("neon-dotprod", supported);
const Isa kNeonDotInt4 = make_isa<FourBits<Neon>>("neon-dotprod", supported);
#else
static bool supported() { return true; }
const Isa kNeon = make_isa<Neon>("neon", supported);
const Isa kNeonBinary = make_isa<OneBit<Neon, Neon::BitPlanes>>("neon", supported);
const Isa kNeonInt8 = make_isa<NeonInt8>("neon", supported);
const Isa kNeonInt4 = make_isa<FourBits<Neon>>("neon", supported);
#endif
