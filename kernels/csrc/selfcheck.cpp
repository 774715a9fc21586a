// A program that checks every instruction set against plain loops, on buffers of exactly the documented sizes: run
// under an emulator for other CPUs, and built with an address sanitizer (tests/test_cpu.py does both). Built only with
// -DBITNET_SELFCHECK=ON.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "bitnet_cpu.h"

namespace {

uint32_t state = 1;
uint32_t draw(uint32_t below) {
  state = state * 1664525u + 1013904223u;
  return uint64_t(state >> 8) * below >> 24;
}

void require(bool ok, const char* what, const char* isa, int64_t m, int64_t n, int64_t k) {
  if (ok) return;
  printf("%s: %s differs at m=%d n=%d k=%d\n", isa, what, int(m), int(n), int(k));
  exit(1);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

constexpr int kForms[] = {kTwoBits, kBase3, kEightBits, kOneBit, kFourBits, kOneBitTables};

struct Target {
  int form, index;
  const char* isa;
};

std::vector<Target> targets() {
  std::vector<Target> found;
  for (int form : kForms)
    for (int i = 0; bitnet_isa(form, i); ++i) found.push_back({form, i, bitnet_isa(form, i)});
  return found;
}

enum Kind { kTernary, kBytes, kBinary, kNibbles };

Kind kind_of(int form) {
  if (form == kOneBit || form == kOneBitTables) return kBinary;
  return form == kEightBits ? kBytes : form == kFourBits ? kNibbles : kTernary;
}

// A weight in all of the forms that can hold it, and its codes.
struct Weight {
  Kind kind;
  int64_t n, k;
  std::vector<int8_t> codes;
  std::vector<uint8_t> forms[6];

  Weight(Kind kind, int64_t n, int64_t k, int extreme) : kind(kind), n(n), k(k), codes(n * k) {
    const int low = kind == kBytes ? -128 : kind == kNibbles ? -8 : -1;
    const int high = kind == kBytes ? 127 : kind == kNibbles ? 7 : 1;
    for (auto& c : codes) {
      c = int8_t(extreme ? (extreme > 0 ? high : low) : low + int(draw(high - low + 1)));
      if (kind == kBinary && !c) c = 1;
    }
    const int64_t hub_rows = (n + 3) / 4;
    std::vector<uint8_t> hub(hub_rows * k, 0x55);
    for (int64_t r = 0; r < n && (kind == kTernary || kind == kBinary); ++r)
      for (int64_t c = 0; c < k; ++c) {
        uint8_t& byte = hub[r % hub_rows * k + c];
        const int shift = int(r / hub_rows * 2);
        byte = uint8_t((byte & ~(3 << shift)) | (codes[r * k + c] + 1) << shift);
      }
    const int64_t row_blocks = (k + 31) / 32;
    std::vector<uint8_t> nibbles(kind == kNibbles ? n * row_blocks * 16 : 0, 0x88);
    for (int64_t r = 0; r < n && kind == kNibbles; ++r)
      for (int64_t c = 0; c < k; ++c) {
        uint8_t& byte = nibbles[(r * row_blocks + c / 32) * 16 + c % 16];
        const int shift = c % 32 / 16 * 4;
        byte = uint8_t((byte & ~(15 << shift)) | (codes[r * k + c] + 8) << shift);
      }
    const uint8_t* source = kind == kBytes ? reinterpret_cast<const uint8_t*>(codes.data())
                            : kind == kNibbles ? nibbles.data() : hub.data();
    std::vector<int8_t> back(n * k);
    for (int form : kForms) {
      if (kind_of(form) != kind) continue;
      const int64_t step = form == kEightBits ? 4 : form == kFourBits ? 8 : form == kBase3 ? 20 : kind == kBinary ? 32 : 16;
      forms[form].resize((n + 31) / 32 * ((k + step - 1) / step) * 128);
      uint8_t* weight = forms[form].data();
      require(!bitnet_prepack(codes.data(), 1, n, k, weight, form, 2), "prepack of codes", "all", 0, n, k);
      const std::vector<uint8_t> of_codes = forms[form];
      require(!bitnet_prepack(source, 0, n, k, weight, form, 2), "prepack", "all", 0, n, k);
      require(same(forms[form], of_codes), "prepack of codes", "all", 0, n, k);
      require(!bitnet_unprepack(weight, n, k, back.data(), form, 2) && codes == back, "unprepack", "all", 0, n, k);
    }
  }
};

template <class Code>
std::vector<Code> draw_tokens(int64_t count, int extreme) {
  const int top = sizeof(Code) == 1 ? 128 : 32639;
  std::vector<Code> q(count);
  for (auto& v : q) v = Code(extreme ? -top : int(draw(2 * top)) - top);
  return q;
}

template <class Code>
int32_t dot(const Code* q, const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += q[c] * codes[c];
  return sum;
}

// Bare accumulators of one weight, against plain loops.
template <class Code>
void check_products(const Weight& w, int64_t m, int64_t stride, int extreme) {
  const auto q = draw_tokens<Code>(m ? (m - 1) * stride + w.k : 0, extreme);
  const int32_t type = sizeof(Code) == 1 ? kInt8 : kInt16;
  std::vector<int32_t> acc(m * w.n), expected(m * w.n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t r = 0; r < w.n; ++r) expected[i * w.n + r] = dot(&q[i * stride], &w.codes[r * w.k], w.k);
  for (const auto& target : targets())
    for (int threads = 1; threads <= 2 && kind_of(target.form) == w.kind; ++threads) {
      const PreparedWeight layer{w.forms[target.form].data(), nullptr, nullptr, w.n, w.k, 0, 0, kFloat32, target.form, 8,
                                 target.index};
      const auto status = bitnet_linear(&layer, q.data(), type, stride, nullptr, m, acc.data(), kInt32, threads);
      require(!status && same(acc, expected), "accumulator", target.isa, m, w.n, w.k);
    }
}

// Scales of groups, against plain loops.
template <class Code>
void check_groups(const Weight& w, int64_t m, int64_t size, int extreme) {
  const int64_t n = w.n, k = w.k, groups = (k + size - 1) / size, blocks = (n + 31) / 32;
  const auto q = draw_tokens<Code>(m * k, extreme);
  std::vector<uint16_t> half(blocks * groups * 32);
  std::vector<float> scale(half.size()), s(m), bias(n), y(m * n), expected(m * n);
  for (size_t i = 0; i < half.size(); ++i) {  // 1 + fraction / 1024
    const uint32_t fraction = draw(1024);
    half[i] = uint16_t(15 << 10 | fraction);
    scale[i] = 1 + float(fraction) / 1024;
  }
  for (auto& v : s) v = float(1 + draw(1000)) / 777;
  for (auto& v : bias) v = float(draw(1000)) / 333 - 1;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t r = 0; r < n; ++r) {
      float total = 0;
      for (int64_t span = 0; span < k; span += 1024) {
        float part = 0;
        for (int64_t at = span; at < k && at < span + 1024; at += size) {
          const int64_t end = at + size < k ? at + size : k;
          const float product = float(dot(&q[i * k + at], &w.codes[r * k + at], end - at));
          part += product * scale[(r / 32 * groups + at / size) * 32 + r % 32];
        }
        total += part;
      }
      expected[i * n + r] = total * (1 / s[i]) + bias[r];
    }
  for (const auto& target : targets())
    for (int threads = 1; threads <= 2 && kind_of(target.form) == w.kind; ++threads) {
      const PreparedWeight layer{w.forms[target.form].data(), half.data(), bias.data(), n, k, size, 0, kFloat32,
                                 target.form, 8, target.index};
      const auto status = bitnet_linear(&layer, q.data(), sizeof(Code) == 1 ? kInt8 : kInt16, k, s.data(), m, y.data(),
                                        kFloat32, threads);
      require(!status && same(y, expected), "scales of groups", target.isa, m, n, k);
    }
}

// Float tokens: every instruction set must agree with the first.
void check_floats(const Weight& w, int64_t m, int64_t stride, int32_t activation_bits) {
  const int64_t n = w.n, rows = m ? (m - 1) * stride + w.k : 0;
  std::vector<float> scale(n), bias(n), x(rows);
  for (int64_t r = 0; r < n; ++r) scale[r] = float(1 + draw(1000)) / 777, bias[r] = float(draw(1000)) / 333 - 1;
  for (auto& v : x) v = float(int(draw(2001)) - 1000) / 123;
  std::vector<uint16_t> half(rows);
  for (auto& v : half) v = uint16_t(draw(2) << 15 | draw(0x4200));  // finite as float16 and as bfloat16
  std::vector<float> y(m * n), first_y;
  std::vector<uint16_t> y16(m * n), first_y16[3];
  for (const auto& target : targets())
    for (int threads = 1; threads <= 2 && kind_of(target.form) == w.kind; ++threads) {
      const char* isa = target.isa;
      const PreparedWeight layer{w.forms[target.form].data(), scale.data(), bias.data(), n, w.k, 0, n > 1, kFloat32,
                                 target.form, activation_bits, target.index};
      auto run = [&](const void* in, Type type, void* out) {
        return bitnet_linear(&layer, in, type, stride, nullptr, m, out, type, threads) == kOk;
      };
      require(run(x.data(), kFloat32, y.data()), "float32", isa, m, n, w.k);
      if (first_y.empty()) first_y = y;
      require(same(y, first_y), "float32", isa, m, n, w.k);
      for (Type type : {kBFloat16, kFloat16}) {
        require(run(half.data(), type, y16.data()), "16-bit floats", isa, m, n, w.k);
        if (first_y16[type].empty()) first_y16[type] = y16;
        require(same(y16, first_y16[type]), "16-bit floats", isa, m, n, w.k);
      }
    }
}

void check(int64_t m, int64_t n, int64_t k, int extreme) {
  for (Kind kind : {kTernary, kBytes, kBinary, kNibbles}) {
    if (kind == kBytes && k > 65536) continue;
    const Weight w(kind, n, k, extreme);
    if (kind == kNibbles) {  // which have scales of groups of 32 only
      check_groups<int8_t>(w, m, 32, extreme);
      continue;
    }
    const int64_t stride = k + draw(3);
    check_products<int8_t>(w, m, stride, extreme);
    check_floats(w, m, stride, 8);
    if (kind == kBytes) continue;
    if (k <= 65536) check_products<int16_t>(w, m, stride, extreme), check_floats(w, m, stride, 16);
    const int64_t size = 32 << draw(4);
    check_groups<int8_t>(w, m, size, extreme);
    check_groups<int16_t>(w, m, size, extreme);
  }
}

// The quantizers have no plain loops here: every instruction set must agree with the plainest one.
void check_quantizers(int64_t n, int64_t k) {
  const int64_t hub_rows = (n + 3) / 4;
  std::vector<uint32_t> wide(n * k);
  std::vector<uint16_t> half(n * k);
  for (auto& v : half) v = uint16_t(draw(2) << 15 | draw(0x7c00));  // finite as float16 and as bfloat16
  for (int64_t i = 0; i < n * k; ++i) wide[i] = uint32_t(half[i]) << 16 | draw(1 << 16);
  std::vector<float> inv(n);
  for (auto& v : inv) v = float(1 + draw(1000)) / 333;
  int plainest = 0;
  while (bitnet_isa(kTwoBits, plainest + 1)) ++plainest;
  for (Type type : {kFloat32, kBFloat16, kFloat16}) {
    const void* x = type == kFloat32 ? static_cast<const void*>(wide.data()) : half.data();
    std::vector<int8_t> codes[2], q[2], q16, q8, q4;
    std::vector<uint8_t> hub[2];
    std::vector<double> sums[2];
    std::vector<float> s[2], s16, s8, s4;
    for (int isa = plainest; isa >= 0; --isa) {
      const int i = isa != plainest;
      codes[i].resize(n * k), hub[i].resize(hub_rows * k), sums[i].resize(n), s[i].resize(n);
      const char* name = bitnet_isa(kTwoBits, isa);
      require(!bitnet_ternary_codes(x, type, n, k, inv.data(), 1, codes[i].data(), isa, 2) && (!i || codes[0] == codes[1]),
              "ternary codes", name, 0, n, k);
      require(!bitnet_pack_ternary(x, type, n, k, inv.data(), 1, hub[i].data(), isa, 2) && (!i || hub[0] == hub[1]),
              "packed codes", name, 0, n, k);
      require(!bitnet_magnitudes(x, type, n, k, sums[i].data(), isa, 2) && (!i || same(sums[0], sums[1])), "magnitudes",
              name, 0, n, k);
      for (int32_t activation_bits : {16, 8, 4}) {
        q[i].resize(n * k * (activation_bits == 16 ? 2 : 1));
        std::vector<int8_t>& first_q = activation_bits == 16 ? q16 : activation_bits == 8 ? q8 : q4;
        std::vector<float>& first_s = activation_bits == 16 ? s16 : activation_bits == 8 ? s8 : s4;
        require(!bitnet_quantize(x, type, k, n, k, activation_bits, q[i].data(), s[i].data(), isa, 2), "activation codes",
                name, 0, n, k);
        if (!i) first_q = q[i], first_s = s[i];
        require(same(q[i], first_q) && same(s[i], first_s), "activation codes", name, 0, n, k);
      }
    }
  }
}

}  // namespace

