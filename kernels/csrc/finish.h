// From accumulators to outputs: scales, bias and rounding. reference.rescale and reference.group_linear.
#pragma once
#include "numbers.h"

namespace {

// Accumulators to products of codes: limbs joined, and off = kZero * (sum of the activation's codes) taken off. Values
// may wrap around on the way, but not in the end.

template <class I, int kLimbs>
INLINE typename I::Int join(const typename I::Int (&limbs)[kLimbs], typename I::Int off) {
  typename I::Int dot = limbs[0];
  if constexpr (kLimbs == 2) dot = I::add32(I::times256(dot), limbs[1]);
  if constexpr (I::kFactor == 2) dot = I::add32(dot, dot);
  return I::sub32(dot, off);
}

// The same for kLimbs rows of accumulators in memory; the first becomes the products.
template <class I, int kLimbs, int kRows>
INLINE void join_rows(int32_t* acc, int32_t sum) {
  const auto off = I::splat32(I::kZero * sum);
  for (int i = 0; i < kRows; i += I::kBytes / 4) {
    typename I::Int limbs[kLimbs];
    for (int l = 0; l < kLimbs; ++l) limbs[l] = I::load32(acc + l * kRows + i);
    I::store32(acc + i, join<I, kLimbs>(limbs, off));
  }
}

template <int kRows>
struct Sums {
  alignas(64) float part[kRows], total[kRows];  // of the groups of a span; of spans
};

INLINE void end_span(float* part, float* total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    total[i] += part[i];
    part[i] = 0;
  }
}

template <class F>
void add_bias(const void* bias, int64_t n0, int64_t rows, float* y) {
  const auto* b = static_cast<const typename F::Bits*>(bias) + n0;
  for (int64_t i = 0; i < rows; ++i) y[i] += F::value(b[i]);
}

template <class F>
INLINE void round_to(const float* y, int64_t rows, void* out, int64_t at) {
  auto* o = static_cast<typename F::Bits*>(out) + at;
  for (int64_t i = 0; i < rows; ++i) o[i] = F::round(y[i]);
}

// y + bias, rounded, from row n0 of the output on.
INLINE void round_rows(const PreparedWeight& layer, float* y, int64_t n0, int64_t rows, void* out, int64_t at, int32_t y_type) {
  if (layer.bias) switch (layer.bias_type) {
      case kFloat32: add_bias<F32>(layer.bias, n0, rows, y); break;
      case kBFloat16: add_bias<BF16>(layer.bias, n0, rows, y); break;
      case kFloat16: add_bias<F16>(layer.bias, n0, rows, y); break;
    }
  switch (y_type) {
    case kFloat32: return round_to<F32>(y, rows, out, at);
    case kBFloat16: return round_to<BF16>(y, rows, out, at);
    case kFloat16: return round_to<F16>(y, rows, out, at);
  }
}

// For a scale of the tensor or the row.
template <int kRows>
void finish(const PreparedWeight& layer, const int32_t* product, float s, int64_t n0, void* out, int64_t at, int32_t y_type) {
  const int64_t rows = smaller(kRows, layer.n - n0);
  if (y_type == kInt32) {
    memcpy(static_cast<int32_t*>(out) + at, product, rows * sizeof(*product));
    return;
  }
  float y[kRows];
  if (layer.per_row) {
    const float* scale = static_cast<const float*>(layer.scale) + n0;
    for (int64_t i = 0; i < rows; ++i) y[i] = float(product[i]) * (scale[i] / s);
  } else {
    const float factor = *static_cast<const float*>(layer.scale) / s;
    for (int64_t i = 0; i < rows; ++i) y[i] = float(product[i]) * factor;
  }
  round_rows(layer, y, n0, rows, out, at, y_type);
}

// For scales of groups.
template <int kRows>
void finish_groups(const PreparedWeight& layer, float* total, float s, int64_t n0, void* out, int64_t at, int32_t y_type) {
  const float inverse = 1 / s;
  for (int i = 0; i < kRows; ++i) total[i] *= inverse;
  round_rows(layer, total, n0, smaller(kRows, layer.n - n0), out, at, y_type);
}

}  // namespace
