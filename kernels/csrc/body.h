// The kernels, written once over a small set of primitives that each instruction set's file defines as struct I:
//
//   Vec, kBytes               a vector of kBytes bytes, or of kBytes/4 int32
//   load, store, splat, load32, store32, add32      splat repeats 4 bytes
//   kForm, kFields          the form of the weights and how many fields of 4 features a lane of it has
//   Packed, unpack(p)         what is made once of a packed vector, for field<j>(p, packed): its field j
//   Sum, kSumGroups           a partial accumulator, and how many groups it holds before it could overflow
//   dot(sum, u, s), total(sum)    sum += the 4-byte dot products of unsigned u and signed s, lane by lane; as int32
//   Planes, kPlaneGroups      the same for one token: add(w, s[kFields]) takes a whole packed vector, total()
//   kPlaneVecs                vectors of rows that are summed at once for one token
//   kTileVecs, kMaxTokens     shape of the register tile for many: vectors of rows, tokens
//   kZero                     what a packed field holds for a weight of 0
//
// Everything is in an unnamed namespace and no standard library template is used: an inline function that is compiled
// with several sets of flags is merged by the linker into one of them, which older CPUs may not be able to run.
#pragma once
#include <string.h>

#include "isa.h"

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

namespace {

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class To, class From>
INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Number formats. x & kAbs orders |x| as integers, NaN above Inf above all else; value() is exact where x is finite.

struct F32 {
  using Bits = uint32_t;
  static constexpr Bits kAbs = 0x7fffffff, kInf = 0x7f800000;
  static INLINE float value(Bits x) { return bits<float>(x); }
  static INLINE Bits round(float y) { return bits<Bits>(y); }
};

struct BF16 {
  using Bits = uint16_t;
  static constexpr Bits kAbs = 0x7fff, kInf = 0x7f80;
  static INLINE float value(Bits x) { return bits<float>(uint32_t(x) << 16); }
  static INLINE Bits round(float y) {
    const uint32_t u = bits<uint32_t>(y);
    const uint32_t even = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    return Bits((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
  }
};

struct F16 {
  using Bits = uint16_t;
  static constexpr Bits kAbs = 0x7fff, kInf = 0x7c00;
  static INLINE float value(Bits x) {  // the exponents' biases differ by 112; Inf and NaN come out finite
    const float magnitude = bits<float>(uint32_t(x & 0x7fff) << 13) * 0x1p112f;
    return bits<float>(bits<uint32_t>(magnitude) | uint32_t(x & 0x8000) << 16);
  }
  static INLINE Bits round(float y) {
    const uint32_t u = bits<uint32_t>(y), a = u & 0x7fffffff;
    // Below the smallest normal number (2^-14) float32 addition rounds at 2^-24, the spacing there, all by itself.
    const uint32_t tiny = bits<uint32_t>(bits<float>(a) + 0.5f) - bits<uint32_t>(0.5f);
    const uint32_t normal = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
    uint32_t h = a < (113u << 23) ? tiny : normal;
    h = a >= 0x477ff000 ? 0x7c00 : h;  // 65520 and above round to Inf
    h = a > 0x7f800000 ? 0x7e00 : h;
    return Bits(h | (u >> 16 & 0x8000));
  }
};

// The sum of |w| over one row, in float64 and in an order that is the same on every CPU. Inf or NaN if the row holds any.

template <class F>
double magnitude_of(const void* w_, int64_t k) {
  constexpr int kLanes = 16;
  const auto* w = static_cast<const typename F::Bits*>(w_);
  double sum[kLanes] = {};
  typename F::Bits top = 0;
  const auto add = [&](const typename F::Bits* from) __attribute__((always_inline)) {
    for (int i = 0; i < kLanes; ++i) {
      const typename F::Bits a = from[i] & F::kAbs;
      top = a > top ? a : top;
      sum[i] += double(F::value(a));
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) add(w + at);
  typename F::Bits rest[kLanes] = {};
  memcpy(rest, w + at, (k - at) * sizeof(*w));
  add(rest);
  if (top >= F::kInf) return top == F::kInf ? double(__builtin_inff()) : double(__builtin_nanf(""));
  for (int i = 1; i < kLanes; ++i) sum[0] += sum[i];
  return sum[0];
}

double magnitude(const void* w, int32_t type, int64_t k) {
  switch (type) {
    case kFloat32: return magnitude_of<F32>(w, k);
    case kBFloat16: return magnitude_of<BF16>(w, k);
    default: return magnitude_of<F16>(w, k);
  }
}

// Quantization: reference.quantize_activation for 8 bits, operation by operation.

template <class F>
Token quantize_float(const void* x_, int64_t k, int8_t* codes) {
  const auto* x = static_cast<const typename F::Bits*>(x_);
  typename F::Bits top = 0;
  for (int64_t i = 0; i < k; ++i) {
    const typename F::Bits a = x[i] & F::kAbs;
    top = a > top ? a : top;
  }
  if (top >= F::kInf) {  // codes 0; s = 127 / Inf or NaN makes every output NaN
    memset(codes, 0, k);
    return {top == F::kInf ? 0.0f : __builtin_nanf(""), 0};
  }
  const float amax = F::value(top);
  const float s = 127.0f * (1.0f / (amax < 1e-5f ? 1e-5f : amax));
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    // |x s| < 127.5, and 1.5 * 2^23 has a spacing of 1: the addition rounds half to even, the low byte is the code
    const int8_t code = int8_t(bits<uint32_t>(F::value(x[i]) * s + 0x1.8p23f));
    codes[i] = code;
    sum += code;
  }
  return {s, sum};
}

// The same for 4 bits.
template <class F>
Token quantize_4_bits(const void* x_, int64_t k, int8_t* codes) {
  const auto* x = static_cast<const typename F::Bits*>(x_);
  const float mean = float(magnitude_of<F>(x, k) / double(k));
  if (!(mean <= __FLT_MAX__)) {
    memset(codes, 0, k);
    return {mean > 0 ? 0.0f : __builtin_nanf(""), 0};
  }
  const float s = 0x1.52a7fap+1f * (1.0f / (mean < 1e-5f ? 1e-5f : mean));  // sqrt(7)
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    float v = F::value(x[i]) * s;  // clamped before it is rounded, as ternary codes are
    v = v < -8 ? -8 : v;
    v = v > 7 ? 7 : v;
    const int8_t code = int8_t(bits<uint32_t>(v + 0x1.8p23f));
    codes[i] = code;
    sum += code;
  }
  return {s, sum};
}

template <class F>
Token quantize_to(int32_t activation_bits, const void* x, int64_t k, int8_t* codes) {
  return activation_bits == 4 ? quantize_4_bits<F>(x, k, codes) : quantize_float<F>(x, k, codes);
}

Token quantize(const void* x, int32_t x_type, int32_t activation_bits, int64_t k, int8_t* codes) {
  switch (x_type) {
    case kFloat32: return quantize_to<F32>(activation_bits, x, k, codes);
    case kBFloat16: return quantize_to<BF16>(activation_bits, x, k, codes);
    case kFloat16: return quantize_to<F16>(activation_bits, x, k, codes);
  }
  memcpy(codes, x, k);
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += codes[i];
  return {0, sum};
}

// Codes of one row of a latent weight: the ternary ones of reference.quantize_weight. Clamping before rounding changes
// none, as the bounds are integers, and keeps what is added small.

template <class F>
void ternary_codes_of(const void* w_, int64_t k, float inv, int8_t* codes) {
  const auto* w = static_cast<const typename F::Bits*>(w_);
  for (int64_t i = 0; i < k; ++i) {
    float v = F::value(w[i]) * inv;
    v = v < -1 ? -1 : v;
    v = v > 1 ? 1 : v;
    codes[i] = int8_t(bits<uint32_t>(v + 0x1.8p23f));
  }
}

void ternary_codes(const void* w, int32_t type, int64_t k, float inv, int8_t* codes) {
  switch (type) {
    case kFloat32: return ternary_codes_of<F32>(w, k, inv, codes);
    case kBFloat16: return ternary_codes_of<BF16>(w, k, inv, codes);
    case kFloat16: return ternary_codes_of<F16>(w, k, inv, codes);
  }
}

// Hub bytes of up to four rows (null: a row of zeros), whose codes are bits 2j..2j+1 of each byte.
void pack_ternary(const void* const* rows, int32_t type, int64_t k, const float* inv, uint8_t* packed) {
  constexpr int64_t kStep = 512;  // features whose codes stay in the first cache
  const int64_t size = type == kFloat32 ? 4 : 2;
  for (int64_t at = 0; at < k; at += kStep) {
    int8_t codes[4][kStep] = {};
    const int64_t here = smaller(kStep, k - at);
    for (int j = 0; j < 4; ++j)
      if (rows[j]) ternary_codes(static_cast<const char*>(rows[j]) + at * size, type, here, inv[j], codes[j]);
    for (int64_t i = 0; i < here; ++i)
      packed[at + i] = uint8_t(0x55 + codes[0][i] + codes[1][i] * 4 + codes[2][i] * 16 + codes[3][i] * 64);
  }
}

// Epilogue: reference.rescale for `rows` accumulators, which start at row n0 of the output.

template <class F>
void add_bias(const void* bias, int64_t n0, int64_t rows, float* y) {
  const auto* b = static_cast<const typename F::Bits*>(bias) + n0;
  for (int64_t i = 0; i < rows; ++i) y[i] += F::value(b[i]);
}

INLINE void rescale(const PreparedWeight& layer, const int32_t* acc, Token token, int64_t n0, int64_t rows, float* y) {
  if (layer.per_row) {
    for (int64_t i = 0; i < rows; ++i) y[i] = float(acc[i] - token.sum) * (layer.scale[n0 + i] / token.s);
  } else {
    const float factor = layer.scale[0] / token.s;
    for (int64_t i = 0; i < rows; ++i) y[i] = float(acc[i] - token.sum) * factor;
  }
  if (!layer.bias) return;
  switch (layer.bias_type) {
    case kFloat32: return add_bias<F32>(layer.bias, n0, rows, y);
    case kBFloat16: return add_bias<BF16>(layer.bias, n0, rows, y);
    case kFloat16: return add_bias<F16>(layer.bias, n0, rows, y);
  }
}

template <class F>
INLINE void round_to(const float* y, int64_t rows, void* out, int64_t at) {
  auto* o = static_cast<typename F::Bits*>(out) + at;
  for (int64_t i = 0; i < rows; ++i) o[i] = F::round(y[i]);
}

template <int kRows>
void finish(const PreparedWeight& layer, const int32_t* acc, Token token, int64_t n0, void* out, int64_t at, int32_t y_type) {
  const int64_t rows = smaller(kRows, layer.n - n0);
  if (y_type == kInt32) {
    for (int64_t i = 0; i < rows; ++i) static_cast<int32_t*>(out)[at + i] = acc[i] - token.sum;
    return;
  }
  float y[kRows];
  rescale(layer, acc, token, n0, rows, y);
  switch (y_type) {
    case kFloat32: return round_to<F32>(y, rows, out, at);
    case kBFloat16: return round_to<BF16>(y, rows, out, at);
    case kFloat16: return round_to<F16>(y, rows, out, at);
  }
}

// One token. Weights are read once, linearly; all that matters is that the loads never wait.

template <class I>
void gemv(const PreparedWeight& layer, int64_t first, int64_t last, const int8_t* codes, Token token, void* y, int32_t y_type) {
  constexpr int kVecs = kGroupBytes / I::kBytes;
  constexpr int kGroup = 4 * I::kFields;
  const int64_t groups = (layer.k + kGroup - 1) / kGroup;
  const uint8_t* w = layer.weight + first * groups * kGroupBytes;
  for (int64_t block = first; block < last; ++block) {
    alignas(64) int32_t acc[kBlockRows] = {};
    for (int64_t left = groups; left > 0; left -= I::kPlaneGroups) {
      const int64_t here = smaller(left, I::kPlaneGroups);
      for (int first = 0; first < kVecs; first += I::kPlaneVecs) {
        typename I::Planes planes[I::kPlaneVecs] = {};
        const uint8_t* p = w + first * I::kBytes;
        const int8_t* q = codes + (groups - left) * kGroup;
        for (int64_t g = here; g > 0; --g, p += kGroupBytes, q += kGroup) {
          // the hardware's prefetcher stops at every 4 KB page
          for (int byte = 0; byte < I::kPlaneVecs * I::kBytes; byte += 64) __builtin_prefetch(p + 8192 + byte);
          typename I::Vec s[I::kFields];
          UNROLL for (int j = 0; j < I::kFields; ++j) s[j] = I::splat(q + 4 * j);
          UNROLL for (int v = 0; v < I::kPlaneVecs; ++v) planes[v].add(I::load(p + v * I::kBytes), s);
        }
        UNROLL for (int v = 0; v < I::kPlaneVecs; ++v) {
          int32_t* a = acc + (first + v) * I::kBytes / 4;
          I::store32(a, I::add32(I::load32(a), planes[v].total()));
        }
      }
      w += here * kGroupBytes;
    }
    finish<kBlockRows>(layer, acc, {token.s, I::kZero * token.sum}, block * kBlockRows, y, block * kBlockRows, y_type);
  }
}

// Many tokens. A slice of V vectors of rows goes through K in chunks. Where there are several panels of tokens, the weights
// of a chunk are unpacked once, to bytes that stay in the first cache, and these multiply one panel after the other; a
// single panel takes them from registers. Either way R vectors of rows times T tokens are summed in registers.

constexpr int kChunkSteps = 64;  // of 4 features: 16 KB of unpacked weights where a slice has 64 rows

template <class I, int V>
struct Unpacked {
  struct Packed {};
  static constexpr int64_t kStride = I::kFields * V * I::kBytes;
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE typename I::Vec field(const uint8_t* p, Packed) {
    return I::load(p + J * V * I::kBytes);
  }
};

template <class I>
struct AsStored : I {
  static constexpr int64_t kStride = kGroupBytes;
};

template <class I, class W, int J, int R, int T>
INLINE void multiply_fields(const uint8_t* const (&w)[R], const typename W::Packed (&packed)[R], const int8_t* q,
                            typename I::Sum (&sum)[R][T]) {
  typename I::Vec u[R];
  UNROLL for (int r = 0; r < R; ++r) u[r] = W::template field<J>(w[r], packed[r]);
  UNROLL for (int t = 0; t < T; ++t) {
    const typename I::Vec s = I::splat(q + 4 * (J * T + t));
    UNROLL for (int r = 0; r < R; ++r) I::dot(sum[r][t], u[r], s);
  }
  if constexpr (J + 1 < I::kFields) multiply_fields<I, W, J + 1>(w, packed, q, sum);
}

// acc [T][V vectors] += a panel's share of a chunk, for R vectors from v on. w: the weights, a block's after the other's.
template <class I, class W, int V, int R, int T>
void multiply(const uint8_t* weight, int64_t block_bytes, int v, int64_t groups, const int8_t* q, int32_t* acc) {
  constexpr int kBlockVecs = kGroupBytes / I::kBytes;
  const uint8_t* w[R];
  UNROLL for (int r = 0; r < R; ++r)
    w[r] = weight + (v + r) / kBlockVecs * block_bytes + (v + r) % kBlockVecs * I::kBytes;
  typename I::Sum sum[R][T] = {};
  for (; groups > 0; --groups, q += 4 * I::kFields * T) {
    typename W::Packed packed[R];
    UNROLL for (int r = 0; r < R; ++r) packed[r] = W::unpack(w[r]);
    multiply_fields<I, W, 0>(w, packed, q, sum);
    UNROLL for (int r = 0; r < R; ++r) w[r] += W::kStride;
  }
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int r = 0; r < R; ++r) {
      int32_t* a = acc + (t * V + v + r) * I::kBytes / 4;
      I::store32(a, I::add32(I::load32(a), I::total(sum[r][t])));
    }
  }
}

