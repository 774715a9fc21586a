// Quantizers of activations and of latent weights, and the sums that go with them.
#pragma once
#include "numbers.h"

namespace {

// The sum of |w| over one row, in float64 and in an order that is the same on every CPU. Inf or NaN if the row holds any.

template <class F>
double magnitude_of(const void* w_, int64_t k) {
  constexpr int kLanes = 16;
  const auto* w = static_cast<const typename F::Bits*>(w_);
  double sum[kLanes] = {};
  typename F::Bits top = 0;
  const auto add = [&](const typename F::Bits* from) __attribute__((always_inline)) {
    for (int i = 0; i < kLanes; ++i) {
      const typename F::Bits a = from[i] & F::kAbs;
      top = a > top ? a : top;
      sum[i] += double(F::value(a));
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) add(w + at);
  typename F::Bits rest[kLanes] = {};
  memcpy(rest, w + at, (k - at) * sizeof(*w));
  add(rest);
  if (top >= F::kInf) return top == F::kInf ? double(__builtin_inff()) : double(__builtin_nanf(""));
  for (int i = 1; i < kLanes; ++i) sum[0] += sum[i];
  return sum[0];
}

double magnitude(const void* w, int32_t type, int64_t k) {
  switch (type) {
    case kFloat32: return magnitude_of<F32>(w, k);
    case kBFloat16: return magnitude_of<BF16>(w, k);
    default: return magnitude_of<F16>(w, k);
  }
}

// reference.quantize_activation for 8 and 16 bits, operation by operation; returns s.

template <class F, class Code>
float quantize_float(const void* x_, int64_t k, Code* codes) {
  constexpr float kTop = sizeof(Code) == 1 ? 127 : kMax16;
  const auto* x = static_cast<const typename F::Bits*>(x_);
  typename F::Bits top = 0;
  for (int64_t i = 0; i < k; ++i) {
    const typename F::Bits a = x[i] & F::kAbs;
    top = a > top ? a : top;
  }
  if (top >= F::kInf) {  // codes 0; s = kTop / Inf or NaN makes every output NaN
    memset(codes, 0, k * sizeof(Code));
    return top == F::kInf ? 0.0f : __builtin_nanf("");
  }
  const float amax = F::value(top);
  const float s = kTop * (1.0f / (amax < 1e-5f ? 1e-5f : amax));
  // |x s| < kTop + 0.5, and 1.5 * 2^23 has a spacing of 1: the addition rounds half to even, the low bits are the code
  for (int64_t i = 0; i < k; ++i) codes[i] = Code(bits<uint32_t>(F::value(x[i]) * s + 0x1.8p23f));
  return s;
}

// The same for 4 bits.
template <class F>
float quantize_4_bits(const void* x_, int64_t k, int8_t* codes) {
  const auto* x = static_cast<const typename F::Bits*>(x_);
  const float mean = float(magnitude_of<F>(x, k) / double(k));
  if (!(mean <= __FLT_MAX__)) {
    memset(codes, 0, k);
    return mean > 0 ? 0.0f : __builtin_nanf("");
  }
  const float s = 0x1.52a7fap+1f * (1.0f / (mean < 1e-5f ? 1e-5f : mean));  // sqrt(7)
  for (int64_t i = 0; i < k; ++i) {
    float v = F::value(x[i]) * s;  // clamped before it is rounded, as ternary codes are
    v = v < -8 ? -8 : v;
    v = v > 7 ? 7 : v;
    codes[i] = int8_t(bits<uint32_t>(v + 0x1.8p23f));
  }
  return s;
}

template <class F>
float quantize_to(int32_t activation_bits, const void* x, int64_t k, void* codes) {
  if (activation_bits == 16) return quantize_float<F>(x, k, static_cast<int16_t*>(codes));
  if (activation_bits == 4) return quantize_4_bits<F>(x, k, static_cast<int8_t*>(codes));
  return quantize_float<F>(x, k, static_cast<int8_t*>(codes));
}

float quantize(const void* x, int32_t x_type, int32_t activation_bits, int64_t k, void* codes) {
  switch (x_type) {
    case kFloat32: return quantize_to<F32>(activation_bits, x, k, codes);
    case kBFloat16: return quantize_to<BF16>(activation_bits, x, k, codes);
    case kFloat16: return quantize_to<F16>(activation_bits, x, k, codes);
  }
  memcpy(codes, x, x_type == kInt16 ? 2 * k : k);
  return 1;
}

template <class Code>
void sum_codes(const Code* codes, int64_t k, int64_t size, int32_t* sums) {
  for (int64_t at = 0; at < k; at += size) {
    const int64_t here = smaller(size, k - at);
    int32_t sum = 0;
    for (int64_t i = 0; i < here; ++i) sum += codes[at + i];
    *sums++ = sum;
  }
}

// Sums over groups of `size` codes.
void sum_groups(const void* codes, int32_t activation_bits, int64_t k, int64_t size, int32_t* sums) {
  if (activation_bits == 16) sum_codes(static_cast<const int16_t*>(codes), k, size, sums);
  else sum_codes(static_cast<const int8_t*>(codes), k, size, sums);
}

// 16-bit codes as two limbs: reference.limbs.
void split(const int16_t* codes, int64_t k, int8_t* high, int8_t* low) {
  for (int64_t i = 0; i < k; ++i) {
    low[i] = int8_t(codes[i]);
    high[i] = int8_t((codes[i] + 128) >> 8);
  }
}

// Codes of one row of a latent weight: the ternary ones of reference.quantize_weight. Clamping before rounding changes
// none, as the bounds are integers, and keeps what is added small.

template <class F>
void ternary_codes_of(const void* w_, int64_t k, float inv, int8_t* codes) {
  const auto* w = static_cast<const typename F::Bits*>(w_);
  for (int64_t i = 0; i < k; ++i) {
    float v = F::value(w[i]) * inv;
    v = v < -1 ? -1 : v;
    v = v > 1 ? 1 : v;
    codes[i] = int8_t(bits<uint32_t>(v + 0x1.8p23f));
  }
}

void ternary_codes(const void* w, int32_t type, int64_t k, float inv, int8_t* codes) {
  switch (type) {
    case kFloat32: return ternary_codes_of<F32>(w, k, inv, codes);
    case kBFloat16: return ternary_codes_of<BF16>(w, k, inv, codes);
    case kFloat16: return ternary_codes_of<F16>(w, k, inv, codes);
  }
}

// Hub bytes of up to four rows (null: a row of zeros), whose codes are bits 2j..2j+1 of each byte.
void pack_ternary(const void* const* rows, int32_t type, int64_t k, const float* inv, uint8_t* packed) {
  constexpr int64_t kStep = 512;  // features whose codes stay in the first cache
  const int64_t size = type == kFloat32 ? 4 : 2;
  for (int64_t at = 0; at < k; at += kStep) {
    int8_t codes[4][kStep] = {};
    const int64_t here = smaller(kStep, k - at);
    for (int j = 0; j < 4; ++j)
      if (rows[j]) ternary_codes(static_cast<const char*>(rows[j]) + at * size, type, here, inv[j], codes[j]);
    for (int64_t i = 0; i < here; ++i)
      packed[at + i] = uint8_t(0x55 + codes[0][i] + codes[1][i] * 4 + codes[2][i] * 16 + codes[3][i] * 64);
  }
}

}  // namespace
