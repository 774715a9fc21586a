// What a decoder block does between its products: norms, rotary positions, attention over a cache, gates. float32 all
// along, every operation rounded by itself in the same order on each instruction set. What they compute is what transformers'
// models do, whose sums have another order.
#pragma once
#include "numbers.h"

namespace {

// e^x, with an error below 2 units in the last place; 0 below -87.
INLINE float exponential(float x) {
  x = x < -87 ? -87 : x;
  x = x > 88 ? 88 : x;
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f, n = shifted - 0x1.8p23f;  // 1 / ln 2; the low bits hold n
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;                   // ln 2 in two parts
  float p = 0x1.6850e4p-10f;
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = (p * r) * r + r + 1;
  return p * bits<float>((bits<uint32_t>(shifted) + 127) << 23);
}

INLINE float sigmoid(float x) { return 1 / (1 + exponential(-x)); }
INLINE float silu(float x) { return x / (1 + exponential(-x)); }

// The sum over k features of (x - mean)^Power.
template <int Power>
INLINE double power_sum(const float* x, float mean, int64_t k) {
  double sum[kRun] = {};
  const auto term = [&](int64_t i) { return Power == 1 ? double(x[i]) : double(x[i] - mean) * double(x[i] - mean); };
  int64_t i = 0;
  for (; i + kRun <= k; i += kRun)
    for (int l = 0; l < kRun; ++l) sum[l] += term(i + l);
  for (int l = 0; i < k; ++i, ++l) sum[l] += term(i);
  for (int l = 1; l < kRun; ++l) sum[0] += sum[l];
  return sum[0];
}

// y = norm(x) of k features; x may be y.
[[maybe_unused]] void normalize(const float* x, const Norm& norm, int64_t k, float* y) {
  const float mean = norm.centered ? float(power_sum<1>(x, 0, k) / double(k)) : 0;
  const float factor = 1 / __builtin_sqrtf(float(power_sum<2>(x, mean, k) / double(k)) + norm.eps);
  for (int64_t i = 0; i < k; ++i) y[i] = (x[i] - mean) * factor * norm.weight[i];
  if (norm.bias)
    for (int64_t i = 0; i < k; ++i) y[i] += norm.bias[i];
}

template <class F>
INLINE float dot(const typename F::Bits* row, const float* x, int64_t k) {
  float sum[kRun] = {};
  int64_t i = 0;
  for (; i + kRun <= k; i += kRun)
    for (int l = 0; l < kRun; ++l) sum[l] += F::value(row[i + l]) * x[i + l];
  for (int l = 0; i < k; ++i, ++l) sum[l] += F::value(row[i]) * x[i];
  for (int l = 1; l < kRun; ++l) sum[0] += sum[l];
  return sum[0];
}

// The dot product of a row of a router, of a float type, and x.
[[maybe_unused]] float score_row(const void* row, int32_t type, const float* x, int64_t k) {
  switch (type) {
    case kBFloat16: return dot<BF16>(static_cast<const uint16_t*>(row), x, k);
    case kFloat16: return dot<F16>(static_cast<const uint16_t*>(row), x, k);
    default: return dot<F32>(static_cast<const uint32_t*>(row), x, k);
  }
}

// Rotary positions of one head in place; see Pairs.
[[maybe_unused]] void rotate(const float* cosine, const float* sine, int64_t half, int32_t pairs, float* head) {
  float second[256];
  if (pairs == kNeighboursToHalves) {
    for (int64_t i = 0; i < half; ++i) second[i] = head[2 * i + 1];
    for (int64_t i = 0; i < half; ++i) head[i] = head[2 * i];
    memcpy(head + half, second, 4 * half);
  }
  if (pairs == kNeighbours) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * cosine[i] - b * sine[i];
      head[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

template <class F>
INLINE void apply(const F& f, float* gate, const float* up, int64_t k) {
  if (up)
    for (int64_t i = 0; i < k; ++i) gate[i] = f(gate[i]) * up[i];
  else
    for (int64_t i = 0; i < k; ++i) gate[i] = f(gate[i]);
}

// The standard normal distribution function, with an error below 4e-7: of u = |x| / sqrt(2), erfc(u) = t exp(P(t) - u^2)
// where t = 1 / (1 + u / 2) (the form of Numerical Recipes, section 6.2), P fitted for u up to 9.4.
INLINE float normal(float x) {
  const float u = (x < 0 ? -x : x) * 0x1.6a09e6p-1f, t = 1 / (1 + 0.5f * u);
  float p = 0x1.637b9cp-4f;
  p = p * t - 0x1.30a064p-1f;
  p = p * t + 0x1.8eb196p+0f;
  p = p * t - 0x1.e033e2p+0f;
  p = p * t + 0x1.d565ecp-1f;
  p = p * t - 0x1.0d7606p-2f;
  p = p * t + 0x1.c8b6fap-2f;
  p = p * t + 0x1.fbefbp-1f;
  p = p * t - 0x1.43e048p+0f;
  const float half = 0.5f * t * exponential(p - u * u);
  return x < 0 ? half : 1 - half;
}

// gate = f(gate) * up, or without up f(gate). bend: see Block.
[[maybe_unused]] void apply_gate(int32_t kind, const float* bend, float* gate, const float* up, int64_t k) {
  switch (kind) {
    case kSilu: return apply([](float x) INLINE_LAMBDA { return silu(x); }, gate, up, k);
    case kSquaredRelu:
      return apply([](float x) INLINE_LAMBDA {
        const float v = x > 0 ? x : 0;
        return v * v;
      }, gate, up, k);
    case kGeluTanh:  // 0.5 x (1 + tanh(z)) = x / (1 + e^-2z)
      return apply([](float x) INLINE_LAMBDA {
        const float z = 0x1.988454p-1f * (x + 0x1.6e4e26p-5f * (x * x * x));
        return x / (1 + exponential(-2 * z));
      }, gate, up, k);
    case kGelu: return apply([](float x) INLINE_LAMBDA { return x * normal(x); }, gate, up, k);
    case kRelu: return apply([](float x) INLINE_LAMBDA { return x > 0 ? x : 0; }, gate, up, k);
    case kXielu: {
      const float positive = bend[0], negative = bend[1], beta = bend[2], eps = bend[3];
      return apply([=](float x) INLINE_LAMBDA {
        const float below = exponential(x < eps ? x : eps) - 1 - x;
        return (x > 0 ? positive * x * x : negative * below) + beta * x;
      }, gate, up, k);
    }
    case kClampedSwiglu: {
      const float alpha = bend[0], limit = bend[1];
      for (int64_t i = 0; i < k; ++i) {  // in place: what is read is not yet written
        float g = gate[2 * i], u = gate[2 * i + 1];
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        gate[i] = g / (1 + exponential(-alpha * g)) * (u + 1);
      }
      return;
    }
    case kSigmoid: return apply([](float x) INLINE_LAMBDA { return sigmoid(x); }, gate, up, k);
  }
}

// What a cache holds.

template <class I>
struct Floats {
  using Element = float;
  static constexpr bool kScaled = false;
  static INLINE typename I::Float load(const float* p) { return I::load_float(p); }
  static INLINE float store(float x, float) { return x; }
};

template <class I>
struct Halves {
  using Element = uint16_t;
  static constexpr bool kScaled = false;
  static INLINE typename I::Float load(const uint16_t* p) { return I::load_half(p); }
  static INLINE uint16_t store(float x, float) { return F16::round(x); }
};

template <class I>
struct Bytes {
  using Element = int8_t;
  static constexpr bool kScaled = true;
  static INLINE typename I::Float load(const int8_t* p) { return I::load_byte(p); }
  static INLINE int8_t store(float x, float s) { return int8_t(bits<uint32_t>(x * s + 0x1.8p23f)); }
};

INLINE float top_magnitude(const float* x, int64_t dim) {
  uint32_t top = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const uint32_t a = bits<uint32_t>(x[i]) & F32::kAbs;
    top = a > top ? a : top;
  }
  const float value = bits<float>(top);
  return value < 1e-5f ? 1e-5f : value;
}

template <class C>
void store_position(const CachedHead& cache, int64_t position, const float* key, const float* value, int64_t dim,
                    int64_t value_dim) {
  auto* keys = static_cast<typename C::Element*>(cache.keys) + position / kRun * dim * kRun + position % kRun;
  auto* values = static_cast<typename C::Element*>(cache.values) + position * value_dim;
  float ks = 1, vs = 1;
  if constexpr (C::kScaled) {
    const float k = top_magnitude(key, dim), v = top_magnitude(value, value_dim);
    ks = 127 / k, vs = 127 / v;
    cache.key_scales[position] = k / 127, cache.value_scales[position] = v / 127;
  }
  for (int64_t i = 0; i < dim; ++i) keys[i * kRun] = C::store(key[i], ks);
  for (int64_t i = 0; i < value_dim; ++i) values[i] = C::store(value[i], vs);
}

// The scores of T queries for R runs of 16 positions.
template <class I, class C, int T, int R>
INLINE void score_runs(const typename C::Element* keys, const Query* queries, int64_t dim, float* scores, int64_t stride) {
  constexpr int kWidth = I::kBytes / 4, kVecs = R * kRun / kWidth;
  typename I::Float sum[T][kVecs] = {};
  const float* q[T];
  UNROLL for (int t = 0; t < T; ++t) q[t] = queries[t].q;
  for (int64_t i = 0; i < dim; ++i, keys += kRun) {
    typename I::Float key[kVecs];
    UNROLL for (int v = 0; v < kVecs; ++v) key[v] = C::load(keys + v * kWidth / kRun * dim * kRun + v * kWidth % kRun);
    UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(keys + (R + r) * dim * kRun);  // the hardware's ends at a page
    UNROLL for (int t = 0; t < T; ++t) {
      const auto value = I::splat_float(q[t][i]);
      UNROLL for (int v = 0; v < kVecs; ++v) sum[t][v] = sum[t][v] + key[v] * value;
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int v = 0; v < kVecs; ++v) I::store_float(scores + t * stride + v * kWidth, sum[t][v]);
  }
}

// The same for positions [first, last), multiples of 16: [T, stride]. Eight sums at a time hide the latency of adding.
template <class I, class C, int T>
INLINE void score(const CachedHead& cache, const Query* queries, int64_t dim, int64_t first, int64_t last, float* scores,
                  int64_t stride) {
  constexpr int kVecs = T * kRun * 4 / I::kBytes, kRuns = kVecs < 8 ? 8 / kVecs : 1;
  const auto* keys = static_cast<const typename C::Element*>(cache.keys) + first * dim;
  int64_t at = first;
  for (; at + kRuns * kRun <= last; at += kRuns * kRun, keys += kRuns * kRun * dim)
    score_runs<I, C, T, kRuns>(keys, queries, dim, scores + at - first, stride);
  for (; at < last; at += kRun, keys += kRun * dim) score_runs<I, C, T, 1>(keys, queries, dim, scores + at - first, stride);
  if constexpr (C::kScaled)
    for (int t = 0; t < T; ++t)
      for (at = first; at < last; ++at) scores[t * stride + at - first] *= cache.key_scales[at];
}

// Scores of positions [0, count) to weights that add up to 1, or with the weight of a sink, which nothing is seen of.
INLINE void softmax(float* scores, int64_t count, const float* sink = nullptr) {
  float top[kRun], sum[kRun] = {};
  for (int l = 0; l < kRun; ++l) top[l] = sink && *sink > scores[0] ? *sink : scores[0];
  int64_t i = 0;
  for (; i + kRun <= count; i += kRun)
    for (int l = 0; l < kRun; ++l) top[l] = scores[i + l] > top[l] ? scores[i + l] : top[l];
  for (int l = 0; i < count; ++i, ++l) top[l] = scores[i] > top[l] ? scores[i] : top[l];
  for (int l = 1; l < kRun; ++l) top[0] = top[l] > top[0] ? top[l] : top[0];
  const float most = top[0];
  for (i = 0; i + kRun <= count; i += kRun)
    for (int l = 0; l < kRun; ++l) {
      scores[i + l] = exponential(scores[i + l] - most);
      sum[l] += scores[i + l];
    }
  for (int l = 0; i < count; ++i, ++l) {
    scores[i] = exponential(scores[i] - most);
    sum[l] += scores[i];
  }
  for (int l = 1; l < kRun; ++l) sum[0] += sum[l];
  if (sink) sum[0] += exponential(*sink - most);
  const float factor = 1 / sum[0];
  for (i = 0; i < count; ++i) scores[i] *= factor;
}

// Adds values, whose rows are `apart`, times T rows of weights to the queries' sums, V vectors of features at a time.
template <class I, class C, int T, int V>
INLINE void weigh(const typename C::Element* values, int64_t apart, int64_t count, const float* weights, int64_t stride,
                  const Query* queries, int64_t feature) {
  constexpr int kWidth = I::kBytes / 4;
  typename I::Float sum[T][V];
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int v = 0; v < V; ++v) sum[t][v] = I::load_float(queries[t].out + feature + v * kWidth);
  }
  values += feature;
  for (int64_t i = 0; i < count; ++i, values += apart) {
    typename I::Float value[V];
    UNROLL for (int v = 0; v < V; ++v) value[v] = C::load(values + v * kWidth);
    UNROLL for (int t = 0; t < T; ++t) {
      const auto w = I::splat_float(weights[t * stride + i]);
      UNROLL for (int v = 0; v < V; ++v) sum[t][v] = sum[t][v] + value[v] * w;
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    UNROLL for (int v = 0; v < V; ++v) I::store_float(queries[t].out + feature + v * kWidth, sum[t][v]);
  }
}

// The queries' sums over positions [first, last) of values whose rows are `stride` apart; weights begin with `first`'s.
template <class I, class C, int T>
INLINE void weigh_all(const typename C::Element* values, int64_t stride, int64_t first, int64_t last, const float* weights,
                      int64_t width, const Query* queries, int64_t dim) {
  constexpr int kWidth = I::kBytes / 4, kVecs = T == 1 ? 4 : 2;  // several sums hide the latency of adding
  for (int t = 0; t < T; ++t) memset(queries[t].out, 0, dim * sizeof(float));
  for (int64_t at = first; at < last; at += kRun) {  // as many positions as stay in the first cache
    const auto* rows = values + at * stride;
    const int64_t count = smaller(kRun, last - at);
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < dim; i += 64 / int64_t(sizeof(*values))) __builtin_prefetch(rows + (kRun + row) * stride + i);
    int64_t feature = 0;
    for (; feature + kVecs * kWidth <= dim; feature += kVecs * kWidth)
      weigh<I, C, T, kVecs>(rows, stride, count, weights + at - first, width, queries, feature);
    for (; feature < dim; feature += kWidth) weigh<I, C, T, 1>(rows, stride, count, weights + at - first, width, queries, feature);
  }
}

