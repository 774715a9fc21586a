// The kernels, written once over a small set of primitives that each instruction set's file defines as struct I:
//
//   Vec, kBytes               a vector of kBytes bytes, or of kBytes/4 int32
//   load, store, splat        splat repeats 4 bytes
//   Int, load32, store32, splat32, add32, sub32, times256    vectors of int32
//   widen                     a block's scales, from float16 to float32
//   add_scaled(to, i, scale)  float32 [vector]: to += i * scale, a Float, rounded twice
//   kForm, kFields          the form of the weights and how many fields of 4 features a lane of it has
//   Packed, unpack(p)         what is made once of a packed vector, for field<j>(p, packed): its field j
//   Sum, kSumSteps            a partial accumulator, and how many steps it holds before it could overflow
//   dot(sum, u, s), total(sum)    sum += the 4-byte dot products of unsigned u and signed s, lane by lane; as int32
//   Planes, kPlaneSteps       the same for one token: add(w, s[kFields]) takes a whole packed vector, total()
//   kPlaneVecs, kWideVecs     vectors of rows that are summed at once for one token, of 8 bits and of 16
//   kTileVecs, kMaxTokens     shape of the register tile for many: vectors of rows, tokens
//   kFewVecs, kFewTokens      the same where all tokens fit one panel, from kMaxTokens on
//   Float, load_float, load_half, load_brain, load_byte, splat_float, store_float    vectors of float32, from
//                           float16, bfloat16 and int8
//   kFactor, kZero            a weight is kFactor times what its field holds, minus kZero
//
//   kTableLimbs               where it is not 0, up to so many limbs of tokens are given as tables of make_tables, for
//                             look_up(w, tables, steps, take), in place of Planes
//
// Those of form F have transpose(w, rows) in place of unpack: the 32-bit lanes of a step's rows, of which
// field<j>(w, packed) is a field.
#pragma once
#include "choose.h"
#include "finish.h"
#include "hadamard.h"
#include "quantize.h"
#include "rows.h"

namespace {

// One token. Weights are read once, linearly; all that matters is that the loads never wait.

// take(v, sums): what the limbs of a token make with vector v of a block's rows, int32. steps: those of a group, or at most
// kPlaneSteps.
template <class I, int kLimbs, class Take>
INLINE void multiply_planes(const uint8_t* w, const int8_t* q, int64_t steps, const Take& take) {
  constexpr bool kOnce = I::kPlaneSteps * 4 * I::kFields >= kMaxGroup;
  constexpr int kVecs = kStepBytes / I::kBytes, kTogether = kLimbs == 2 ? I::kWideVecs : I::kPlaneVecs;
  for (int v0 = 0; v0 < kVecs; v0 += kTogether) {
    const uint8_t* p = w + v0 * I::kBytes;
    const int8_t* word = q;
    typename I::Int sum[kTogether][kLimbs] = {};
    int64_t left = steps;
    do {
      typename I::Planes planes[kTogether][kLimbs] = {};
      for (int64_t here = kOnce ? left : smaller(left, I::kPlaneSteps); here > 0; --here) {
        // the hardware's prefetcher stops at every 4 KB page
        for (int byte = 0; byte < kTogether * I::kBytes; byte += 64) __builtin_prefetch(p + 6144 + byte);
        typename I::Vec s[kLimbs][I::kFields];
        UNROLL for (int j = 0; j < I::kFields * kLimbs; ++j) s[j % kLimbs][j / kLimbs] = I::splat(word + 4 * j);
        UNROLL for (int v = 0; v < kTogether; ++v) {
          const typename I::Vec packed = I::load(p + v * I::kBytes);
          UNROLL for (int l = 0; l < kLimbs; ++l) planes[v][l].add(packed, s[l]);
        }
        p += kStepBytes;
        word += 4 * I::kFields * kLimbs;
      }
      UNROLL for (int v = 0; v < kTogether; ++v)
        UNROLL for (int l = 0; l < kLimbs; ++l) sum[v][l] = I::add32(sum[v][l], planes[v][l].total());
    } while (!kOnce && (left -= I::kPlaneSteps) > 0);
    UNROLL for (int v = 0; v < kTogether; ++v) take(v0 + v, sum[v]);
  }
}

template <class I>
constexpr bool kTables = I::kTableLimbs > 0;

// Which of 16 codes the entries of tables are the sums of: entry i of 16 has code 4j where bit j of i is set, and the same of
// each next table a code that is `apart` further. Bytes with the highest bit set pick none.
template <int kSize>
struct Picks {
  alignas(kSize) uint8_t code[4][kSize];
};

template <int kSize>
constexpr Picks<kSize> make_picks(int apart) {
  Picks<kSize> picks{};
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < kSize; ++i) picks.code[j][i] = uint8_t(i >> j & 1 ? 4 * j + i / 16 * apart : 128);
  return picks;
}