// The Walsh-Hadamard transform, against plain loops over its matrix's stages.
void check_hadamard(int64_t m, int64_t block, int64_t blocks) {
  const int64_t k = block * blocks;
  std::vector<float> x(m * k), y(m * k), expected(m * k);
  std::vector<int8_t> signs(k);
  for (auto& v : x) v = float(int(draw(2001)) - 1000) / 123;
  for (auto& v : signs) v = int8_t(draw(2) ? 1 : -1);
  const float factor = 0.7f;
  for (int64_t i = 0; i < m * k; ++i) expected[i] = x[i] * float(signs[i % k]);
  for (int64_t distance = 1; distance < block; distance *= 2)
    for (int64_t i = 0; i < m * k; ++i) {
      if (i / distance % 2) continue;
      const float a = expected[i], b = expected[i + distance];
      expected[i] = a + b, expected[i + distance] = a - b;
    }
  for (auto& v : expected) v *= factor;
  for (const auto& target : targets())
    for (int threads = 1; threads <= 2 && target.form == kTwoBits; ++threads) {
      const auto status = bitnet_hadamard(x.data(), kFloat32, k, m, k, block, signs.data(), factor, y.data(),
                                          target.index, threads);
      require(!status && same(y, expected), "Hadamard transform", target.isa, m, block, k);
    }
}