template <class I, class W, int V, int T = I::kMaxTokens>
INLINE void multiply_panel(const uint8_t* w, int64_t block_bytes, int64_t groups, const int8_t* q, int tokens,
                           int32_t* acc) {
  if (tokens < T) {
    if constexpr (T > 1) multiply_panel<I, W, V, T - 1>(w, block_bytes, groups, q, tokens, acc);
    return;
  }
  constexpr int R = I::kTileVecs < V ? I::kTileVecs : V;
  for (int v = 0; v < V; v += R) multiply<I, W, V, R, T>(w, block_bytes, v, groups, q, acc);
}

template <class I, int V, int J>
INLINE void unpack_fields(const uint8_t* w, typename I::Packed packed, uint8_t* u) {
  I::store(u + J * V * I::kBytes, I::template field<J>(w, packed));
  if constexpr (J + 1 < I::kFields) unpack_fields<I, V, J + 1>(w, packed, u);
}

template <class I, int V>
void slice(const PreparedWeight& layer, int64_t block, const Panels& panels, int32_t* acc, void* y, int32_t y_type) {
  constexpr int kRows = V * I::kBytes / 4, kBlockVecs = kGroupBytes / I::kBytes, kGroup = 4 * I::kFields;
  constexpr int64_t kChunk = I::kSumGroups < kChunkSteps / I::kFields ? I::kSumGroups : kChunkSteps / I::kFields;
  alignas(64) uint8_t unpacked[kChunk * Unpacked<I, V>::kStride];
  const int64_t groups = (layer.k + kGroup - 1) / kGroup, block_bytes = groups * kGroupBytes;
  memset(acc, 0, panels.tokens * kRows * sizeof(*acc));
  for (int64_t first = 0; first < groups; first += kChunk) {
    const int64_t here = smaller(kChunk, groups - first);
    const uint8_t* w = layer.weight + block * block_bytes + first * kGroupBytes;
    if (panels.count == 1) {
      const int8_t* q = panels.codes + first * kGroup * panels.tokens;
      multiply_panel<I, AsStored<I>, V>(w, block_bytes, here, q, int(panels.tokens), acc);
      continue;
    }
    for (int64_t g = 0; g < here; ++g)
      for (int v = 0; v < V; ++v) {
        const uint8_t* from = w + v / kBlockVecs * block_bytes + g * kGroupBytes + v % kBlockVecs * I::kBytes;
        unpack_fields<I, V, 0>(from, I::unpack(from), unpacked + g * Unpacked<I, V>::kStride + v * I::kBytes);
      }
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t token = panels.first(p), tokens = panels.first(p + 1) - token;
      const int8_t* q = panels.codes + (token * groups + first * tokens) * kGroup;
      int32_t* a = acc + token * kRows;
      multiply_panel<I, Unpacked<I, V>, V>(unpacked, kBlockVecs * I::kBytes, here, q, int(tokens), a);
    }
  }
  const int64_t n0 = block * kBlockRows;
  for (int64_t t = 0; t < panels.tokens; ++t) {
    const Token token = panels.token[t];
    finish<kRows>(layer, acc + t * kRows, {token.s, I::kZero * token.sum}, n0, y, t * layer.n + n0, y_type);
  }
}