template <class I, class C, int T>
void attend_to(const CachedHead& cache, const Query* queries, int64_t dim, int64_t value_dim, float cap, float* scores) {
  int64_t first = queries[0].first, last = queries[0].last;
  for (int t = 1; t < T; ++t) {
    first = smaller(first, queries[t].first);
    last = last > queries[t].last ? last : queries[t].last;
  }
  const int64_t start = first / kRun * kRun, stride = (last - start + kRun - 1) / kRun * kRun;
  score<I, C, T>(cache, queries, dim, start, last, scores, stride);
  for (int t = 0; t < T; ++t) {
    float* row = scores + t * stride;
    if (cap)  // cap * tanh(s / cap), of tanh(z) = 1 - 2 / (e^2z + 1)
      for (int64_t i = first; i < last; ++i) row[i - start] = cap - 2 * cap / (exponential(2 / cap * row[i - start]) + 1);
    for (int64_t i = first; i < queries[t].first; ++i) row[i - start] = 0;
    softmax(row + queries[t].first - start, queries[t].last - queries[t].first, queries[t].sink);
    for (int64_t i = queries[t].last; i < last; ++i) row[i - start] = 0;
    if constexpr (C::kScaled)
      for (int64_t i = first; i < last; ++i) row[i - start] *= cache.value_scales[i];
  }
  const auto* values = static_cast<const typename C::Element*>(cache.values);
  weigh_all<I, C, T>(values, value_dim, first, last, scores + first - start, stride, queries, value_dim);
}