// Bytes that a step takes of a token.
template <class I, int kLimbs>
constexpr int64_t kTokenStep = 4 * I::kFields * kLimbs * (kTables<I> ? kTableBytes : 1);

template <class I, int kLimbs, class Take>
INLINE void multiply_steps(const uint8_t* w, const int8_t* q, int64_t steps, const Take& take) {
  if constexpr (kTables<I>) I::template look_up<kLimbs>(w, q, steps, take);
  else multiply_planes<I, kLimbs>(w, q, steps, take);
}

template <class I, int kLimbs>
void gemv_rows(const PreparedWeight& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type) {
  constexpr int kStep = 4 * I::kFields, kLanes = I::kBytes / 4;
  const int64_t steps = (layer.k + kStep - 1) / kStep;
  for (int64_t block = first; block < last; ++block) {
    alignas(64) int32_t acc[kLimbs][kBlockRows] = {};
    for (int64_t at = 0; at < steps; at += I::kPlaneSteps)
      multiply_steps<I, kLimbs>(layer.weight + (block * steps + at) * kStepBytes, token.codes + at * kTokenStep<I, kLimbs>,
                                smaller(steps - at, I::kPlaneSteps), [&](int v, const auto& sum) INLINE_LAMBDA {
                                  UNROLL for (int l = 0; l < kLimbs; ++l) {
                                    int32_t* a = acc[l] + v * kLanes;
                                    I::store32(a, I::add32(I::load32(a), sum[l]));
                                  }
                                });
    join_rows<I, kLimbs, kBlockRows>(acc[0], token.sums[0]);
    finish<kBlockRows>(layer, acc[0], token.s, block * kBlockRows, y, token.row * layer.n + block * kBlockRows, y_type);
  }
}

template <class I, int kLimbs>
void gemv_groups(const PreparedWeight& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type) {
  constexpr int kStep = 4 * I::kFields, kLanes = I::kBytes / 4;
  const Groups groups(layer, kStep);
  const int64_t steps = (layer.k + kStep - 1) / kStep;
  const auto* scale = static_cast<const uint16_t*>(layer.scale) + first * groups.count * kBlockRows;
  for (int64_t block = first; block < last; ++block) {
    Sums<kBlockRows> sums = {};
    const int8_t* q = token.codes;
    for (int64_t g = 0; g < groups.count; ++g, scale += kBlockRows) {
      const auto off = I::splat32(I::kZero * token.sums[g]);
      multiply_steps<I, kLimbs>(layer.weight + (block * steps + groups.first(g)) * kStepBytes, q, groups.steps(g),
                                [&](int v, const auto& sum) INLINE_LAMBDA {
                                  const auto values = I::load_half(scale + v * kLanes);
                                  I::add_scaled(sums.part + v * kLanes, join<I, kLimbs>(sum, off), values);
                                });
      q += groups.steps(g) * kTokenStep<I, kLimbs>;
      if (groups.span_ends(g)) end_span(sums.part, sums.total, kBlockRows);
    }
    finish_groups<kBlockRows>(layer, sums.total, token.s, block * kBlockRows, y, token.row * layer.n + block * kBlockRows,
                              y_type);
  }
}

