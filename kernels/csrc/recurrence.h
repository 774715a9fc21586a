// Linear attention by the gated delta rule (arXiv 2412.06464, equation 10), as Qwen3.5 has it, and short convolutions, as
// LFM2 has them. float32 all along; features lie side by side, so that every instruction set sums in the same order.
#pragma once
#include "attention.h"

namespace {

constexpr int kColumns = 2 * kRun;  // whose sums stay in registers

// A causal convolution of each channel by itself, and silu before heads, in place: rows x, `stride` apart, of so many tokens, whose
// channels [first, last) come after those in `window` [kernel - 1, channels], which then holds the last ones.
[[maybe_unused]] void convolve(const Recurrence& r, float* window, float* x, int64_t stride, int64_t tokens, int64_t first,
                               int64_t last) {
  const int64_t before = r.kernel - 1, channels = r.channels;
  for (int64_t t = 0; t < tokens; ++t, x += stride)
    for (int64_t c = first; c < last; c += kColumns) {
      const int64_t here = smaller(kColumns, last - c);
      float sum[kColumns] = {};
      for (int64_t i = 0; r.bias && i < here; ++i) sum[i] = r.bias[c + i];
      for (int64_t j = 0; j < before; ++j)
        for (int64_t i = 0; i < here; ++i) sum[i] += r.convolution[j * channels + c + i] * window[j * channels + c + i];
      for (int64_t i = 0; i < here; ++i) sum[i] += r.convolution[before * channels + c + i] * x[c + i];
      for (int64_t j = 0; j + 1 < before; ++j) memcpy(window + j * channels + c, window + (j + 1) * channels + c, 4 * here);
      if (before) memcpy(window + (before - 1) * channels + c, x + c, 4 * here);
      if (r.value_heads)
        for (int64_t i = 0; i < here; ++i) x[c + i] = silu(sum[i]);
      else memcpy(x + c, sum, 4 * here);
    }
}

// x = x / sqrt(sum(x^2) + 1e-6) * factor, of one head.
[[maybe_unused]] void to_length(float* x, int64_t k, float factor) {
  const float inverse = 1 / __builtin_sqrtf(float(power_sum<2>(x, 0, k)) + 1e-6f);
  for (int64_t i = 0; i < k; ++i) x[i] = x[i] * inverse * factor;
}

// One token of one head: state [keys, values] fades, gets what is new of v where k points, and is read at q into v.
[[maybe_unused]] void recur(float* state, const float* q, const float* k, float* v, float decay, float beta, int64_t keys,
                            int64_t values) {
  for (int64_t c = 0; c < values; c += kColumns) {
    float had[kColumns] = {}, sum[kColumns] = {};
    float* row = state + c;
    for (int64_t i = 0; i < keys; ++i, row += values)
      for (int l = 0; l < kColumns; ++l) {
        row[l] *= decay;
        had[l] += row[l] * k[i];
      }
    for (int l = 0; l < kColumns; ++l) had[l] = (v[c + l] - had[l]) * beta;
    row = state + c;
    for (int64_t i = 0; i < keys; ++i, row += values)
      for (int l = 0; l < kColumns; ++l) {
        row[l] += k[i] * had[l];
        sum[l] += row[l] * q[i];
      }
    for (int l = 0; l < kColumns; ++l) v[c + l] = sum[l];
  }
}

// One token of one head of a state space: state [keys, values] fades, gets x as b says for so long, and is read by c into x.
[[maybe_unused]] void scan(float* state, const float* c, const float* b, float* x, float decay, float step, float skip,
                           int64_t keys, int64_t values) {
  for (int64_t column = 0; column < values; column += kColumns) {
    float comes[kColumns], sum[kColumns] = {};
    float *row = state + column, *here = x + column;
    for (int l = 0; l < kColumns; ++l) comes[l] = here[l] * step;
    for (int64_t i = 0; i < keys; ++i, row += values)
      for (int l = 0; l < kColumns; ++l) {
        row[l] = row[l] * decay + b[i] * comes[l];
        sum[l] += row[l] * c[i];
      }
    for (int l = 0; l < kColumns; ++l) here[l] = sum[l] + here[l] * skip;
  }
}

// log(1 + e^x), of log(1 + u) = 2 atanh(u / (2 + u)).
INLINE float softplus(float x) {
  const float u = exponential(x < 0 ? x : -x), s = u / (2 + u), z = s * s;
  float p = 1 / 15.f;
  for (int n = 13; n > 0; n -= 2) p = p * z + 1 / float(n);
  return (x > 0 ? x : 0) + 2 * s * p;
}

}  // namespace