template <class I>
void gemm(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, int32_t* acc, void* y,
          int32_t y_type) {
  constexpr int kBlockVecs = kGroupBytes / I::kBytes, V = I::kTileVecs > kBlockVecs ? I::kTileVecs : kBlockVecs;
  for (; first + V / kBlockVecs <= last; first += V / kBlockVecs) slice<I, V>(layer, first, panels, acc, y, y_type);
  for (; first < last; ++first) slice<I, kBlockVecs>(layer, first, panels, acc, y, y_type);
}

// Planes of an instruction set that has nothing better than to unpack plane<j>(w) and multiply each.
template <class I>
struct PlaneByPlane {
  typename I::Sum sum;
  INLINE void add(typename I::Vec w, const typename I::Vec (&s)[4]) {
    I::dot(sum, I::template plane<0>(w), s[0]);
    I::dot(sum, I::template plane<1>(w), s[1]);
    I::dot(sum, I::template plane<2>(w), s[2]);
    I::dot(sum, I::template plane<3>(w), s[3]);
  }
  INLINE auto total() const { return I::total(sum); }
};

// Form C on the primitives of an instruction set whose dot() takes any u.
template <class I>
struct EightBits : I {
  using typename I::Sum;
  using typename I::Vec;
  struct Packed {};
  static constexpr int kForm = kEightBits, kFields = 1, kZero = 128;
  static constexpr int64_t kPlaneGroups = I::kSumGroups;

  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return I::load(p);
  }
  struct Planes {
    Sum sum;
    INLINE void add(Vec w, const Vec (&s)[kFields]) { I::dot(sum, w, s[0]); }
    INLINE auto total() const { return I::total(sum); }
  };
};

template <class I>
constexpr Isa make_isa(const char* name, bool (*supported)()) {
  return {name, supported, I::kForm, I::kMaxTokens, quantize, ternary_codes, pack_ternary, magnitude, gemv<I>, gemm<I>};
}

}  // namespace
