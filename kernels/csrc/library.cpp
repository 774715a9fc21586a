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

int64_t element_size(int32_t type) {
  return type == kInt8 ? 1 : type == kFloat32 || type == kInt32 ? 4 : 2;
}
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
  int32_t activation_bits;
  int limbs = activation_bits == 16 ? 2 : 1;
  Groups groups{layer, step_features(layer.layout)};
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
uint32_t pack_lane(const uint8_t* from, int64_t here, int32_t layout, int padding, const Field& field, Status* status) {
  uint32_t t[5];
  if (layout == kOneBit) {
    uint32_t bits[8], lane = 0, zeros = 0;
    copy_padded<32>(bits, from, here, padding);
    for (int j = 0; j < 8; ++j) {
      lane |= (field(bits[j]) >> 1 & 0x01010101) << j;
      zeros |= field(bits[j]);
    }
    if (zeros & 0x01010101) *status = kBadCode;
    return lane;
  }
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

BITNET_EXPORT int32_t bitnet_abi() { return 9; }

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
                                    const float* s, int64_t m, void* y, int32_t y_type, int32_t activation_bits,
                                    int32_t threads) {
  const int64_t n = layer->n, k = layer->k, size = layer->group_size;
  const bool codes = x_type == kInt8 || x_type == kInt16;
  if (codes) activation_bits = x_type == kInt16 ? 16 : 8;
  if (n < 1 || k < 1 || k > max_features(layer->layout, activation_bits, size) || m < 0) return kBadShape;
  if (size && (size < 32 || size % 32 || kSpan % size)) return kBadShape;
  if (activation_bits != 8 && activation_bits != 16) return kBadType;
  if (layer->layout == kEightBits && (size || activation_bits == 16)) return kBadType;
  if (codes ? !(is_float(y_type) || (y_type == kInt32 && !size)) : !is_float(x_type) || y_type != x_type) return kBadType;
  if (codes && is_float(y_type) && !s && m) return kBadType;
  if (layer->bias && !is_float(layer->bias_type)) return kBadType;
  const Isa* isa = find_isa(layer->layout, layer->isa);
  if (!isa) return kBadIsa;
  if (m == 0) return kOk;
  if (m * n * k < int64_t(1) << 20) threads = 1;  // a few microseconds of work: waking a thread takes as long
  const Call call{*layer, *isa,
                  static_cast<const char*>(x), x_type, x_stride * element_size(x_type), s,
                  static_cast<char*>(y), y_type, n * element_size(y_type), activation_bits};
  return m == 1 ? decode(call, threads) : prefill(call, m, threads);
}

BITNET_EXPORT int32_t bitnet_prepack(const void* source, int32_t from_codes, int64_t n, int64_t k, uint8_t* weight,
                                     int32_t layout, int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(layout, 8, false)) return kBadShape;
  const int64_t hub_rows = ceil_div(n, 4), blocks = ceil_div(n, kBlockRows);
  const int64_t step = step_features(layout), steps = ceil_div(k, step);
  from_codes |= layout == kEightBits;
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    Status mine = kOk;
    for (int64_t b = share(blocks, thread, count); b < share(blocks, thread + 1, count); ++b)
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const int64_t row = b * kBlockRows + r, filled = row < n ? k : 0;
        const auto* from = static_cast<const uint8_t*>(source);
        if (row < n) from += (from_codes ? row : row % hub_rows) * k;
        const int shift = row < n ? int(row / hub_rows * 2) : 0;
        uint8_t* to = weight + b * steps * kStepBytes + 4 * r;
        const auto of_codes = [](uint32_t t) { return (t & 0x03030303) + 0x01010101; };  // -1 is 3 in two bits
        const auto of_hub_bytes = [=](uint32_t t) { return t >> shift; };
        const bool binary = layout == kOneBit;  // which pads with -1
        for (int64_t g = 0; g < steps; ++g, to += kStepBytes) {
          const int64_t here = filled - g * step;
          const uint32_t lane =
              from_codes ? pack_lane(from + g * step, here, layout, binary ? 0xff : 0, of_codes, &mine)
                         : pack_lane(from + g * step, here, layout, binary ? 0 : 0x55, of_hub_bytes, &mine);
          memcpy(to, &lane, 4);
        }
      }
    if (mine) __atomic_store_n(&status, mine, __ATOMIC_RELAXED);
  });
  return status;
}

BITNET_EXPORT int32_t bitnet_unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t layout,
                                       int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(layout, 8, false)) return kBadShape;
  static constexpr int kPower[] = {1, 3, 9, 27, 84};
  const int64_t step = step_features(layout), steps = ceil_div(k, step);
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row) {
      const uint8_t* from = weight + row / kBlockRows * steps * kStepBytes + row % kBlockRows * 4;
      int8_t* to = codes + row * k;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t field = i % step / 4;
        const int byte = from[i / step * kStepBytes + i % 4];
        switch (layout) {
          case kEightBits: to[i] = int8_t(byte - 128); break;
          case kOneBit: to[i] = int8_t((byte >> field & 1) * 2 - 1); break;
          case kTwoBits: to[i] = int8_t((byte >> 2 * field & 3) - 1); break;
          default: to[i] = int8_t((field < 4 ? byte % 84 : byte) / kPower[field] % 3 - 1);
        }
      }
    }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_quantize(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k, void* q,
                                      float* s, int32_t activation_bits, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(x_type) || (activation_bits != 8 && activation_bits != 16)) return kBadType;
  if (m < 0 || k < 1) return kBadShape;
  if (m * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(m, thread, count); row < share(m, thread + 1, count); ++row) {
      const char* from = static_cast<const char*>(x) + row * x_stride * element_size(x_type);
      s[row] = target->quantize(from, x_type, activation_bits, k, static_cast<char*>(q) + row * k * activation_bits / 8);
    }
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
