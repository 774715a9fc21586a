// The C ABI: argument checks, choice of instruction set, threads, scratch memory, and the layout's converters.
#include <stdlib.h>
#include <string.h>

#include "isa.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

namespace {

constexpr int64_t kSlab = 256;  // tokens whose codes are held at once: bounds the scratch memory

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t share(int64_t total, int64_t part, int64_t parts) { return total * part / parts; }

// Grow-only memory of one thread, for what is too large for its stack.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  void* reserve(size_t wanted) {
    if (wanted > size) {
      free(memory);
      size = (wanted + 4095) / 4096 * 4096;
      memory = aligned_alloc(64, size);
      if (!memory) size = 0;
    }
    return memory;
  }
};
thread_local Scratch row_scratch;    // codes of the token this thread is quantizing
thread_local Scratch panel_scratch;  // codes of a slab, shared with the threads this one leads

const Isa* const compiled[] = {
#define BITNET_ISA(name) &name,
#include "isa_list.inc"
};

// The i-th instruction set of a layout that this CPU can run, best first; null past the last.
const Isa* find_isa(int32_t layout, int32_t i) {
  if (i < 0) return nullptr;
  for (const Isa* isa : compiled)
    if (isa->layout == layout && isa->supported() && i-- == 0) return isa;
  return nullptr;
}

bool forked = false;  // a forked child has none of the pool's threads, and OpenMP would wait for them for ever
#ifdef __unix__
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

#ifdef _OPENMP
// When another process takes a core, the thread there comes late by whole time slices and the others spin for it: a
// call of 0.1 ms lasts 8. A call that was lost to waiting sends those of the next kAlone seconds to one thread.
constexpr double kLate = 1e-3, kAlone = 0.1;
double alone_until = 0;
thread_local double waited = 0;
#endif

// body(thread, threads) in every thread of a team; on one thread without any of OpenMP's cost.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && !forked) {
    double until, worked = 0;
    __atomic_load(&alone_until, &until, __ATOMIC_RELAXED);
    const double start = omp_get_wtime();
    if (start > until) {
#pragma omp parallel num_threads(threads)
      {
        waited = 0;
        body(omp_get_thread_num(), omp_get_num_threads());
        if (omp_get_thread_num() == 0) worked = omp_get_wtime() - start - waited;
      }
      const double end = omp_get_wtime(), lost = end - start - worked;
      if (lost > kLate && lost > 4 * worked) {
        until = end + kAlone;
        __atomic_store(&alone_until, &until, __ATOMIC_RELAXED);
      }
      return;
    }
  }
#endif
  body(0, 1);
}

void barrier(int threads) {
#ifdef _OPENMP
  if (threads > 1) {
    const double start = omp_get_wtime();
#pragma omp barrier
    waited += omp_get_wtime() - start;
  }
#endif
}

int64_t element_size(int32_t type) { return type == kInt8 ? 1 : type == kBFloat16 || type == kFloat16 ? 2 : 4; }
bool is_float(int32_t type) { return type == kFloat32 || type == kBFloat16 || type == kFloat16; }

struct Call {
  const Layer& layer;
  const Isa& isa;
  const char* x;
  int32_t x_type;
  int64_t x_stride;  // bytes
  const float* s;
  char* y;
  int32_t y_type;
  int64_t y_stride;  // bytes

  int64_t padded() const {
    const int group = group_features(layer.layout);
    return ceil_div(layer.k, group) * group;
  }