template <class I>
void gemv(const PreparedWeight& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type) {
  if constexpr (I::kForm == kFourBits) return gemv_groups<I, 1>(layer, first, last, token, y, y_type);
  else if constexpr (I::kForm != kEightBits) {
    if (layer.group_size && token.limbs == 2) return gemv_groups<I, 2>(layer, first, last, token, y, y_type);
    if (layer.group_size) return gemv_groups<I, 1>(layer, first, last, token, y, y_type);
    if (token.limbs == 2) return gemv_rows<I, 2>(layer, first, last, token, y, y_type);
  }
  if constexpr (I::kForm != kFourBits) gemv_rows<I, 1>(layer, first, last, token, y, y_type);
}

// A few tokens by their tables, which stay in the first cache for some blocks, as these do in the second for all tokens.
constexpr int64_t kTableBlocks = 4;

template <class I>
void gemv_each(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, void* y, int32_t y_type) {
  const Groups groups(layer, step_features(I::kForm));
  const int64_t bytes = groups.all_steps() * groups.step * panels.limbs * kTableBytes;
  for (; first < last; first += kTableBlocks)
    for (int64_t t = 0; t < panels.tokens; ++t) {
      const Token token{panels.codes + t * bytes, panels.sums + t * groups.count, panels.s[t], panels.limbs, t};
      gemv<I>(layer, first, smaller(first + kTableBlocks, last), token, y, y_type);
    }
}

// Many tokens. A slice of V vectors of rows goes through K in chunks. Where there are several panels of tokens, the weights
// of a chunk are unpacked once, to bytes that stay in the first cache, and these multiply one panel after the other; a
// single panel takes them from registers. Either way R vectors of rows times T tokens are summed in registers.

constexpr int kChunkFeatures = 256;  // features: 16 KB of unpacked weights where a slice has 64 rows

template <class I, int V>
struct Unpacked {
  struct Packed {};
  static constexpr int64_t kStride = I::kFields * V * I::kBytes, kAhead = 0;
  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE typename I::Vec field(const uint8_t* p, Packed) {
    return I::load(p + J * V * I::kBytes);
  }
};

