// The kernels, written once over a small set of primitives that each instruction set's file defines as struct I:
//
//   Vec, kBytes               a vector of kBytes bytes, or of kBytes/4 int32
//   load, store, splat, load32, store32, add32      splat repeats 4 bytes
//   widen                     a block's scales, from float16 to float32
//   kLayout, kFields          the layout of the weights and how many fields of 4 features a lane of it has
//   Packed, unpack(p)         what is made once of a packed vector, for field<j>(p, packed): its field j
//   Sum, kSumSteps            a partial accumulator, and how many steps it holds before it could overflow
//   dot(sum, u, s), total(sum)    sum += the 4-byte dot products of unsigned u and signed s, lane by lane; as int32
//   Planes, kPlaneSteps       the same for one token: add(w, s[kFields]) takes a whole packed vector, total()
//   kPlaneVecs                vectors of rows that are summed at once for one token
//   kTileVecs, kMaxTokens     shape of the register tile for many: vectors of rows, tokens
//   kFactor, kZero            a weight is kFactor times what its field holds, minus kZero
#pragma once
#include "finish.h"
#include "quantize.h"

namespace {

// One token. Weights are read once, linearly; all that matters is that the loads never wait.

template <class I, int kLimbs>
INLINE void multiply_planes(const uint8_t* w, const int8_t* q, int64_t steps, int32_t (*acc)[kBlockRows]) {
  constexpr int kVecs = kStepBytes / I::kBytes, kTogether = I::kPlaneVecs / kLimbs ? I::kPlaneVecs / kLimbs : 1;
  for (int v0 = 0; v0 < kVecs; v0 += kTogether) {
    typename I::Planes planes[kTogether][kLimbs] = {};
    const uint8_t* p = w + v0 * I::kBytes;
    const int8_t* word = q;
    for (int64_t step = 0; step < steps; ++step, p += kStepBytes, word += 4 * I::kFields * kLimbs) {
      // the hardware's prefetcher stops at every 4 KB page
      for (int byte = 0; byte < kTogether * I::kBytes; byte += 64) __builtin_prefetch(p + 8192 + byte);
      typename I::Vec s[kLimbs][I::kFields];
      UNROLL for (int j = 0; j < I::kFields * kLimbs; ++j) s[j % kLimbs][j / kLimbs] = I::splat(word + 4 * j);
      UNROLL for (int v = 0; v < kTogether; ++v) {
        const typename I::Vec packed = I::load(p + v * I::kBytes);
        UNROLL for (int l = 0; l < kLimbs; ++l) planes[v][l].add(packed, s[l]);
      }
    }
    UNROLL for (int v = 0; v < kTogether; ++v) {
      UNROLL for (int l = 0; l < kLimbs; ++l) {
        int32_t* a = acc[l] + (v0 + v) * I::kBytes / 4;
        I::store32(a, I::add32(I::load32(a), planes[v][l].total()));
      }
    }
  }
}

template <class I, int kLimbs>
void gemv_limbs(const Layer& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type) {
  constexpr int kStep = 4 * I::kFields;
  const Groups groups(layer, kStep);
  const int64_t block_bytes = (layer.k + kStep - 1) / kStep * kStepBytes;
  const auto* scale = static_cast<const uint16_t*>(layer.scale) + first * groups.count * kBlockRows;
  for (int64_t block = first; block < last; ++block) {
    alignas(64) int32_t acc[kLimbs][kBlockRows] = {};
    alignas(64) float part[kBlockRows] = {}, total[kBlockRows] = {};
    const int8_t* q = token.codes;
    for (int64_t g = 0; g < groups.count; ++g) {
      const uint8_t* w = layer.weight + block * block_bytes + groups.first(g) * kStepBytes;
      for (int64_t left = groups.steps(g); left > 0; left -= I::kPlaneSteps) {
        const int64_t here = smaller(left, I::kPlaneSteps);
        multiply_planes<I, kLimbs>(w, q, here, acc);
        w += here * kStepBytes;
        q += here * kStep * kLimbs;
      }
      join<I, kLimbs, kBlockRows>(acc[0], kBlockRows, token.sums[g]);
      if (!layer.group_size) continue;
      alignas(64) float values[kBlockRows];
      I::widen(scale, values);
      scale += kBlockRows;
      const bool span_ends = (g + 1) * groups.size % kSpan == 0 || g + 1 == groups.count;
      add_group<kBlockRows>(acc[0], values, span_ends, part, total);
      memset(acc, 0, sizeof(acc));
    }
    const int64_t n0 = block * kBlockRows;
    if (layer.group_size) finish_groups<kBlockRows>(layer, total, token.s, n0, y, n0, y_type);
    else finish<kBlockRows>(layer, acc[0], token.s, n0, y, n0, y_type);
  }
}

template <class I>
void gemv(const Layer& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type) {
  if (token.limbs == 2) {
    if constexpr (I::kLayout != kEightBits) gemv_limbs<I, 2>(layer, first, last, token, y, y_type);
  } else {
    gemv_limbs<I, 1>(layer, first, last, token, y, y_type);
  }
}

// Many tokens. A slice of V vectors of rows goes through K in chunks. Where there are several panels of tokens, the weights
// of a chunk are unpacked once, to bytes that stay in the first cache, and these multiply one panel after the other; a
// single panel takes them from registers. Either way R vectors of rows times T tokens are summed in registers.

constexpr int kChunkFeatures = 256;  // features: 16 KB of unpacked weights where a slice has 64 rows

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
  static constexpr int64_t kStride = kStepBytes;
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
void multiply(const uint8_t* weight, int64_t block_bytes, int v, int64_t steps, const int8_t* q, int32_t* acc) {
  constexpr int kBlockVecs = kStepBytes / I::kBytes;
  const uint8_t* w[R];
  UNROLL for (int r = 0; r < R; ++r)
    w[r] = weight + (v + r) / kBlockVecs * block_bytes + (v + r) % kBlockVecs * I::kBytes;
  typename I::Sum sum[R][T] = {};
  for (; steps > 0; --steps, q += 4 * I::kFields * T) {
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
INLINE void multiply_panel(const uint8_t* w, int64_t block_bytes, int64_t steps, const int8_t* q, int tokens,
                           int32_t* acc) {
  if (tokens < T) {
    if constexpr (T > 1) multiply_panel<I, W, V, T - 1>(w, block_bytes, steps, q, tokens, acc);
    return;
  }
  constexpr int R = I::kTileVecs < V ? I::kTileVecs : V;
  for (int v = 0; v < V; v += R) multiply<I, W, V, R, T>(w, block_bytes, v, steps, q, acc);
}

template <class I, int V, int J>
INLINE void unpack_fields(const uint8_t* w, typename I::Packed packed, uint8_t* u) {
  I::store(u + J * V * I::kBytes, I::template field<J>(w, packed));
  if constexpr (J + 1 < I::kFields) unpack_fields<I, V, J + 1>(w, packed, u);
}

// The sums of a slice's groups: [tokens][rows] of each kind.
template <class I, int kLimbs, int kRows>
void add_groups(const Panels& panels, int64_t g, const Groups& groups, const float* scale, int32_t* acc, float* part,
                float* total) {
  const bool span_ends = (g + 1) * groups.size % kSpan == 0 || g + 1 == groups.count;
  for (int64_t t = 0; t < panels.tokens; ++t, acc += kLimbs * kRows, part += kRows, total += kRows) {
    join<I, kLimbs, kRows>(acc, kRows, panels.sums[t * groups.count + g]);
    add_group<kRows>(acc, scale, span_ends, part, total);
    memset(acc, 0, kLimbs * kRows * sizeof(*acc));
  }
}

template <class I, int kLimbs, int V>
void slice(const Layer& layer, int64_t block, const Panels& panels, int32_t* acc, void* y, int32_t y_type) {
  constexpr int kRows = V * I::kBytes / 4, kBlockVecs = kStepBytes / I::kBytes, kStep = 4 * I::kFields;
  constexpr int64_t kChunk = I::kSumSteps < kChunkFeatures / kStep ? I::kSumSteps : kChunkFeatures / kStep;
  alignas(64) uint8_t unpacked[kChunk * Unpacked<I, V>::kStride];
  const Groups groups(layer, kStep);
  const int64_t block_bytes = (layer.k + kStep - 1) / kStep * kStepBytes, all_steps = groups.all_steps();
  const int64_t n0 = block * kBlockRows, limbs = panels.tokens * kLimbs;
  auto* part = reinterpret_cast<float*>(acc + limbs * kRows);
  float* total = part + panels.tokens * kRows;
  memset(acc, 0, limbs * kRows * sizeof(*acc));
  if (layer.group_size) memset(part, 0, 2 * panels.tokens * kRows * sizeof(*part));
  int64_t done = 0;  // steps of the codes
  for (int64_t g = 0; g < groups.count; ++g) {
    const uint8_t* w = layer.weight + block * block_bytes + groups.first(g) * kStepBytes;
    for (int64_t left = groups.steps(g); left > 0; left -= kChunk) {
      const int64_t here = smaller(kChunk, left);
      if (panels.count == 1) {
        const int8_t* q = panels.codes + done * kStep * limbs;
        multiply_panel<I, AsStored<I>, V>(w, block_bytes, here, q, int(limbs), acc);
      } else {
        for (int64_t step = 0; step < here; ++step)
          for (int v = 0; v < V; ++v) {
            const uint8_t* from = w + v / kBlockVecs * block_bytes + step * kStepBytes + v % kBlockVecs * I::kBytes;
            unpack_fields<I, V, 0>(from, I::unpack(from), unpacked + step * Unpacked<I, V>::kStride + v * I::kBytes);
          }
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t first = panels.first(p), width = panels.first(p + 1) - first;
          const int8_t* q = panels.codes + (first * all_steps + done * width) * kStep;
          multiply_panel<I, Unpacked<I, V>, V>(unpacked, kBlockVecs * I::kBytes, here, q, int(width),
                                               acc + first * kRows);
        }
      }
      w += here * kStepBytes;
      done += here;
    }
    if (!layer.group_size) continue;
    alignas(64) float scale[kRows];
    for (int b = 0; b < kRows / kBlockRows; ++b)
      I::widen(static_cast<const uint16_t*>(layer.scale) + ((block + b) * groups.count + g) * kBlockRows,
               scale + b * kBlockRows);
    add_groups<I, kLimbs, kRows>(panels, g, groups, scale, acc, part, total);
  }
  for (int64_t t = 0; t < panels.tokens; ++t) {
    const int64_t at = t * layer.n + n0;
    int32_t* a = acc + t * kLimbs * kRows;
    if (layer.group_size) {
      finish_groups<kRows>(layer, total + t * kRows, panels.s[t], n0, y, at, y_type);
    } else {
      join<I, kLimbs, kRows>(a, kRows, panels.sums[t]);
      finish<kRows>(layer, a, panels.s[t], n0, y, at, y_type);
    }
  }
}

template <class I, int kLimbs>
void gemm_limbs(const Layer& layer, int64_t first, int64_t last, const Panels& panels, int32_t* acc, void* y,
                int32_t y_type) {
  constexpr int kBlockVecs = kStepBytes / I::kBytes, V = I::kTileVecs > kBlockVecs ? I::kTileVecs : kBlockVecs;
  for (; first + V / kBlockVecs <= last; first += V / kBlockVecs)
    slice<I, kLimbs, V>(layer, first, panels, acc, y, y_type);
  for (; first < last; ++first) slice<I, kLimbs, kBlockVecs>(layer, first, panels, acc, y, y_type);
}

template <class I>
void gemm(const Layer& layer, int64_t first, int64_t last, const Panels& panels, int32_t* acc, void* y,
          int32_t y_type) {
  if (panels.limbs == 2) {
    if constexpr (I::kLayout != kEightBits) gemm_limbs<I, 2>(layer, first, last, panels, acc, y, y_type);
  } else {
    gemm_limbs<I, 1>(layer, first, last, panels, acc, y, y_type);
  }
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

// The same for 1-bit weights.
template <class I>
struct BitByBit {
  typename I::Sum sum;
  template <int J = 0>
  INLINE void add(typename I::Vec w, const typename I::Vec (&s)[8]) {
    I::dot(sum, I::template bit<J>(w), s[J]);
    if constexpr (J < 7) add<J + 1>(w, s);
  }
  INLINE auto total() const { return I::total(sum); }
};

// Layout D on the primitives of an instruction set, bit<j>(w) among them, and its way to sum for one token.
template <class I, class P = BitByBit<I>, int64_t kSteps = I::kPlaneSteps>
struct OneBit : I {
  struct Packed {};
  using Planes = P;
  static constexpr int kLayout = kOneBit, kFields = 8, kFactor = 2, kZero = 1;
  static constexpr int64_t kPlaneSteps = kSteps;

  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE typename I::Vec field(const uint8_t* p, Packed) {
    return I::template bit<J>(I::load(p));
  }
};

// Layout C on the primitives of an instruction set whose dot() takes any u.
template <class I>
struct EightBits : I {
  using typename I::Sum;
  using typename I::Vec;
  struct Packed {};
  static constexpr int kLayout = kEightBits, kFields = 1, kFactor = 1, kZero = 128;
  static constexpr int64_t kPlaneSteps = I::kSumSteps;

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
  return {name, supported, I::kLayout, I::kMaxTokens, quantize, sum_groups, split,
          ternary_codes, pack_ternary, magnitude, gemv<I>, gemm<I>};
}

}  // namespace