  Token quantize(int64_t m, int8_t* codes) const {
    Token token = isa.quantize(x + m * x_stride, x_type, layer.k, codes);
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

// `size` bytes, of which the first `here` are copied, if there are that many, and the others are `padding`.
template <int size, class Words>
void copy_padded(Words& to, const uint8_t* from, int64_t here, int padding) {
  if (here >= size) {
    memcpy(to, from, size);  // of a size that the compiler knows
  } else {
    memset(to, padding, size);
    if (here > 0) memcpy(to, from, here);
  }
}

// One lane of a layout from the bytes of `here` codes, or of a whole group if there are as many; field() leaves code + 1
// in the low two bits of each byte of a word, and turns `padding` into that of code 0.
template <class Field>
uint32_t pack_lane(const uint8_t* from, int64_t here, int32_t layout, int padding, const Field& field) {
  uint32_t t[5];
  if (layout == kEightBits) {
    copy_padded<4>(t, from, here, 0);
    return t[0] ^ 0x80808080;
  }
  if (layout == kBase3) copy_padded<20>(t, from, here, padding);
  else copy_padded<16>(t, from, here, padding), t[4] = 0;
  for (uint32_t& word : t) word = field(word) & 0x03030303;
  return layout == kBase3 ? t[0] + 3 * t[1] + 9 * t[2] + 27 * t[3] + 84 * t[4]
                          : t[0] | t[1] << 2 | t[2] << 4 | t[3] << 6;
}

BITNET_EXPORT int32_t bitnet_abi() { return 8; }

BITNET_EXPORT int32_t bitnet_threads(int32_t wanted) {
#ifdef _OPENMP
  return forked ? 1 : wanted;
#else
  return 1;
#endif
}

BITNET_EXPORT const char* bitnet_isa(int32_t layout, int32_t i) {
  const Isa* isa = find_isa(layout, i);
  return isa ? isa->name : nullptr;
}

BITNET_EXPORT int32_t bitnet_linear(const Layer* layer, const void* x, int32_t x_type, int64_t x_stride,
                                    const float* s, int64_t m, void* y, int32_t y_type, int32_t threads) {
  const int64_t n = layer->n, k = layer->k;
  if (n < 1 || k < 1 || k > max_features(layer->layout) || m < 0) return kBadShape;
  if (x_type == kInt8 ? !(is_float(y_type) || y_type == kInt32) : !is_float(x_type) || y_type != x_type) return kBadType;
  if (x_type == kInt8 && is_float(y_type) && !s && m) return kBadType;
  if (layer->bias && !is_float(layer->bias_type)) return kBadType;
  const Isa* isa = find_isa(layer->layout, layer->isa);
  if (!isa) return kBadIsa;
  if (m == 0) return kOk;
  if (m * n * k < int64_t(1) << 20) threads = 1;  // a few microseconds of work: waking a thread takes as long
  const Call call{*layer, *isa,
                  static_cast<const char*>(x), x_type, x_stride * element_size(x_type), s,
                  static_cast<char*>(y), y_type, n * element_size(y_type)};
  return m == 1 ? decode(call, threads) : prefill(call, m, threads);
}

BITNET_EXPORT int32_t bitnet_prepack(const void* source, int32_t from_codes, int64_t n, int64_t k, uint8_t* weight,
                                     int32_t layout, int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(layout)) return kBadShape;
  const int64_t hub_rows = ceil_div(n, 4), blocks = ceil_div(n, kBlockRows);
  const int64_t group = group_features(layout), groups = ceil_div(k, group);
  from_codes |= layout == kEightBits;
  parallel(threads, [&](int thread, int count) {
    for (int64_t b = share(blocks, thread, count); b < share(blocks, thread + 1, count); ++b)
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const int64_t row = b * kBlockRows + r, filled = row < n ? k : 0;
        const auto* from = static_cast<const uint8_t*>(source);
        if (row < n) from += (from_codes ? row : row % hub_rows) * k;
        const int shift = row < n ? int(row / hub_rows * 2) : 0;
        uint8_t* to = weight + b * groups * kGroupBytes + 4 * r;
        const auto of_codes = [](uint32_t t) { return (t & 0x03030303) + 0x01010101; };  // -1 is 3 in two bits
        const auto of_hub_bytes = [=](uint32_t t) { return t >> shift; };
        for (int64_t g = 0; g < groups; ++g, to += kGroupBytes) {
          const int64_t here = filled - g * group;
          const uint32_t lane = from_codes ? pack_lane(from + g * group, here, layout, 0, of_codes)
                                           : pack_lane(from + g * group, here, layout, 0x55, of_hub_bytes);
          memcpy(to, &lane, 4);
        }
      }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t layout,
                                       int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(layout)) return kBadShape;
  static constexpr int kPower[] = {1, 3, 9, 27, 84};
  const int64_t group = group_features(layout), groups = ceil_div(k, group);
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row) {
      const uint8_t* from = weight + row / kBlockRows * groups * kGroupBytes + row % kBlockRows * 4;
      int8_t* to = codes + row * k;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t field = i % group / 4;
        const int byte = from[i / group * kGroupBytes + i % 4];
        if (layout == kEightBits) {
          to[i] = int8_t(byte - 128);
          continue;
        }
        const int code = layout == kTwoBits ? byte >> 2 * field & 3 : (field < 4 ? byte % 84 : byte) / kPower[field] % 3;
        to[i] = int8_t(code - 1);
      }
    }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_quantize(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k, int8_t* q,
                                      float* s, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(x_type)) return kBadType;
  if (m < 0 || k < 1) return kBadShape;
  if (m * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(m, thread, count); row < share(m, thread + 1, count); ++row)
      s[row] = target->quantize(static_cast<const char*>(x) + row * x_stride * element_size(x_type), x_type, k, q + row * k).s;
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_ternary_codes(const void* w, int32_t type, int64_t n, int64_t k, const float* inv,
                                           int32_t per_row, int8_t* codes, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(type)) return kBadType;
  if (n < 0 || k < 0) return kBadShape;
  if (n * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row) {
      const char* from = static_cast<const char*>(w) + row * k * element_size(type);
      target->ternary_codes(from, type, k, inv[per_row ? row : 0], codes + row * k);
    }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_pack_ternary(const void* w, int32_t type, int64_t n, int64_t k, const float* inv,
                                          int32_t per_row, uint8_t* hub, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(type)) return kBadType;
  if (n < 0 || k < 0) return kBadShape;
  const int64_t hub_rows = ceil_div(n, 4), bytes = k * element_size(type);
  if (n * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t r = share(hub_rows, thread, count); r < share(hub_rows, thread + 1, count); ++r) {
      const void* rows[4];
      float scale[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t row = r + j * hub_rows;
        rows[j] = row < n ? static_cast<const char*>(w) + row * bytes : nullptr;
        scale[j] = row < n ? inv[per_row ? row : 0] : 0;
      }
      target->pack_ternary(rows, type, k, scale, hub + r * k);
    }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_magnitudes(const void* w, int32_t type, int64_t n, int64_t k, double* sums,
                                        int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(type)) return kBadType;
  if (n < 0 || k < 0) return kBadShape;
  if (n * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row)
      sums[row] = target->magnitude(static_cast<const char*>(w) + row * k * element_size(type), type, k);
  });
  return kOk;
}

BITNET_EXPORT int64_t bitnet_read(const void* data, int64_t bytes, int32_t threads) {
  constexpr int64_t kStep = 32;  // words: 256 bytes
  const auto* words = static_cast<const int64_t*>(data);
  const int64_t steps = bytes / 8 / kStep;
  int64_t result = 0;
  parallel(threads, [&](int thread, int count) {
    int64_t sum[kStep] = {};
    for (int64_t i = share(steps, thread, count); i < share(steps, thread + 1, count); ++i) {
      for (int64_t j = 0; j < kStep; j += 8) __builtin_prefetch(words + i * kStep + j + 512);
      for (int64_t j = 0; j < kStep; ++j) sum[j] ^= words[i * kStep + j];
    }
    for (int64_t j = 1; j < kStep; ++j) sum[0] ^= sum[j];
    __atomic_xor_fetch(&result, sum[0], __ATOMIC_RELAXED);
  });
  return result;
}