template <class I>
struct AsStored : I {
  static constexpr int64_t kStride = kStepBytes, kAhead = 8192;
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

// A panel's share of a chunk, for R vectors from v on. w: the weights, a block's after the other's; take: where it goes.
template <class I, class W, int V, int R, int T, class Take>
__attribute__((noinline)) void multiply(const uint8_t* weight, int64_t block_bytes, int v, int64_t steps, const int8_t* q, const Take& take) {
  constexpr int kBlockVecs = kStepBytes / I::kBytes;
  const uint8_t* w[R];
  UNROLL for (int r = 0; r < R; ++r)
    w[r] = weight + (v + r) / kBlockVecs * block_bytes + (v + r) % kBlockVecs * I::kBytes;
  typename I::Sum sum[R][T] = {};
  for (; steps > 0; --steps, q += 4 * I::kFields * T) {
    typename W::Packed packed[R];
    UNROLL for (int r = 0; r < R; ++r) {
      packed[r] = W::unpack(w[r]);
      if (W::kAhead && r * I::kBytes % 64 == 0) __builtin_prefetch(w[r] + W::kAhead);
    }
    multiply_fields<I, W, 0>(w, packed, q, sum);
    UNROLL for (int r = 0; r < R; ++r) w[r] += W::kStride;
  }
  take.template operator()<R, T>(v, sum);
}

template <class I, class W, int V, int T, class Take>
INLINE void multiply_panel(const uint8_t* w, int64_t block_bytes, int64_t steps, const int8_t* q, int limbs,
                           const Take& take) {
  if (limbs < T) {
    if constexpr (T > Take::kLimbs)
      multiply_panel<I, W, V, T - Take::kLimbs>(w, block_bytes, steps, q, limbs, take);
    return;
  }
  constexpr int kMost = T > I::kMaxTokens ? I::kFewVecs : I::kTileVecs, R = kMost < V ? kMost : V;
  for (int v = 0; v < V; v += R) multiply<I, W, V, R, T>(w, block_bytes, v, steps, q, take);
}

// Sums go to int32 accumulators [limbs of the panel][V vectors].
template <class I, int V, int L>
struct ToRows {
  static constexpr int kLimbs = L;
  int32_t* acc;
  template <int R, int T>
  INLINE void operator()(int v, const typename I::Sum (&sum)[R][T]) const {
    UNROLL for (int t = 0; t < T; ++t) {
      UNROLL for (int r = 0; r < R; ++r) {
        int32_t* a = acc + (t * V + v + r) * I::kBytes / 4;
        I::store32(a, I::add32(I::load32(a), I::total(sum[r][t])));
      }
    }
  }
};

// Sums are those of one group, and go, times its scales, to float32 [tokens of the panel][V vectors].
template <class I, int V, int L>
struct ToGroups {
  static constexpr int kLimbs = L;
  const float* scale;   // [V vectors]
  const int32_t* sums;  // of the codes: one token's lie `stride` after another's
  int64_t stride;
  float* part;
  template <int R, int T>
  INLINE void operator()(int v, const typename I::Sum (&sum)[R][T]) const {
    UNROLL for (int t = 0; t < T / L; ++t) {
      const auto off = I::splat32(I::kZero * sums[t * stride]);
      UNROLL for (int r = 0; r < R; ++r) {
        typename I::Int limbs[L];
        UNROLL for (int l = 0; l < L; ++l) limbs[l] = I::total(sum[r][t * L + l]);
        const auto values = I::load_float(scale + (v + r) * I::kBytes / 4);
        I::add_scaled(part + (t * V + v + r) * I::kBytes / 4, join<I, L>(limbs, off), values);
      }
    }
  }
};

template <class I, int V, int J>
INLINE void unpack_fields(const uint8_t* w, typename I::Packed packed, uint8_t* u) {
  I::store(u + J * V * I::kBytes, I::template field<J>(w, packed));
  if constexpr (J + 1 < I::kFields) unpack_fields<I, V, J + 1>(w, packed, u);
}

// Whether weights are ever unpacked to memory.
template <class I>
constexpr bool kUnpacks = I::kStoredPanels < kAnyPanels;

// One chunk of a slice times all tokens. take(token): where those of a panel that begins there go.
template <class I, int L, int V, class Take>
INLINE void multiply_chunk(const uint8_t* w, int64_t block_bytes, int64_t steps, const Panels& panels, int64_t done,
                           int64_t all_steps, uint8_t* unpacked, const Take& take) {
  constexpr int kBlockVecs = kStepBytes / I::kBytes, kStep = 4 * I::kFields;
  const bool stored = !kUnpacks<I> || panels.count <= I::kStoredPanels;
  if constexpr (I::kForm == kOneBitTables)
    for (int64_t step = 0; step < steps; ++step) {
      typename I::Packed rows[V];
      I::transpose(w + step * kStepBytes, rows);
      UNROLL for (int v = 0; v < V; ++v)
        unpack_fields<I, V, 0>(nullptr, rows[v], unpacked + step * Unpacked<I, V>::kStride + v * I::kBytes);
    }
  else if constexpr (kUnpacks<I>)
    for (int64_t step = 0; !stored && step < steps; ++step)
      for (int v = 0; v < V; ++v) {
        const uint8_t* from = w + v / kBlockVecs * block_bytes + step * kStepBytes + v % kBlockVecs * I::kBytes;
        unpack_fields<I, V, 0>(from, I::unpack(from), unpacked + step * Unpacked<I, V>::kStride + v * I::kBytes);
      }
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t token = panels.first(p), limbs = (panels.first(p + 1) - token) * L;
    const int8_t* q = panels.codes + (token * L * all_steps + done * limbs) * kStep;
    if constexpr (I::kForm != kOneBitTables)
      if (stored) {
        multiply_panel<I, AsStored<I>, V, I::kFewTokens / L * L>(w, block_bytes, steps, q, int(limbs), take(token));
        continue;
      }
    if constexpr (kUnpacks<I>)
      multiply_panel<I, Unpacked<I, V>, V, I::kMaxTokens / L * L>(unpacked, kBlockVecs * I::kBytes, steps, q, int(limbs),
                                                                  take(token));
  }
}

