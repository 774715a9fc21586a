// A call of a layer: tokens are quantized, and the threads share the rows of its weight.
#pragma once
#include <string.h>

#include "isa.h"
#include "threads.h"

namespace {

constexpr int64_t kSlab = 256;  // tokens whose codes are held at once: bounds the scratch memory
thread_local Scratch row_scratch;    // codes of the token this thread is quantizing
thread_local Scratch panel_scratch;  // codes of a slab, shared with the threads this one leads

int64_t element_size(int32_t type) {
  return type == kInt8 ? 1 : type == kFloat32 || type == kInt32 ? 4 : 2;
}
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
  int32_t activation_bits = x_type == kInt8 ? 8 : x_type == kInt16 ? 16 : layer.activation_bits;
  int limbs = activation_bits == 16 ? 2 : 1;
  Groups groups{layer, step_features(layer.form)};
  int64_t padded = groups.all_steps() * groups.step;  // codes of a limb, with the zeros that steps add

  int64_t row_bytes() const { return limbs * padded + 4 * layer.k; }

  // Whether the codes of so many tokens become tables, and the bytes of one's codes or tables.
  bool tables(int64_t tokens) const { return tokens * limbs <= isa.table_limbs; }
  int64_t code_bytes(int64_t tokens) const { return limbs * padded * (tables(tokens) ? kTableBytes : 1); }

  // Codes of one token x: `limbs` rows of `padded` codes, and the sums of its groups; returns s. row: row_bytes().
  float quantize_token(const char* x, int8_t* row, int32_t* sums) const {
    const int64_t k = layer.k;
    int8_t* codes = row + limbs * padded;  // before steps come in
    const float token_s = isa.quantize(x, x_type, activation_bits, k, codes);
    isa.sum_groups(codes, activation_bits, k, groups.size, sums);
    if (limbs == 2) {
      int8_t* high = codes + 2 * k;
      isa.split(reinterpret_cast<const int16_t*>(codes), k, high, high + k);
      codes = high;
    }
    memset(row, 0, limbs * padded);
    for (int limb = 0; limb < limbs; ++limb, row += padded, codes += k) {
      if (groups.size % groups.step == 0 || groups.count == 1) {
        memcpy(row, codes, k);
        continue;
      }
      int8_t* to = row;
      for (int64_t g = 0; g < groups.count; ++g, to += groups.steps(g - 1) * groups.step) {
        const int64_t at = g * groups.size, here = k - at < groups.size ? k - at : groups.size;
        memcpy(to + at - groups.first(g) * groups.step, codes + at, here);
      }
    }
    return token_s;
  }

  // Token m with its scale.
  float quantize(int64_t m, int8_t* row, int32_t* sums) const {
    const float token_s = quantize_token(x + m * x_stride, row, sums);
    return s && (x_type == kInt8 || x_type == kInt16) ? s[m] : token_s;
  }
};

// Words of 4 codes, `stride` words apart.
void spread(const int8_t* codes, int64_t count, int64_t stride, int8_t* words) {
  for (int64_t i = 0; i < count; i += 4, words += 4 * stride) memcpy(words, codes + i, 4);
}

// The limbs of a row of codes as tables.
void make_tables(const Call& call, const int8_t* row, int8_t* tables) {
  const int64_t step = kTableBytes * call.groups.step;
  for (int limb = 0; limb < call.limbs; ++limb)
    call.isa.make_tables(row + limb * call.padded, call.padded, call.limbs, tables + limb * step);
}

int64_t token_bytes(const Call& call) {
  return ceil_div(call.code_bytes(1), 64) * 64 + 4 * call.groups.count + call.row_bytes();
}

// Token 0 as gemv takes it; memory: token_bytes().
Token make_token(const Call& call, void* memory) {
  auto* codes = static_cast<int8_t*>(memory);
  auto* sums = reinterpret_cast<int32_t*>(codes + ceil_div(call.code_bytes(1), 64) * 64);
  auto* row = reinterpret_cast<int8_t*>(sums + call.groups.count);
  const bool tables = call.tables(1);
  const Token token{tables || call.limbs == 2 ? codes : row, sums, call.quantize(0, row, sums), call.limbs};
  if (tables) make_tables(call, row, codes);
  else if (call.limbs == 2)
    for (int limb = 0; limb < 2; ++limb) spread(row + limb * call.padded, call.padded, 2, codes + 4 * limb);
  return token;
}

