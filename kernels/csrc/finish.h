// From accumulators to outputs: scales, bias and rounding. reference.rescale and reference.group_linear.
#pragma once
#include "numbers.h"

namespace {

// Accumulators to products of codes: limbs joined (the low one's lie `low` further), and what was added to every
// weight's code taken off. Unsigned, because on the way, not in the end, values may wrap around.
template <class I, int kLimbs, int kRows>
INLINE void join(int32_t* acc, int64_t low, int32_t sum) {
  const uint32_t off = uint32_t(I::kZero) * uint32_t(sum);
  for (int i = 0; i < kRows; ++i) {
    uint32_t dot = uint32_t(acc[i]);
    if (kLimbs == 2) dot = 256 * dot + uint32_t(acc[low + i]);
    acc[i] = int32_t(I::kFactor * dot - off);
  }
}

// One group: part += product * scale, two roundings. After the last group of a span part goes to total.
template <int kRows>
INLINE void add_group(const int32_t* product, const float* scale, bool span_ends, float* part, float* total) {
  for (int i = 0; i < kRows; ++i) part[i] += float(product[i]) * scale[i];
  if (!span_ends) return;
  for (int i = 0; i < kRows; ++i) total[i] += part[i];
  memset(part, 0, kRows * sizeof(*part));
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
INLINE void round_rows(const Layer& layer, float* y, int64_t n0, int64_t rows, void* out, int64_t at, int32_t y_type) {
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
void finish(const Layer& layer, const int32_t* product, float s, int64_t n0, void* out, int64_t at, int32_t y_type) {
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
void finish_groups(const Layer& layer, float* total, float s, int64_t n0, void* out, int64_t at, int32_t y_type) {
  const float inverse = 1 / s;
  for (int i = 0; i < kRows; ++i) total[i] *= inverse;
  round_rows(layer, total, n0, smaller(kRows, layer.n - n0), out, at, y_type);
}

}  // namespace
