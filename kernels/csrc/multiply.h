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

  // Codes of one token: `limbs` rows of `padded` codes, and the sums of its groups; returns s. row: row_bytes().
  float quantize(int64_t m, int8_t* row, int32_t* sums) const {
    const int64_t k = layer.k;
    int8_t* codes = row + limbs * padded;  // before steps come in
    const float token_s = isa.quantize(x + m * x_stride, x_type, activation_bits, k, codes);
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
    return x_type == kInt8 || x_type == kInt16 ? (s ? s[m] : 1) : token_s;
  }
};

// Words of 4 codes, `stride` words apart.
void spread(const int8_t* codes, int64_t count, int64_t stride, int8_t* words) {
  for (int64_t i = 0; i < count; i += 4, words += 4 * stride) memcpy(words, codes + i, 4);
}

// One token: every thread quantizes it for itself, which takes less time than waiting for another.
Status decode(const Call& call, int threads) {
  const int64_t blocks = ceil_div(call.layer.n, kBlockRows), codes_bytes = ceil_div(call.limbs * call.padded, 64) * 64;
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    auto* codes = static_cast<int8_t*>(row_scratch.reserve(codes_bytes + 4 * call.groups.count + call.row_bytes()));
    if (!codes) {
      __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
      return;
    }
    auto* sums = reinterpret_cast<int32_t*>(codes + codes_bytes);
    auto* row = reinterpret_cast<int8_t*>(sums + call.groups.count);
    const Token token{call.limbs == 2 ? codes : row, sums, call.quantize(0, row, sums), call.limbs};
    if (call.limbs == 2)
      for (int limb = 0; limb < 2; ++limb) spread(row + limb * call.padded, call.padded, 2, codes + 4 * limb);
    call.isa.gemv(call.layer, share(blocks, thread, count), share(blocks, thread + 1, count), token, call.y,
                  call.y_type);
  });
  return status;
}

// Many tokens: the threads share the quantizing, then each multiplies all tokens by its own rows of the weight.
Status prefill(const Call& call, int64_t m, int threads) {
  const int64_t padded = call.padded, blocks = ceil_div(call.layer.n, kBlockRows), groups = call.groups.count;
  const int64_t slabs = ceil_div(m, kSlab), largest = ceil_div(m, slabs);
  char* memory = static_cast<char*>(panel_scratch.reserve(largest * (call.limbs * padded + 4 * groups + 4)));
  if (!memory) return kNoMemory;
  auto* codes = reinterpret_cast<int8_t*>(memory);
  auto* sums = reinterpret_cast<int32_t*>(memory + largest * call.limbs * padded);
  auto* s = reinterpret_cast<float*>(sums + largest * groups);
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    const int64_t scratch = scratch_bytes(largest, call.limbs, call.layer.group_size);
    auto* acc = static_cast<int32_t*>(row_scratch.reserve(scratch + call.row_bytes()));
    auto* row = reinterpret_cast<int8_t*>(acc) + scratch;
    if (!acc) __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t m0 = share(m, slab, slabs), tokens = share(m, slab + 1, slabs) - m0;
      const int64_t widest = call.isa.max_tokens / call.limbs;
      const Panels panels{codes, sums, s, tokens, ceil_div(tokens, widest), call.limbs};
      for (int64_t p = share(panels.count, thread, count); acc && p < share(panels.count, thread + 1, count); ++p) {
        const int64_t first = panels.first(p), width = (panels.first(p + 1) - first) * call.limbs;
        int8_t* words = codes + first * call.limbs * padded;
        for (int64_t t = first; t < panels.first(p + 1); ++t) {
          s[t] = call.quantize(m0 + t, row, sums + t * groups);
          for (int limb = 0; limb < call.limbs; ++limb, words += 4) spread(row + limb * padded, padded, width, words);
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