template <class I>
constexpr int64_t chunk_steps() {  // so many that a group fits
  constexpr int64_t kStep = 4 * I::kFields, kChunk = (kChunkFeatures + kStep - 1) / kStep + (kChunkFeatures % kStep > 0);
  static_assert(I::kForm == kEightBits || I::kForm == kFourBits || kChunk <= I::kSumSteps, "");
  return kChunk < I::kSumSteps ? kChunk : I::kSumSteps;
}

template <class I, int L, int V>
void slice_rows(const PreparedWeight& layer, int64_t block, const Panels& panels, int32_t* acc, void* y, int32_t y_type) {
  constexpr int kRows = V * I::kBytes / 4, kStep = 4 * I::kFields;
  alignas(64) uint8_t unpacked[kUnpacks<I> ? chunk_steps<I>() * Unpacked<I, V>::kStride : 1];
  const int64_t steps = (layer.k + kStep - 1) / kStep, n0 = block * kBlockRows;
  memset(acc, 0, panels.tokens * L * kRows * sizeof(*acc));
  const int64_t chunk = panels.count <= I::kStoredPanels ? I::kSumSteps : chunk_steps<I>();  // nothing to unpack: all at once
  for (int64_t at = 0; at < steps; at += chunk)
    multiply_chunk<I, L, V>(layer.weight + (block * steps + at) * kStepBytes, steps * kStepBytes,
                            smaller(chunk, steps - at), panels, at, steps, unpacked,
                            [=](int64_t token) { return ToRows<I, V, L>{acc + token * L * kRows}; });
  for (int64_t t = 0; t < panels.tokens; ++t, acc += L * kRows) {
    join_rows<I, L, kRows>(acc, panels.sums[t]);
    finish<kRows>(layer, acc, panels.s[t], n0, y, t * layer.n + n0, y_type);
  }
}

template <class I, int L, int V>
void slice_groups(const PreparedWeight& layer, int64_t block, const Panels& panels, float* part, void* y, int32_t y_type) {
  constexpr int kRows = V * I::kBytes / 4, kStep = 4 * I::kFields;
  alignas(64) uint8_t unpacked[kUnpacks<I> ? chunk_steps<I>() * Unpacked<I, V>::kStride : 1];
  alignas(64) float scale[kRows];
  const Groups groups(layer, kStep);
  const int64_t steps = (layer.k + kStep - 1) / kStep, all_steps = groups.all_steps(), n0 = block * kBlockRows;
  float* total = part + panels.tokens * kRows;
  memset(part, 0, 2 * panels.tokens * kRows * sizeof(*part));
  int64_t done = 0;  // steps of the codes
  for (int64_t g = 0; g < groups.count; ++g) {
    for (int b = 0; b < kRows / kBlockRows; ++b)
      I::widen(static_cast<const uint16_t*>(layer.scale) + ((block + b) * groups.count + g) * kBlockRows,
               scale + b * kBlockRows);
    const float* values = scale;
    multiply_chunk<I, L, V>(layer.weight + (block * steps + groups.first(g)) * kStepBytes, steps * kStepBytes,
                            groups.steps(g), panels, done, all_steps, unpacked, [&, values](int64_t token) {
                              return ToGroups<I, V, L>{values, panels.sums + token * groups.count + g, groups.count,
                                                       part + token * kRows};
                            });
    done += groups.steps(g);
    if (groups.span_ends(g)) end_span(part, total, panels.tokens * kRows);
  }
  for (int64_t t = 0; t < panels.tokens; ++t)
    finish_groups<kRows>(layer, total + t * kRows, panels.s[t], n0, y, t * layer.n + n0, y_type);
}

