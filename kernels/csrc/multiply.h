// A call of a layer: tokens are quantized, and the threads share the rows of its weight.
#pragma once
#include <string.h>

#include "isa.h"
#include "threads.h"

namespace {

constexpr int64_t kSlab = 256;  // tokens whose codes are held at once: bounds the scratch memory
thread_local Scratch row_scratch;    // codes of the token this thread is quantizing
thread_local Scratch panel_scratch;  // codes of a slab, shared with the threads this one leads

int64_t element_size(int32_t type) { return type == kInt8 ? 1 : type == kBFloat16 || type == kFloat16 ? 2 : 4; }
bool is_float(int32_t type) { return type == kFloat32 || type == kBFloat16 || type == kFloat16; }

struct Call {
  const PreparedWeight& layer;
  const Isa& isa;
  const char* x;
  int32_t x_type;
  int64_t x_stride;  // bytes
  const float* s;
  char* y;
  int32_t y_type;
  int64_t y_stride;  // bytes

  int64_t padded() const {
    const int group = group_features(layer.form);
    return ceil_div(layer.k, group) * group;
  }

  Token quantize(int64_t m, int8_t* codes) const {
    Token token = isa.quantize(x + m * x_stride, x_type, layer.activation_bits, layer.k, codes);
    memset(codes + layer.k, 0, padded() - layer.k);
    if (x_type == kInt8) token.s = s ? s[m] : 1;
    return token;
  }
};

// One token: every thread quantizes it for itself, which takes less time than waiting for another.
Status decode(const Call& call, int threads) {
  const int64_t padded = call.padded(), blocks = ceil_div(call.layer.n, kBlockRows);
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    auto* codes = static_cast<int8_t*>(row_scratch.reserve(padded));
    if (!codes) {
      __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
      return;
    }
    const Token token = call.quantize(0, codes);
    call.isa.gemv(call.layer, share(blocks, thread, count), share(blocks, thread + 1, count), codes, token, call.y,
                  call.y_type);
  });
  return status;
}

// Many tokens: the threads share the quantizing, then each multiplies all tokens by its own rows of the weight.
Status prefill(const Call& call, int64_t m, int threads) {
  const int64_t padded = call.padded(), blocks = ceil_div(call.layer.n, kBlockRows);
  const int64_t slabs = ceil_div(m, kSlab), largest = ceil_div(m, slabs);
  char* memory = static_cast<char*>(panel_scratch.reserve(largest * (padded + sizeof(Token))));
  if (!memory) return kNoMemory;
  auto* codes = reinterpret_cast<int8_t*>(memory);
  auto* token = reinterpret_cast<Token*>(memory + largest * padded);
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    auto* acc = static_cast<int32_t*>(row_scratch.reserve(largest * kTileRows * sizeof(int32_t) + padded));
    auto* row = reinterpret_cast<int8_t*>(acc + largest * kTileRows);
    if (!acc) __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t m0 = share(m, slab, slabs), tokens = share(m, slab + 1, slabs) - m0;
      const Panels panels{codes, token, tokens, ceil_div(tokens, call.isa.max_tokens)};
      for (int64_t p = share(panels.count, thread, count); acc && p < share(panels.count, thread + 1, count); ++p) {
        const int64_t first = panels.first(p), width = panels.first(p + 1) - first;
        for (int64_t t = 0; t < width; ++t) {
          token[first + t] = call.quantize(m0 + first + t, row);
          int8_t* word = codes + first * padded + 4 * t;
          for (int64_t i = 0; i < padded; i += 4, word += 4 * width) memcpy(word, row + i, 4);
        }
      }
      barrier(count);
      if (acc)
        call.isa.gemm(call.layer, share(blocks, thread, count), share(blocks, thread + 1, count), panels, acc,
                      call.y + m0 * call.y_stride, call.y_type);
      if (slab + 1 < slabs) barrier(count);
    }
  });
  return status;
}

}  // namespace
