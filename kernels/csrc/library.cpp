// The C ABI: argument checks and the choice of an instruction set.
#include "forms.h"
#include "hub.h"
#include "multiply.h"
#include "step.h"

namespace {

const Isa* const compiled[] = {
#define BITNET_ISA(name) &name,
#include "isa_list.inc"
};

// The i-th instruction set of a form that this CPU can run, best first; null past the last.
const Isa* find_isa(int32_t form, int32_t i) {
  if (i < 0) return nullptr;
  for (const Isa* isa : compiled)
    if (isa->form == form && isa->supported() && i-- == 0) return isa;
  return nullptr;
}

}  // namespace

BITNET_EXPORT int32_t bitnet_abi() { return 25; }

BITNET_EXPORT int32_t bitnet_threads(int32_t wanted) {
#ifdef _OPENMP
  return forked ? 1 : wanted;
#else
  return 1;
#endif
}

BITNET_EXPORT const char* bitnet_isa(int32_t form, int32_t i) {
  const Isa* isa = find_isa(form, i);
  return isa ? isa->name : nullptr;
}

BITNET_EXPORT int32_t bitnet_linear(const PreparedWeight* layer, const void* x, int32_t x_type, int64_t x_stride,
                                    const float* s, int64_t m, void* y, int32_t y_type, int32_t threads) {
  const int64_t n = layer->n, k = layer->k, size = layer->group_size;
  const bool codes = x_type == kInt8 || x_type == kInt16, y_float = is_float(y_type);
  const int32_t bits = layer->activation_bits;
  const bool wide = x_type == kInt16 || (x_type != kInt8 && bits == 16);
  if (n < 1 || k < 1 || k > max_features(layer->form, wide, size) || m < 0) return kBadShape;
  if (size && (size < 32 || size % 32 || kMaxGroup % size)) return kBadShape;
  if (bits != 16 && bits != 8 && bits != 4) return kBadType;
  if (layer->form == kEightBits && (size || wide)) return kBadType;
  if (layer->form == kFourBits && (size != 32 || wide)) return kBadType;
  if (codes ? !y_float && (y_type != kInt32 || size) : !is_float(x_type) || y_type != x_type) return kBadType;
  if (codes && y_float && !s && m) return kBadType;
  if (layer->bias && !is_float(layer->bias_type)) return kBadType;
  const Isa* isa = find_isa(layer->form, layer->isa);
  if (!isa) return kBadIsa;
  if (m == 0) return kOk;
  if (m * n * k < int64_t(1) << 20) threads = 1;  // a few microseconds of work: waking a thread takes as long
  const Call call{*layer, *isa,
                  static_cast<const char*>(x), x_type, x_stride * element_size(x_type), s,
                  static_cast<char*>(y), y_type, n * element_size(y_type)};
  return m == 1 ? decode(call, threads) : prefill(call, m, threads);
}

BITNET_EXPORT int32_t bitnet_step(const Plan* plan, float* x, const float* per_layer, int64_t m, const Sequence* sequences,
                                  const int64_t* sequence, const int64_t* position, int32_t threads) {
  const Isa* isa = find_isa(kTwoBits, plan->isa);
  if (!isa) return kBadIsa;
  if (m < 0 || m > kSlab) return kBadShape;
  if (plan->cache_type != kFloat32 && plan->cache_type != kFloat16 && plan->cache_type != kInt8) return kBadType;
  if (plan->gate < kSilu || plan->gate > kClampedSwiglu) return kBadShape;
  for (int64_t b = 0; b < plan->count; ++b) {
    const Block& block = plan->blocks[b];
    const HeadShape& h = block.heads;
    if (plan->gate == kClampedSwiglu && block.inner) return kBadShape;
    if (block.per_layer && !(per_layer && plan->per_layer)) return kBadShape;
    if (block.recurrence || !block.out.count) continue;
    if (h.key_dim < kRun || h.key_dim % kRun || h.value_dim < kRun || h.value_dim % kRun || h.kv_heads < 1 || h.heads % h.kv_heads)
      return kBadShape;
    if ((plan->by_head || block.latent) && h.heads != h.kv_heads) return kBadShape;
    if (plan->by_head && plan->query_gate) return kBadShape;
    if (block.rope >= 0 && (2 * plan->ropes[block.rope].half > h.key_dim || plan->ropes[block.rope].half > 256)) return kBadShape;
    if (block.latent && block.rope < 0) return kBadShape;
  }
  for (int64_t t = 0; t < m; ++t)
    if (position[t] < 0 || position[t] >= sequences[sequence[t]].capacity || position[t] >= plan->positions)
      return kBadShape;
  if (m == 0) return kOk;
  return Step{*plan, *isa, find_isa, x, per_layer, m, sequences, sequence, position}.run_all(threads);
}