std::vector<float> floats(int64_t count) {
  std::vector<float> values(count);
  for (auto& v : values) v = float(int(draw(2001)) - 1000) / 700;
  return values;
}

// Codes of a block of columns, between others, against plain loops; scales of rows or of groups.
void check_choose(int64_t n, int64_t count, bool descend, bool binary) {
  const int64_t stride = count + 3;
  auto corner = floats(count * count), scale = floats(n * count);
  for (int64_t j = 0; j < count; ++j) corner[j * count + j] = 4;
  for (auto& v : scale) v = v * v + 0.1f;
  const auto part = floats(n * stride), codes = floats(n * stride);
  auto left = part, expected_codes = codes, expected = floats(n * count);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t j = 0; j < count; ++j) {
      const float own = scale[row * count + j], at = left[row * stride + j], old = codes[row * stride + j];
      const float v = descend ? old + at / (4 * own) : at / own;
      const float code = binary ? (v > 0 ? 1 : -1) : v > 0.5f ? 1 : v < -0.5f ? -1 : 0;
      const float by = descend ? (code - old) * own : (at - code * own) / 4;
      expected_codes[row * stride + j] = code, expected[row * count + j] = by;
      for (int64_t i = j; i < count; ++i) left[row * stride + i] -= corner[j * count + i] * by;
    }
  for (const auto& target : targets())
    for (int threads = 1; threads <= 2 && target.form == kTwoBits; ++threads) {
      auto spoilt = part, found = codes, moved = floats(n * count);
      const Columns columns{spoilt.data(), corner.data(), scale.data(), found.data(), moved.data(), n, count, stride, count, 1,
                            stride, descend, binary, target.index};
      const auto status = bitnet_choose(&columns, threads);
      require(!status && same(moved, expected) && same(found, expected_codes), "codes of columns", target.isa, n, count, descend);
    }
}

