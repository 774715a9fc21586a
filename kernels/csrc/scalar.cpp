// Plain C++: one row a "vector". Runs everywhere, and is the easiest of the instruction sets to check by eye.
#include "body.h"

namespace {

struct Scalar {
  using Vec = uint32_t;
  using Sum = int32_t;
  using Int = int32_t;
  struct Packed {};
  static constexpr int kForm = kTwoBits, kFields = 4, kFactor = 1, kZero = 1;
  static constexpr int kBytes = 4, kPlaneVecs = 32, kWideVecs = 16, kTableLimbs = 0, kTileVecs = 4, kMaxTokens = 4, kStoredPanels = 1, kFewVecs = 4, kFewTokens = 4;
  static constexpr int64_t kSumSteps = kMaxFeatures, kPlaneSteps = kMaxFeatures;

  static INLINE Vec load(const void* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static INLINE void store(void* p, Vec v) { memcpy(p, &v, sizeof(v)); }
  static INLINE Vec splat(const int8_t* p) { return load(p); }
  static INLINE int32_t load32(const int32_t* p) { return *p; }
  static INLINE void store32(int32_t* p, int32_t v) { *p = v; }
  static INLINE int32_t splat32(int32_t i) { return i; }
  static INLINE int32_t add32(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }
  static INLINE int32_t sub32(int32_t a, int32_t b) { return int32_t(uint32_t(a) - uint32_t(b)); }
  static INLINE int32_t times256(int32_t v) { return int32_t(uint32_t(v) << 8); }
  template <int J>
  static INLINE Vec plane(Vec w) {
    return w >> 2 * J & 0x03030303;
  }
  template <int J>
  static INLINE Vec bit(Vec w) {
    return w >> J & 0x01010101;
  }
  template <int J>
  static INLINE Vec nibble(Vec w) {
    return w >> 4 * J & 0x0f0f0f0f;
  }
  static INLINE void add_scaled(float* to, int32_t i, float scale) { *to += float(i) * scale; }
  static INLINE void widen(const uint16_t* half, float* values) { widen_scales(half, values); }
  using Float = float;
  static INLINE Float load_float(const float* p) { return *p; }
  static INLINE Float load_half(const uint16_t* p) { return F16::any(*p); }
  static INLINE Float load_brain(const uint16_t* p) { return BF16::value(*p); }
  static INLINE Float load_byte(const int8_t* p) { return float(*p); }
  static INLINE Float splat_float(float x) { return x; }
  static INLINE void store_float(float* p, Float v) { *p = v; }
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return plane<J>(load(p));
  }
  static INLINE void dot(Sum& sum, Vec u, Vec s) {
    UNROLL for (int b = 0; b < 32; b += 8) sum += int32_t(u >> b & 255) * int8_t(s >> b);
  }
  static INLINE int32_t total(Sum sum) { return sum; }
  using Planes = PlaneByPlane<Scalar>;
};

bool supported() { return true; }

}  // namespace

const Isa kScalar = make_isa<Scalar>("scalar", supported);
const Isa kScalarBinary = make_isa<OneBit<Scalar>>("scalar", supported);
const Isa kScalarInt8 = make_isa<EightBits<Scalar>>("scalar", supported);
const Isa kScalarInt4 = make_isa<FourBits<Scalar>>("scalar", supported);
