// What each instruction set's translation unit offers to library.cpp.
#pragma once
#include <stddef.h>

#include "bitnet_cpu.h"

constexpr int64_t kBlockRows = 32;    // rows of a block
constexpr int64_t kTileRows = 64;     // at most, of what gemm multiplies at once
constexpr int64_t kStepBytes = 128;   // bytes of one block and step: a 32-bit lane for each row
constexpr int64_t kTableBytes = 8;    // of the tables that 1-bit weights may take for codes, for each code
constexpr int64_t kMaxGroup = 256;    // features that may share a scale in a row
constexpr int64_t kSpan = 1024;       // features whose groups are summed before the sum goes to the total
constexpr int32_t kMax16 = 127 * 256 + 127;  // of 16-bit activations
constexpr int64_t kMaxHadamard = 8192;  // features of the largest block of a Walsh-Hadamard transform
constexpr int kRun = 16;  // positions of a cache that a vector holds
constexpr int kAnyPanels = 1 << 20;  // that take weights as stored: all
constexpr int kTileQueries = 4;  // that attend to the same head's keys at once
constexpr int64_t kMaxFeatures = int64_t(1) << 23;  // beyond it an int32 accumulator could overflow

constexpr bool is_one_bit(int form) { return form == kOneBit || form == kOneBitTables; }

// Features of a step.
constexpr int step_features(int form) {
  return form == kBase3 ? 20 : form == kEightBits ? 4 : form == kFourBits ? 8 : is_one_bit(form) ? 32 : 16;
}

// Features that an int32 accumulator holds: 2^16 * kMax16 and 2^16 * 127 * 128 are below 2^31. Those of groups hold any.
constexpr int64_t max_features(int form, bool wide, bool groups) {  // wide: 16-bit activations
  return form == kEightBits || (wide && !groups) ? int64_t(1) << 16 : kMaxFeatures;
}

// How groups of features that share a scale lie in steps; without such scales there is one group of all. Where steps do
// not divide groups (base-3), two groups share one, which is multiplied for each, by activations of 0 for features of
// the other.
struct Groups {
  int64_t k, size, count;
  int step;
  Groups(const PreparedWeight& layer, int step)
      : k(layer.k), size(layer.group_size ? layer.group_size : k), count((k + size - 1) / size), step(step) {}
  int64_t first(int64_t g) const { return g * size / step; }
  int64_t steps(int64_t g) const {
    const int64_t end = (g + 1) * size < k ? (g + 1) * size : k;
    return (end + step - 1) / step - first(g);
  }
  bool span_ends(int64_t g) const { return (g + 1) * size % kSpan == 0 || g + 1 == count; }
  int64_t all_steps() const {
    if (size % step == 0 || count == 1) return (k + step - 1) / step;
    int64_t sum = 0;
    for (int64_t g = 0; g < count; ++g) sum += steps(g);
    return sum;
  }
};

// The codes of one token, in words of 4 codes: those of its limbs (one for 8 bits; for 16 the high one first) alternate. Or
// their tables, of which those of a step's codes alternate.
struct Token {
  const int8_t* codes;
  const int32_t* sums;  // of the codes of each group: times what was added to every weight's code, it has to come off
  float s;              // activation scale; divides
  int limbs;
  int64_t row = 0;  // of the output
};

// The codes of many tokens, in `count` panels of up to max_tokens limbs: those of a panel [k/4, its limbs] in words. Or, for
// few tokens, the tables of each.
struct Panels {
  const int8_t* codes;
  const int32_t* sums;  // [tokens, groups]
  const float* s;
  int64_t tokens, count;
  int limbs;
  bool tables;
  int64_t first(int64_t panel) const { return tokens * panel / count; }  // token of a panel
};

// Scratch of gemm, in bytes: an accumulator of each limb, or two float32 sums.
constexpr int64_t scratch_bytes(int64_t tokens, int limbs, bool groups) {
  return tokens * kTileRows * 4 * (groups ? 2 : limbs);
}

// The cache of one key/value head: keys [ceil(capacity/16), key_dim, 16], so that a vector holds 16 positions, and
// values [capacity, value_dim]. Integers have a scale a position.
struct CachedHead {
  void *keys, *values;
  float *key_scales, *value_scales;
};

// One query: it sees positions [first, last) of a cache.
struct Query {
  const float* q;  // [key_dim], times the scale of scores
  float* out;      // [value_dim]
  int64_t first, last;
  const float* sink;  // a score of nothing, or null
};

constexpr int64_t attention_bytes(const Attention& a) {
  return kTileQueries * (a.dim + a.value_dim + a.positions + kRun) * 4;
}