// Two decoder blocks: every instruction set has the bits of the plainest, for prompts as for single tokens. Unless `other`,
// the second has experts, too, or them alone; with one type of cache the first has a recurrence in place of attention, with
// another queries have gates.
void check_step(int cache_type, int gate, int64_t group_size, bool other, bool by_head) {
  constexpr int64_t kHidden = 40, kHeads = 6, kDim = 16, kInner = 72, kTokens = 37, kCapacity = 48, kBlocks = 2;
  constexpr int64_t kExperts = 6, kExpertInner = 24, kValueHeads = 2, kValues = 32, kKernel = 4;
  constexpr int64_t kMixed = kValueHeads * kValues, kChannels = 2 * kDim + kMixed;
  const int64_t kv_heads = by_head ? kHeads : 2;
  const bool recurs = cache_type == kFloat16 && !by_head, later = gate > kGelu;
  const int query_gate = cache_type == kInt8 && !by_head ? 1 + later : 0;
  const bool shares = cache_type == kFloat32 && gate == kXielu && !other;  // keys and values, which are alike; see also PerLayer
  const bool latent = cache_type == kFloat32 && gate == kRelu;  // attention of the first block
  constexpr int64_t kRank = 24, kQueryRank = 40;
  constexpr int kLayers = 8;
  const int64_t shapes[kLayers][2] = {{(by_head ? 3 : query_gate == 1 ? 2 : 1) * kHeads * kDim, kHidden}, {kv_heads * kDim, kHidden},
                                      {kv_heads * kDim, kHidden}, {kHidden, kHeads * kDim}, {kInner, kHidden}, {kInner, kHidden},
                                      {kHidden, kInner}, {kHeads * kDim, kHidden}};
  std::vector<Weight> weights;
  for (int b = 0; b < kBlocks; ++b)
    for (const auto& shape : shapes) weights.emplace_back(kTernary, shape[0], shape[1], 0);
  for (int64_t e = 0; e < kExperts; ++e) weights.emplace_back(kTernary, 2 * kExpertInner, kHidden, 0);
  for (int64_t e = 0; e < kExperts; ++e) weights.emplace_back(kTernary, kHidden, kExpertInner, 0);
  const int64_t linear[16][2] = {{kChannels, kHidden}, {kMixed, kHidden}, {kValueHeads, kHidden}, {kValueHeads, kHidden},
                                {kHidden, kMixed}, {3 * kMixed, kHidden}, {kChannels + kMixed, kHidden}, {2 * kValueHeads, kHidden},
                                {kDim, kHidden}, {kQueryRank, kHidden}, {kRank + kDim, kHidden}, {kHeads * 2 * kDim, kQueryRank},
                                {kHeads * 2 * kDim, kRank}, {kDim, kHidden}, {kHidden, kDim}, {kMixed + kChannels + kValueHeads, kHidden}};
  for (const auto& shape : linear) weights.emplace_back(kTernary, shape[0], shape[1], 0);
  const auto bias = floats(kChannels), convolution = floats(kKernel * kChannels), shift = floats(kValueHeads);
  auto speed = floats(kValueHeads);
  for (auto& v : speed) v *= v;
  const auto norm = floats(128), cosine = floats(kCapacity * 8), sine = floats(kCapacity * 8), embedded = floats(kTokens * kHidden);
  const auto router = floats((kExperts + 1) * kHidden), correction = floats(kExperts), router_bias = floats(kExperts + 1);
  const auto identities = floats(kTokens * kBlocks * kDim), sinks = floats(kHeads), position_scales = floats(kCapacity);
  std::vector<uint16_t> narrow;  // bfloat16
  for (float value : router) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    narrow.push_back(uint16_t(bits >> 16));
  }
  const std::vector<float> one_scale{0.02f};
  std::vector<std::vector<uint16_t>> group_scales;
  for (const auto& w : weights) group_scales.emplace_back((w.n + 31) / 32 * 32 * ((w.k + 31) / 32), uint16_t(0x2400));
  std::vector<float> expected;
  int plainest = 0;
  while (bitnet_isa(kTwoBits, plainest + 1)) ++plainest;
  for (int isa = plainest; isa >= 0; --isa)
    for (int64_t chunk : {int64_t(1), int64_t(11), kTokens}) {
      std::vector<PreparedWeight> layers;
      for (size_t i = 0; i < weights.size(); ++i) {
        const Weight& w = weights[i];
        const void* scale = group_size ? static_cast<const void*>(group_scales[i].data()) : one_scale.data();
        layers.push_back({w.forms[kTwoBits].data(), scale, nullptr, w.n, w.k, group_size, 0, 0, kTwoBits, 8, isa});
      }
      std::vector<Block> blocks(kBlocks);
      for (int b = 0; b < kBlocks; ++b) {
        const PreparedWeight* l = layers.data() + kLayers * b;
        const Norm n{norm.data(), other ? norm.data() + 1 : nullptr, 1e-5f, other}, none{};
        Block& block = blocks[b];
        block = {};
        if (by_head) block.in_count = 1, block.in[0] = {{n, none}, nullptr, 0, 1, {l}};
        else if (b) block.in_count = 1, block.in[0] = {{n, none}, nullptr, 0, query_gate == 2 ? 4 : 3, {l, l + 1, l + 2, l + 7}};
        else {
          block.in_count = query_gate == 2 ? 4 : 3;
          for (int i = 0; i < block.in_count; ++i) block.in[i] = {{n, n}, nullptr, 8, 1, {i < 3 ? l + i : l + 7}};
        }
        block.out = {{n, none}, nullptr, 0, 1, {l + 3}};
        block.gate_count = 1, block.gate[0] = {{n, none}, nullptr, 0, other ? 1 : 2, {l + 4, l + 5}};
        block.down = {{none, none}, nullptr, 0, 1, {l + 6}};
        block.query = block.key = b ? n : none;
        block.after_attention = block.after_mlp = b ? none : n;
        block.inner = kInner, block.window = b ? 0 : 19, block.rope = b - 1, block.whole = other && !by_head && !query_gate, block.parallel = other, block.turned = gate == kGelu;
        block.sinks = later ? sinks.data() : nullptr;
        block.scalar = 1, block.heads = {kHeads, kv_heads, kDim, kDim};
        block.cache = {b * kv_heads * kDim, b * kv_heads * kDim, b * kv_heads, 0};
        for (int i = 0; i < 4; ++i) block.bend[i] = i < 3 ? 0.6f + i : -1e-6f;
      }
      const PreparedWeight* l = layers.data() + kLayers * kBlocks + 2 * kExperts;
      const Norm n{norm.data(), nullptr, 1e-5f, 0}, none{};
      const Recurrence recurrence{convolution.data(), gate == kClampedSwiglu ? bias.data() : nullptr, shift.data(), speed.data(), shift.data(), n, kValues, kKernel, kChannels, 1, kValueHeads, kDim, kValues,
                                  gate == kXielu ? 2.0f : 1.0f, 0.5f, gate == kRelu ? kByKeyHead : gate == kXielu ? kSixLayers : gate == kClampedSwiglu ? kStateSpace : kFourLayers};
      Recurrence convolves = recurrence;
      convolves.value_heads = 0, convolves.channels = kMixed;
      if (recurs && gate == kGeluTanh) {
        blocks[0].recurrence = &convolves;
        blocks[0].in_count = 1, blocks[0].in[0] = {{n, none}, nullptr, 0, 1, {l + 5}};
        blocks[0].out = {{none, none}, nullptr, 0, 1, {l + 4}};
      } else if (recurs) {
        blocks[0].recurrence = &recurrence;
        blocks[0].in_count = 1, blocks[0].in[0] = {{n, none}, nullptr, 0, 4, {l, l + 1, l + 2, l + 3}};
        if (recurrence.parts == kByKeyHead) blocks[0].in[0] = {{n, none}, nullptr, 0, 2, {l + 6, l + 7}};
        if (recurrence.parts == kStateSpace) blocks[0].in[0] = {{n, none}, nullptr, 0, 1, {l + 15}};
        if (recurrence.parts == kSixLayers) blocks[0].in[0] = {{n, none}, nullptr, 0, 6, {l + 8, l + 8, l + 1, l + 1, l + 2, l + 3}};
        blocks[0].out = {{none, none}, nullptr, 0, 1, {l + 4}};
      }
      const Latent latents{{{n, none}, nullptr, 0, 1, {l + 11}}, {{none, none}, nullptr, 0, 1, {l + 12}}, n, kRank, kQueryRank};
      if (latent) {
        Block& block = blocks[0];
        block.latent = &latents, block.rope = 0, block.whole = 0, block.query = block.key = none;
        block.heads = {kHeads, kHeads, 2 * kDim, kDim};
        block.in_count = 1, block.in[0] = {{n, none}, nullptr, 0, 2, {l + 9, l + 10}};
        blocks[1].cache = {kHeads * 2 * kDim, kHeads * kDim, kHeads, kRank};
      }
      const PerLayer per_layer{{{n, none}, nullptr, 0, 1, {l + 13}}, {{none, none}, nullptr, 0, 1, {l + 14}}, n};
      if (shares) {
        blocks[0].keys_only = blocks[1].reads = 1, blocks[0].value = n, blocks[0].per_layer = blocks[1].per_layer = &per_layer;
        blocks[1].cache = blocks[0].cache, blocks[1].scalar = 0.7f;
        blocks[0].in_count = 2, blocks[1].in[0] = {{n, none}, nullptr, 0, 1, {layers.data() + kLayers}};
      }
      std::vector<const PreparedWeight*> experts;
      for (int64_t e = 0; e < 2 * kExperts; ++e) experts.push_back(&layers[kLayers * kBlocks + e]);
      Mixture mixture{{norm.data(), nullptr, 1e-5f, 0}, none, none, none, router.data(), later ? router_bias.data() : nullptr, correction.data(), kExperts, 2, 3, 2, 2, kExpertInner,
                      experts.data(), experts.data() + kExperts, 0.01f, 1e-20f, 1.5f, nullptr, gate % 3, gate != kSquaredRelu, kFloat32, 1};
      if (cache_type == kFloat16) mixture.router = narrow.data(), mixture.router_type = kBFloat16;
      if (cache_type == kInt8) mixture.correction = nullptr, mixture.groups = mixture.groups_chosen = 1, mixture.shared_gate = 0;
      if (gate == kRelu) mixture.router_norm = mixture.after = mixture.beside = n, mixture.factors = router_bias.data();
      if (!other) blocks[1].mixture = &mixture;
      if (!other && cache_type == kInt8 && gate != kRelu) blocks[1].inner = blocks[1].gate_count = blocks[1].down.count = 0;
      Plan plan{blocks.data(), kBlocks, kHidden, shares ? kDim : 0, kCapacity, {{cosine.data(), sine.data(), 8}}, later ? position_scales.data() : nullptr,
                {norm.data(), nullptr, 1e-5f, 0}, 0.25f, other ? 2.0f : 0.0f, other ? 0.5f : 1.0f, later ? 0.5f : 0.0f, other, by_head, query_gate, gate, !other,
                cache_type, isa};
      if (gate == kClampedSwiglu) {  // experts alone take it
        require(bitnet_step(&plan, nullptr, nullptr, 0, nullptr, nullptr, nullptr, 1) == kBadShape, "a gate of experts", "step", 0, 0, 0);
        blocks[0].mixture = &mixture;
        for (Block& block : blocks) block.inner = block.gate_count = block.down.count = 0;
      }
      const int64_t cells = (kHeads + kv_heads) * kCapacity;
      std::vector<float> keys(2 * cells * kDim), values(cells * kDim), key_scales(cells), value_scales(cells), kept(kRank * kCapacity);
      std::vector<float> spare = keys, states(kDim * kMixed), windows((kKernel - 1) * kChannels);
      const Sequence sequences[] = {
          {keys.data(), values.data(), key_scales.data(), value_scales.data(), latent ? kept.data() : nullptr, states.data(), windows.data(), kCapacity},
          {spare.data(), spare.data(), key_scales.data(), value_scales.data(), nullptr, nullptr, nullptr, kCapacity}};
      std::vector<float> x = embedded;
      std::vector<int64_t> sequence(kTokens, 0), position(kTokens);
      for (int64_t t = 0; t < kTokens; ++t) position[t] = t;
      for (int64_t t = 0; t < kTokens; t += chunk) {
        const int64_t m = chunk < kTokens - t ? chunk : kTokens - t;
        require(!bitnet_step(&plan, x.data() + t * kHidden, shares ? identities.data() + t * kBlocks * kDim : nullptr, m, sequences, sequence.data() + t, position.data() + t, 1 + isa % 2),
                "step's status", bitnet_isa(kTwoBits, isa), m, kHidden, kInner);
      }
      if (expected.empty()) expected = x;
      require(same(x, expected), "step", bitnet_isa(kTwoBits, isa), chunk, kHidden, kInner);
      require(bitnet_step(&plan, x.data(), identities.data(), 257, sequences, sequence.data(), position.data(), 1) == kBadShape, "too many tokens",
              "step", 257, 0, 0);
      if (shares)
        require(bitnet_step(&plan, x.data(), nullptr, 1, sequences, sequence.data(), position.data(), 1) == kBadShape, "no identities",
                "step", 1, 0, 0);
      position[0] = kCapacity;
      require(bitnet_step(&plan, x.data(), identities.data(), 1, sequences, sequence.data(), position.data(), 1) == kBadShape, "no room", "step", 1, 0, 0);
    }
}