// Room for the codes of a slab of tokens.
int64_t panel_bytes(const Call& call, int64_t tokens) {
  return tokens * (call.code_bytes(tokens) + 4 * call.groups.count + 4);
}

// Panels that take weights as stored, if those are few enough, else narrower ones for which they are unpacked.
int64_t count_panels(const Isa& isa, int64_t tokens, int limbs) {
  const int64_t stored = ceil_div(tokens, isa.few_tokens / limbs);
  return stored <= isa.stored_panels ? stored : ceil_div(tokens, isa.max_tokens / limbs);
}

// Where they lie in that room.
Panels place_panels(const Call& call, int64_t tokens, void* memory) {
  auto* sums = reinterpret_cast<int32_t*>(static_cast<char*>(memory) + tokens * call.code_bytes(tokens));
  const bool tables = call.tables(tokens);
  return {static_cast<int8_t*>(memory), sums, reinterpret_cast<float*>(sums + tokens * call.groups.count), tokens,
          tables ? tokens : count_panels(call.isa, tokens, call.limbs), call.limbs, tables};
}

// A thread's share of the panels. quantize(token, row, sums) returns s; row: row_bytes().
template <class Quantize>
void fill_panels(const Call& call, const Panels& panels, int8_t* row, int thread, int count, const Quantize& quantize) {
  auto* codes = const_cast<int8_t*>(panels.codes);
  auto* sums = const_cast<int32_t*>(panels.sums);
  for (int64_t p = share(panels.count, thread, count); p < share(panels.count, thread + 1, count); ++p) {
    const int64_t first = panels.first(p), width = (panels.first(p + 1) - first) * call.limbs;
    int8_t* words = codes + first * call.code_bytes(panels.tokens);
    for (int64_t t = first; t < panels.first(p + 1); ++t) {
      const_cast<float*>(panels.s)[t] = quantize(t, row, sums + t * call.groups.count);
      if (panels.tables) make_tables(call, row, words);  // a panel is one token
      for (int limb = 0; limb < call.limbs && !panels.tables; ++limb, words += 4)
        spread(row + limb * call.padded, call.padded, width, words);
    }
  }
}

// One token: every thread quantizes it for itself, which takes less time than waiting for another.
Status decode(const Call& call, int threads) {
  const int64_t blocks = ceil_div(call.layer.n, kBlockRows);
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    void* memory = row_scratch.reserve(token_bytes(call));
    if (!memory) {
      __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
      return;
    }
    call.isa.gemv(call.layer, share(blocks, thread, count), share(blocks, thread + 1, count), make_token(call, memory),
                  call.y, call.y_type);
  });
  return status;
}

// Many tokens: the threads share the quantizing, then each multiplies all tokens by its own rows of the weight.
Status prefill(const Call& call, int64_t m, int threads) {
  const int64_t blocks = ceil_div(call.layer.n, kBlockRows), slabs = ceil_div(m, kSlab), largest = ceil_div(m, slabs);
  void* memory = panel_scratch.reserve(panel_bytes(call, largest));
  if (!memory) return kNoMemory;
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    const int64_t scratch = scratch_bytes(largest, call.limbs, call.layer.group_size);
    auto* acc = static_cast<int8_t*>(row_scratch.reserve(scratch + call.row_bytes()));
    if (!acc) __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t m0 = share(m, slab, slabs), tokens = share(m, slab + 1, slabs) - m0;
      const Panels panels = place_panels(call, tokens, memory);
      if (acc)
        fill_panels(call, panels, acc + scratch, thread, count,
                    [&](int64_t t, int8_t* row, int32_t* sums) { return call.quantize(m0 + t, row, sums); });
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