// What happens in a decoder block between its products: attention.h.
struct Between {
  void (*normalize)(const float* x, const Norm& norm, int64_t k, float* y);
  void (*rotate)(const float* cosine, const float* sine, int64_t half, int32_t pairs, float* head);
  float (*score_row)(const void* row, int32_t type, const float* x, int64_t k);  // their dot product
  void (*convolve)(const Recurrence& r, float* window, float* x, int64_t stride, int64_t tokens, int64_t first, int64_t last);
  void (*to_length)(float* x, int64_t k, float factor);
  void (*recur)(float* state, const float* q, const float* k, float* v, float decay, float beta, int64_t keys, int64_t values);
  void (*scan)(float* state, const float* c, const float* b, float* x, float decay, float step, float skip, int64_t keys,
               int64_t values);
  void (*apply_gate)(int32_t gate, const float* bend, float* x, const float* up, int64_t k);  // up: null without one
  void (*store)(int32_t type, const CachedHead& cache, int64_t position, const float* key, const float* value, int64_t dim,
                int64_t value_dim);
  // scores: kTileQueries rows of as many as there are positions, rounded up to 16. dims are multiples of 16.
  void (*attend)(int32_t type, const CachedHead& cache, const Query* queries, int count, int64_t dim, int64_t value_dim, float cap,
                 float* scores);
  // Queries [first, first + count) of a key/value head; scratch: of attention_bytes().
  void (*attend_rows)(const Attention& a, int64_t batch, int64_t kv_head, int64_t first, int count, float* scratch);
  void (*normalize_row)(const Norm& norm, const void* x, int32_t type, int64_t k, void* y, float* scratch);
};

struct Isa {
  const char* name;
  bool (*supported)();
  int form;
  int max_tokens;  // limbs that one of several panels may hold
  int few_tokens;  // the same for panels that take weights as stored
  int stored_panels;  // how many of these there may be
  int table_limbs;  // so many are given as tables

  // Codes (int16 for 16 bits) and s of one token of k features. x_type may be that of codes: then x is copied, s is 1.
  float (*quantize)(const void* x, int32_t x_type, int32_t activation_bits, int64_t k, void* codes);
  void (*sum_groups)(const void* codes, int32_t activation_bits, int64_t k, int64_t size, int32_t* sums);
  void (*split)(const int16_t* codes, int64_t k, int8_t* high, int8_t* low);

  // The Walsh-Hadamard transform of one token of k features, in blocks. signs [k] or null; factor: block ** -0.5.
  void (*hadamard)(const void* x, int32_t type, int64_t k, int64_t block, const int8_t* signs, float factor, void* y);

  // Ternary codes of one row of k latent weights.
  void (*ternary_codes)(const void* w, int32_t type, int64_t k, float inv, int8_t* codes);

  // The same for up to four rows, as Hub bytes; a null row is one of zeros.
  void (*pack_ternary)(const void* const* rows, int32_t type, int64_t k, const float* inv, uint8_t* packed);

  // Sum of the magnitudes of one row of k latent weights; Inf or NaN if one of them is.
  double (*magnitude)(const void* w, int32_t type, int64_t k);

  // Codes of rows [first, last) of a block of columns.
  void (*choose)(const Columns& columns, int64_t first, int64_t last);

  // Tables of `count` codes of a limb, those of a step `limbs` of these apart; null where there are none.
  void (*make_tables)(const int8_t* codes, int64_t count, int limbs, int8_t* tables);

  // Rows of blocks [first, last) for one token.
  void (*gemv)(const PreparedWeight& layer, int64_t first, int64_t last, const Token& token, void* y, int32_t y_type);

  // The same for many tokens. scratch: of scratch_bytes(), aligned to 64 bytes.
  void (*gemm)(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, void* scratch, void* y,
               int32_t y_type);

  const Between* between;  // of the form of 2 bits only
};

extern const Isa kScalar, kScalarBinary, kScalarInt8, kScalarInt4;
extern const Isa kAvx2, kAvx2Binary, kAvx2Int8, kAvx2Int4, kAvxVnni, kAvxVnniBinary, kAvxVnniInt8, kAvxVnniInt4;
extern const Isa kAvx512Vnni, kAvx512VnniBinary, kAvx512VnniInt8, kAvx512VnniInt4, kAvx512Vbmi, kAvx512VbmiBinary;
extern const Isa kNeon, kNeonBinary, kNeonInt8, kNeonInt4, kNeonDot, kNeonDotBinary, kNeonDotInt8, kNeonDotInt4;