// Attention over torch's tensors: every instruction set has the bits of the plainest.
void check_attention(int type, int64_t heads, int64_t kv_heads, int64_t queries, int64_t positions, int64_t dim, int64_t value_dim) {
  constexpr int64_t kBatch = 2;
  const int64_t bytes = type == kFloat32 ? 4 : 2;
  const auto numbers = [&](int64_t count) {  // below 2 in all three types
    std::vector<uint8_t> values(count * bytes);
    for (size_t i = 0; i < values.size(); i += 2) {
      const auto half = uint16_t(draw(2) << 15 | draw(0x3c00));
      memcpy(values.data() + i, &half, 2);
    }
    return values;
  };
  const auto q = numbers(kBatch * heads * queries * dim), k = numbers(kBatch * kv_heads * positions * dim),
             v = numbers(kBatch * kv_heads * positions * value_dim);
  std::vector<uint8_t> mask(kBatch * queries * positions);
  for (auto& m : mask) m = draw(3) > 0;
  memset(mask.data(), 0, positions);
  int plainest = 0;
  while (bitnet_isa(kTwoBits, plainest + 1)) ++plainest;
  for (const uint8_t* seen : {static_cast<const uint8_t*>(nullptr), static_cast<const uint8_t*>(mask.data())}) {
    std::vector<uint8_t> expected;
    for (int isa = plainest; isa >= 0; --isa) {
      std::vector<uint8_t> out(kBatch * queries * heads * value_dim * bytes);
      const Attention a{q.data(), k.data(), v.data(), seen, out.data(), kBatch, heads, kv_heads, queries, positions, dim, value_dim,
                        {heads * queries * dim, queries * dim, dim}, {kv_heads * positions * dim, positions * dim, dim},
                        {kv_heads * positions * value_dim, positions * value_dim, value_dim},
                        {queries * positions, 0, positions}, 0.3f, type, isa};
      require(!bitnet_attention(&a, 1 + isa % 2), "attention's status", bitnet_isa(kTwoBits, isa), queries, positions, dim);
      if (expected.empty()) expected = out;
      require(same(out, expected), "attention", bitnet_isa(kTwoBits, isa), queries, positions, dim);
    }
  }
}