template <class I, int L, int V>
void slice(const PreparedWeight& layer, int64_t block, const Panels& panels, void* scratch, void* y, int32_t y_type) {
  if constexpr (I::kForm != kEightBits)
    if (I::kForm == kFourBits || layer.group_size)
      return slice_groups<I, L, V>(layer, block, panels, static_cast<float*>(scratch), y, y_type);
  if constexpr (I::kForm != kFourBits) slice_rows<I, L, V>(layer, block, panels, static_cast<int32_t*>(scratch), y, y_type);
}

template <class I, int L>
void gemm_limbs(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, void* scratch, void* y,
                int32_t y_type) {
  constexpr int kBlockVecs = kStepBytes / I::kBytes, V = I::kTileVecs > kBlockVecs ? I::kTileVecs : kBlockVecs;
  for (; first + V / kBlockVecs <= last; first += V / kBlockVecs)
    slice<I, L, V>(layer, first, panels, scratch, y, y_type);
  for (; first < last; ++first) slice<I, L, kBlockVecs>(layer, first, panels, scratch, y, y_type);
}

template <class I>
void gemm(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, void* scratch, void* y,
          int32_t y_type) {
  if constexpr (kTables<I>)
    if (panels.tables) return gemv_each<I>(layer, first, last, panels, y, y_type);
  if constexpr (I::kForm != kEightBits && I::kForm != kFourBits)
    if (panels.limbs == 2) return gemm_limbs<I, 2>(layer, first, last, panels, scratch, y, y_type);
  gemm_limbs<I, 1>(layer, first, last, panels, scratch, y, y_type);
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

// Form D on the primitives of an instruction set, bit<j>(w) among them, and its way to sum for one token.
template <class I, class P = BitByBit<I>, int64_t kSteps = I::kPlaneSteps>
struct OneBit : I {
  struct Packed {};
  using Planes = P;
  static constexpr int kForm = kOneBit, kFields = 8, kFactor = 2, kZero = 1;
  static constexpr int64_t kPlaneSteps = kSteps;

  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE typename I::Vec field(const uint8_t* p, Packed) {
    return I::template bit<J>(I::load(p));
  }
};

// Form C on the primitives of an instruction set whose dot() takes any u.
template <class I>
struct EightBits : I {
  using typename I::Sum;
  using typename I::Vec;
  struct Packed {};
  static constexpr int kForm = kEightBits, kFields = 1, kFactor = 1, kZero = 128;
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

// Form E on the primitives of an instruction set, nibble<j>(w) among them.
template <class I>
struct FourBits : I {
  using typename I::Sum;
  using typename I::Vec;
  struct Packed {};
  static constexpr int kForm = kFourBits, kFields = 2, kFactor = 1, kZero = 8;
  static constexpr int kPlaneVecs = kStepBytes / I::kBytes;  // all rows of a block: a group is over soon
  // The steps of a group. Where sums have 16 bits, one adds at most 2 fields * 2 products * 15 * 128 = 7680.
  static constexpr int64_t kSumSteps = 4, kPlaneSteps = 4;

  static INLINE Packed unpack(const uint8_t*) { return {}; }
  template <int J>
  static INLINE Vec field(const uint8_t* p, Packed) {
    return I::template nibble<J>(I::load(p));
  }
  struct Planes {
    Sum sum;
    INLINE void add(Vec w, const Vec (&s)[kFields]) {
      I::dot(sum, I::template nibble<0>(w), s[0]);
      I::dot(sum, I::template nibble<1>(w), s[1]);
    }
    INLINE auto total() const { return I::total(sum); }
  };
};

template <class I>
constexpr Isa make_isa(const char* name, bool (*supported)()) {
  void (*make_tables)(const int8_t*, int64_t, int, int8_t*) = nullptr;
  if constexpr (kTables<I>) make_tables = I::make_tables;
  return {name, supported, I::kForm, I::kMaxTokens, I::kFewTokens, I::kStoredPanels, I::kTableLimbs, quantize, sum_groups, split,
          hadamard, ternary_codes, pack_ternary, magnitude, choose, make_tables, gemv<I>, gemm<I>, between<I>()};
}

}  // namespace
