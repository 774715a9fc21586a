// Attention of a few tokens over keys and values as torch holds them, one position's features after the other: for models that
// csrc/step.h does not compute. float32 inside, in the same order on each instruction set.
#pragma once
#include "recurrence.h"

namespace {

template <class I>
struct Brains {
  using Element = uint16_t;
  static INLINE typename I::Float load(const uint16_t* p) { return I::load_brain(p); }
  static INLINE uint16_t store(float x, float) { return BF16::round(x); }
};

// The sum of 16 numbers.
INLINE float fold(float* lanes) {
  UNROLL for (int half = kRun / 2; half; half /= 2) for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The scores of T queries for `count` positions whose keys are `stride` elements apart: [T, width].
template <class I, class C, int T>
INLINE void score_rows(const typename C::Element* keys, int64_t stride, const float* q, int64_t dim, int64_t count,
                       float* scores, int64_t width) {
  constexpr int kWidth = I::kBytes / 4, kVecs = kRun / kWidth;
  for (int64_t at = 0; at < count; ++at, keys += stride) {
    typename I::Float sum[T][kVecs] = {};
    for (int64_t i = 0; i < dim; i += kRun)
      UNROLL for (int v = 0; v < kVecs; ++v) {
        const auto key = C::load(keys + i + v * kWidth);
        UNROLL for (int t = 0; t < T; ++t) sum[t][v] = sum[t][v] + key * I::load_float(q + t * dim + i + v * kWidth);
      }
    UNROLL for (int t = 0; t < T; ++t) {
      float lanes[kRun];
      UNROLL for (int v = 0; v < kVecs; ++v) I::store_float(lanes + v * kWidth, sum[t][v]);
      scores[t * width + at] = fold(lanes);
    }
  }
}

// Queries [first, first + T) of one key/value head, of which query i is token i / group in head i % group.
template <class I, class C, int T>
void attend_rows_to(const Attention& a, int64_t batch, int64_t kv_head, int64_t first, float* scratch) {
  using Element = typename C::Element;
  constexpr int kWidth = I::kBytes / 4;
  const int64_t group = a.heads / a.kv_heads, dim = a.dim, value_dim = a.value_dim, count = a.positions;
  const int64_t width = (count + kRun - 1) / kRun * kRun;
  float *q = scratch, *out = q + T * dim, *scores = out + T * value_dim;
  const auto* keys = static_cast<const Element*>(a.k) + batch * a.k_strides[0] + kv_head * a.k_strides[1];
  const auto* values = static_cast<const Element*>(a.v) + batch * a.v_strides[0] + kv_head * a.v_strides[1];
  int64_t token[T], head[T];
  Query queries[T];
  for (int t = 0; t < T; ++t) {
    token[t] = (first + t) / group, head[t] = kv_head * group + (first + t) % group;
    const auto* from = static_cast<const Element*>(a.q) + batch * a.q_strides[0] + head[t] * a.q_strides[1] + token[t] * a.q_strides[2];
    for (int64_t i = 0; i < dim; i += kWidth)
      I::store_float(q + t * dim + i, C::load(from + i) * I::splat_float(a.scaling));
    queries[t] = {q + t * dim, out + t * value_dim, 0, count, nullptr};
  }
  score_rows<I, C, T>(keys, a.k_strides[2], q, dim, count, scores, width);
  for (int t = 0; t < T; ++t) {
    float* row = scores + t * width;
    if (!a.mask) {
      softmax(row, count);
      continue;
    }
    const uint8_t* seen = a.mask + batch * a.mask_strides[0] + head[t] * a.mask_strides[1] + token[t] * a.mask_strides[2];
    int64_t hidden = 0;
    for (int64_t i = 0; i < count; ++i) hidden += !seen[i];
    if (hidden < count) {
      for (int64_t i = 0; i < count; ++i) row[i] = seen[i] ? row[i] : -__builtin_inff();
      softmax(row, count);
    }
    for (int64_t i = 0; i < count; ++i) row[i] = seen[i] ? row[i] : 0;  // which padding makes of all: 0, as in torch
  }
  weigh_all<I, C, T>(values, a.v_strides[2], 0, count, scores, width, queries, value_dim);
  for (int t = 0; t < T; ++t) {
    auto* to = static_cast<Element*>(a.out) + ((batch * a.queries + token[t]) * a.heads + head[t]) * value_dim;
    for (int64_t i = 0; i < value_dim; ++i) to[i] = C::store(out[t * value_dim + i], 1);
  }
}

template <class I, class C>
void attend_rows_with(const Attention& a, int64_t batch, int64_t kv_head, int64_t first, int count, float* scratch) {
  in_tiles(count, [&](auto tile, int at) INLINE_LAMBDA {
    attend_rows_to<I, C, decltype(tile)::kQueries>(a, batch, kv_head, first + at, scratch);
  });
}

template <class I>
void attend_rows(const Attention& a, int64_t batch, int64_t kv_head, int64_t first, int count, float* scratch) {
  switch (a.type) {
    case kFloat32: return attend_rows_with<I, Floats<I>>(a, batch, kv_head, first, count, scratch);
    case kBFloat16: return attend_rows_with<I, Brains<I>>(a, batch, kv_head, first, count, scratch);
    case kFloat16: return attend_rows_with<I, Halves<I>>(a, batch, kv_head, first, count, scratch);
  }
}

// A norm of one row of k features of any float type; scratch [k].
[[maybe_unused]] void normalize_row(const Norm& norm, const void* x, int32_t type, int64_t k, void* y, float* scratch) {
  const auto* half = static_cast<const uint16_t*>(x);
  auto* to = static_cast<uint16_t*>(y);
  switch (type) {
    case kFloat32: return normalize(static_cast<const float*>(x), norm, k, static_cast<float*>(y));
    case kBFloat16:
      for (int64_t i = 0; i < k; ++i) scratch[i] = BF16::value(half[i]);
      normalize(scratch, norm, k, scratch);
      for (int64_t i = 0; i < k; ++i) to[i] = BF16::round(scratch[i]);
      return;
    case kFloat16:
      for (int64_t i = 0; i < k; ++i) scratch[i] = F16::any(half[i]);
      normalize(scratch, norm, k, scratch);
      for (int64_t i = 0; i < k; ++i) to[i] = F16::round(scratch[i]);
      return;
  }
}

template <class I>
constexpr Between kBetween = {normalize, rotate, score_row, convolve, to_length, recur, scan, apply_gate, store<I>, attend<I>, attend_rows<I>, normalize_row};

template <class I>
constexpr const Between* between() {
  if constexpr (I::kForm == kTwoBits) return &kBetween<I>;
  return nullptr;
}

}  // namespace