int main() {
  const int near[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129, 200, 257};
  const int tokens[] = {0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17};
  for (int i = 0; i < 150; ++i) check(tokens[draw(14)], near[draw(19)], near[draw(19)], 0);
  for (int i = 0; i < 50; ++i) check_quantizers(near[draw(19)], near[draw(19)]);
  check_quantizers(700, 530);
  for (int64_t block = 2; block <= 8192; block *= 2) check_hadamard(1 + draw(3), block, 1 + draw(3));
  for (int64_t count : {1, 5, 64, 128})
    for (int which = 0; which < 4; ++which) check_choose(1 + draw(70), count, which & 1, which & 2);
  check_choose(300, 128, true, false);  // in two threads
  check(300, 40, 20, 0);
  check(1, 1000, 1100, 0);
  check(9, 500, 600, 0);
  check(2, 70, 2100, 0);
  for (int64_t m : {1, 7})
    for (int extreme : {-1, 1}) check(m, 3, 16384, extreme);
  check(1, 2, 600001, 1);
  for (int extreme : {-1, 1}) check(2, 2, 65536, extreme);
  for (int cache_type : {kFloat32, kFloat16, kInt8})
    for (int gate : {kSilu, kSquaredRelu, kGeluTanh, kGelu, kRelu, kXielu, kClampedSwiglu})
      for (int other = 0; other < (gate == kClampedSwiglu ? 1 : 2); ++other) check_step(cache_type, gate, gate == kSquaredRelu ? 32 : 0, other, gate == kGelu);
  for (int type : {kFloat32, kBFloat16, kFloat16}) {
    check_attention(type, 4, 2, 1, 1, 16, 16);
    check_attention(type, 6, 2, 3, 37, 48, 32);
    check_attention(type, 5, 1, 2, 130, 32, 80);
  }
  for (const auto& target : targets()) printf("%s ", target.isa);
  printf("agree\n");
}
