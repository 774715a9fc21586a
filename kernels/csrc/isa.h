// What each instruction set's translation unit offers to library.cpp.
#pragma once
#include <stddef.h>

#include "bitnet_cpu.h"

constexpr int64_t kBlockRows = 32;    // rows of a block
constexpr int64_t kTileRows = 64;     // at most, of what gemm multiplies at once
constexpr int64_t kGroupBytes = 128;  // bytes of one block and group: a 32-bit lane for each row
constexpr int group_features(int form) { return form == kBase3 ? 20 : form == kEightBits ? 4 : 16; }
constexpr int64_t kMaxFeatures = int64_t(1) << 23;  // beyond it an int32 accumulator could overflow
constexpr int64_t max_features(int form) { return form == kEightBits ? int64_t(1) << 16 : kMaxFeatures; }

struct Token {
  float s;      // activation scale; divides
  int32_t sum;  // sum of the codes: times what was added to every weight's code, it has to come off the accumulators
};

// The codes of many tokens, in `count` panels of up to max_tokens: those of a panel [k/4, its tokens] in words of 4 codes.
struct Panels {
  const int8_t* codes;
  const Token* token;
  int64_t tokens, count;
  int64_t first(int64_t panel) const { return tokens * panel / count; }  // token of a panel
};

struct Isa {
  const char* name;
  bool (*supported)();
  int form;
  int max_tokens;  // tokens a panel may hold

  // Codes of one token of k features. x_type may be int8: then x is copied, s is not set.
  Token (*quantize)(const void* x, int32_t x_type, int32_t activation_bits, int64_t k, int8_t* codes);

  // Ternary codes of one row of k latent weights.
  void (*ternary_codes)(const void* w, int32_t type, int64_t k, float inv, int8_t* codes);

  // The same for up to four rows, as Hub bytes; a null row is one of zeros.
  void (*pack_ternary)(const void* const* rows, int32_t type, int64_t k, const float* inv, uint8_t* packed);

  // Sum of the magnitudes of one row of k latent weights; Inf or NaN if one of them is.
  double (*magnitude)(const void* w, int32_t type, int64_t k);

  // Rows of blocks [first, last) for one token: y points at its row of the output.
  void (*gemv)(const PreparedWeight& layer, int64_t first, int64_t last, const int8_t* codes, Token token, void* y,
               int32_t y_type);

  // The same for many tokens. acc: scratch for kTileRows accumulators a token, aligned to 64 bytes.
  void (*gemm)(const PreparedWeight& layer, int64_t first, int64_t last, const Panels& panels, int32_t* acc, void* y,
               int32_t y_type);
};

extern const Isa kScalar, kScalarInt8;
extern const Isa kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Vbmi, kAvx2Int8, kAvxVnniInt8, kAvx512VnniInt8;
extern const Isa kNeon, kNeonDot, kNeonInt8, kNeonDotInt8;