template <int T>
struct Tile {
  static constexpr int kQueries = T;
};

// to(tile, at) for tiles of 4 queries, 2 and 1, which begin at query `at` of `count`.
template <class To>
INLINE void in_tiles(int count, const To& to) {
  static_assert(kTileQueries == 4, "");
  int at = 0;
  for (; at + 4 <= count; at += 4) to(Tile<4>{}, at);
  if (count & 2) to(Tile<2>{}, at);
  at += count & 2;
  if (count & 1) to(Tile<1>{}, at);
}

template <class I, class C>
void attend_with(const CachedHead& cache, const Query* queries, int count, int64_t dim, int64_t value_dim, float cap,
                 float* scores) {
  in_tiles(count, [&](auto tile, int at) INLINE_LAMBDA {
    attend_to<I, C, decltype(tile)::kQueries>(cache, queries + at, dim, value_dim, cap, scores);
  });
}

template <class I>
void attend(int32_t type, const CachedHead& cache, const Query* queries, int count, int64_t dim, int64_t value_dim, float cap,
            float* scores) {
  switch (type) {
    case kFloat32: return attend_with<I, Floats<I>>(cache, queries, count, dim, value_dim, cap, scores);
    case kFloat16: return attend_with<I, Halves<I>>(cache, queries, count, dim, value_dim, cap, scores);
    case kInt8: return attend_with<I, Bytes<I>>(cache, queries, count, dim, value_dim, cap, scores);
  }
}

template <class I>
void store(int32_t type, const CachedHead& cache, int64_t position, const float* key, const float* value, int64_t dim,
           int64_t value_dim) {
  switch (type) {
    case kFloat32: return store_position<Floats<I>>(cache, position, key, value, dim, value_dim);
    case kFloat16: return store_position<Halves<I>>(cache, position, key, value, dim, value_dim);
    case kInt8: return store_position<Bytes<I>>(cache, position, key, value, dim, value_dim);
  }
}

}  // namespace
