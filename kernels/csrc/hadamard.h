// The Walsh-Hadamard transform of activations: reference.hadamard, operation by operation.
#pragma once
#include "numbers.h"

namespace {

// Butterflies (a + b, a - b) between neighbours at a distance.
template <int kDistance>
void near_butterflies(float* v, int64_t block) {  // distances within a vector: gcc makes shuffles of the constants
  for (int64_t at = 0; at < block; at += 2 * kDistance)
    UNROLL for (int i = 0; i < kDistance; ++i) {
      const float a = v[at + i], b = v[at + i + kDistance];
      v[at + i] = a + b;
      v[at + i + kDistance] = a - b;
    }
}

void butterflies(float* v, int64_t block, int64_t distance) {
  for (int64_t at = 0; at < block; at += 2 * distance) {
    float *__restrict low = v + at, *__restrict high = low + distance;
    for (int64_t i = 0; i < distance; ++i) {
      const float a = low[i], b = high[i];
      low[i] = a + b;
      high[i] = a - b;
    }
  }
}

template <class F>
void hadamard_of(const void* x_, int64_t k, int64_t block, const int8_t* signs, float factor, void* y_) {
  const auto* x = static_cast<const typename F::Bits*>(x_);
  auto* y = static_cast<typename F::Bits*>(y_);
  alignas(64) float v[kMaxHadamard];
  for (int64_t at = 0; at < k; at += block) {
    if (signs)
      for (int64_t i = 0; i < block; ++i) v[i] = F::any(x[at + i]) * float(signs[at + i]);
    else
      for (int64_t i = 0; i < block; ++i) v[i] = F::any(x[at + i]);
    if (block > 1) near_butterflies<1>(v, block);
    if (block > 2) near_butterflies<2>(v, block);
    if (block > 4) near_butterflies<4>(v, block);
    for (int64_t distance = 8; distance < block; distance *= 2) butterflies(v, block, distance);
    for (int64_t i = 0; i < block; ++i) y[at + i] = F::round(v[i] * factor);
  }
}

// One row of k features; factor: block ** -0.5, as float32.
void hadamard(const void* x, int32_t type, int64_t k, int64_t block, const int8_t* signs, float factor, void* y) {
  switch (type) {
    case kFloat32: return hadamard_of<F32>(x, k, block, signs, factor, y);
    case kBFloat16: return hadamard_of<BF16>(x, k, block, signs, factor, y);
    default: return hadamard_of<F16>(x, k, block, signs, factor, y);
  }
}

}  // namespace