BITNET_EXPORT int32_t bitnet_attention(const Attention* attention, int32_t threads) {
  const Attention& a = *attention;
  const Isa* isa = find_isa(kTwoBits, a.isa);
  if (!isa) return kBadIsa;
  if (!is_float(a.type)) return kBadType;
  if (a.kv_heads < 1 || a.heads % a.kv_heads || a.positions < 1 || a.batch < 0 || a.queries < 0) return kBadShape;
  if (a.dim < kRun || a.dim % kRun || a.value_dim < kRun || a.value_dim % kRun) return kBadShape;
  const int64_t queries = a.heads / a.kv_heads * a.queries, tiles = ceil_div(queries, kTileQueries);
  if (a.batch * a.heads * a.queries * a.positions * a.dim < int64_t(1) << 20) threads = 1;
  Status status = kOk;
  parallel(threads, [&](int thread, int count) {
    auto* scratch = static_cast<float*>(attention_scratch.reserve(attention_bytes(a)));
    if (!scratch) return __atomic_store_n(&status, kNoMemory, __ATOMIC_RELAXED);
    const int64_t all = a.batch * a.kv_heads * tiles;
    for (int64_t i = share(all, thread, count); i < share(all, thread + 1, count); ++i) {
      const int64_t first = i % tiles * kTileQueries, head = i / tiles;
      const int here = int(smaller(kTileQueries, queries - first));
      isa->between->attend_rows(a, head / a.kv_heads, head % a.kv_heads, first, here, scratch);
    }
  });
  return status;
}

BITNET_EXPORT int32_t bitnet_norm(const Norm* norm, const void* x, int32_t type, int64_t m, int64_t k, void* y, int32_t isa) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(type)) return kBadType;
  if (m < 0 || k < 1) return kBadShape;
  auto* scratch = static_cast<float*>(row_scratch.reserve(4 * k));
  if (!scratch) return kNoMemory;
  const int64_t bytes = k * element_size(type);
  for (int64_t row = 0; row < m; ++row)
    target->between->normalize_row(*norm, static_cast<const char*>(x) + row * bytes, type, k, static_cast<char*>(y) + row * bytes, scratch);
  return kOk;
}

BITNET_EXPORT int32_t bitnet_prepack(const void* source, int32_t from_codes, int64_t n, int64_t k, uint8_t* weight,
                                     int32_t form, int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(form, false, false)) return kBadShape;
  const bool worked = !from_codes && form == kTwoBits
                          ? prepack_hub(static_cast<const uint8_t*>(source), n, k, weight, threads)
                          : prepack(source, from_codes, n, k, weight, form, threads);
  return worked ? kOk : kBadCode;
}

BITNET_EXPORT int32_t bitnet_unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t form,
                                       int32_t threads) {
  if (n < 1 || k < 1 || k > max_features(form, false, false)) return kBadShape;
  unprepack(weight, n, k, codes, form, threads);
  return kOk;
}

BITNET_EXPORT int32_t bitnet_quantize(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k,
                                      int32_t activation_bits, void* q, float* s, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(x_type)) return kBadType;
  if (activation_bits != 16 && activation_bits != 8 && activation_bits != 4) return kBadType;
  if (m < 0 || k < 1) return kBadShape;
  if (m * k < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(m, thread, count); row < share(m, thread + 1, count); ++row) {
      const char* from = static_cast<const char*>(x) + row * x_stride * element_size(x_type);
      char* to = static_cast<char*>(q) + row * k * (activation_bits == 16 ? 2 : 1);
      s[row] = target->quantize(from, x_type, activation_bits, k, to);
    }
  });
  return kOk;
}

BITNET_EXPORT int32_t bitnet_hadamard(const void* x, int32_t x_type, int64_t x_stride, int64_t m, int64_t k, int64_t block,
                                      const int8_t* signs, float factor, void* y, int32_t isa, int32_t threads) {
  const Isa* target = find_isa(kTwoBits, isa);
  if (!target) return kBadIsa;
  if (!is_float(x_type)) return kBadType;
  if (m < 0 || k < 1 || block < 1 || block > kMaxHadamard || block & (block - 1) || k % block) return kBadShape;
  const int64_t size = element_size(x_type);
  if (m * k < int64_t(1) << 17) threads = 1;
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(m, thread, count); row < share(m, thread + 1, count); ++row)
      target->hadamard(static_cast<const char*>(x) + row * x_stride * size, x_type, k, block, signs, factor,
                       static_cast<char*>(y) + row * k * size);
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

BITNET_EXPORT int32_t bitnet_choose(const Columns* columns, int32_t threads) {
  const Columns& c = *columns;
  const Isa* target = find_isa(kTwoBits, c.isa);
  if (!target) return kBadIsa;
  if (c.n < 0 || c.count < 0) return kBadShape;
  if (c.n * c.count * c.count < int64_t(1) << 18) threads = 1;
  parallel(threads, [&](int thread, int count) { target->choose(c, share(c.n, thread, count), share(c.n, thread + 1, count)); });
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
