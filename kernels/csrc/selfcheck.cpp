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

struct Target {
  int form, index;
  const char* isa;
};

std::vector<Target> targets() {
  std::vector<Target> found;
  for (int form : {kTwoBits, kBase3, kEightBits})
    for (int i = 0; bitnet_isa(form, i); ++i) found.push_back({form, i, bitnet_isa(form, i)});
  return found;
}

void check_with(bool eight, int64_t m, int64_t n, int64_t k, int extreme) {
  std::vector<int8_t> codes(n * k), back(n * k);
  const int low = eight ? -128 : -1, high = eight ? 127 : 1;
  for (auto& c : codes) c = int8_t(extreme ? (extreme > 0 ? high : low) : low + int(draw(high - low + 1)));
  const int64_t hub_rows = (n + 3) / 4;
  std::vector<uint8_t> hub(hub_rows * k, 0x55);
  for (int64_t r = 0; r < n && !eight; ++r)
    for (int64_t c = 0; c < k; ++c) {
      uint8_t& byte = hub[r % hub_rows * k + c];
      const int shift = int(r / hub_rows * 2);
      byte = uint8_t((byte & ~(3 << shift)) | (codes[r * k + c] + 1) << shift);
    }
  const uint8_t* source = eight ? reinterpret_cast<const uint8_t*>(codes.data()) : hub.data();
  std::vector<uint8_t> weights[3];
  for (int form : {kTwoBits, kBase3, kEightBits}) {
    if ((form == kEightBits) != eight) continue;
    const int64_t group = eight ? 4 : form == kBase3 ? 20 : 16;
    weights[form].resize((n + 31) / 32 * ((k + group - 1) / group) * 128);
    uint8_t* weight = weights[form].data();
    require(!bitnet_prepack(codes.data(), 1, n, k, weight, form, 2), "prepack of codes", "all", m, n, k);
    const std::vector<uint8_t> of_codes = weights[form];
    require(!bitnet_prepack(source, 0, n, k, weight, form, 2), "prepack", "all", m, n, k);
    require(same(weights[form], of_codes), "prepack of codes", "all", m, n, k);
    require(!bitnet_unprepack(weight, n, k, back.data(), form, 2) && codes == back, "unprepack", "all", m, n, k);
  }

  const int64_t stride = k + draw(3), rows = m ? (m - 1) * stride + k : 0;
  std::vector<int8_t> q(rows);
  for (auto& v : q) v = extreme ? -128 : int8_t(draw(256));
  std::vector<int32_t> acc(m * n), expected(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < k; ++c) expected[i * n + r] += q[i * stride + c] * codes[r * k + c];

  std::vector<float> scale(n), bias(n), x(rows);
  for (int64_t r = 0; r < n; ++r) scale[r] = float(1 + draw(1000)) / 777, bias[r] = float(draw(1000)) / 333 - 1;
  for (auto& v : x) v = float(int(draw(2001)) - 1000) / 123;
  std::vector<uint16_t> half(rows);
  for (auto& v : half) v = uint16_t(draw(2) << 15 | draw(0x4200));  // finite as float16 and as bfloat16

  std::vector<float> y(m * n), first_y;
  std::vector<uint16_t> y16(m * n), first_y16[3];
  for (const auto& target : targets()) {
    if ((target.form == kEightBits) != eight) continue;
    for (int threads = 1; threads <= 2; ++threads) {
      const char* isa = target.isa;
      PreparedWeight layer{weights[target.form].data(), scale.data(), bias.data(), n, k, n > 1, kFloat32, target.form,
                           8, target.index};
      auto run = [&](const void* in, Type in_type, void* out, Type out_type) {
        return bitnet_linear(&layer, in, in_type, stride, nullptr, m, out, out_type, threads) == kOk;
      };
      require(run(q.data(), kInt8, acc.data(), kInt32) && same(acc, expected), "accumulator", isa, m, n, k);
      require(run(x.data(), kFloat32, y.data(), kFloat32), "float32", isa, m, n, k);
      if (first_y.empty()) first_y = y;
      require(same(y, first_y), "float32", isa, m, n, k);
      for (Type type : {kBFloat16, kFloat16}) {
        require(run(half.data(), type, y16.data(), type), "16 bits", isa, m, n, k);
        if (first_y16[type].empty()) first_y16[type] = y16;
        require(same(y16, first_y16[type]), "16 bits", isa, m, n, k);
      }
    }
  }
}

void check(int64_t m, int64_t n, int64_t k, int extreme) {
  check_with(false, m, n, k, extreme);
  if (k <= 65536) check_with(true, m, n, k, extreme);
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
    std::vector<int8_t> codes[2], q[2];
    std::vector<uint8_t> hub[2];
    std::vector<double> sums[2];
    std::vector<float> s[2];
    for (int isa = plainest; isa >= 0; --isa) {
      const int i = isa != plainest;
      codes[i].resize(n * k), q[i].resize(n * k), hub[i].resize(hub_rows * k), sums[i].resize(n), s[i].resize(n);
      const char* name = bitnet_isa(kTwoBits, isa);
      require(!bitnet_ternary_codes(x, type, n, k, inv.data(), 1, codes[i].data(), isa, 2) && (!i || codes[0] == codes[1]),
              "ternary codes", name, 0, n, k);
      require(!bitnet_pack_ternary(x, type, n, k, inv.data(), 1, hub[i].data(), isa, 2) && (!i || hub[0] == hub[1]),
              "packed codes", name, 0, n, k);
      require(!bitnet_magnitudes(x, type, n, k, sums[i].data(), isa, 2) && (!i || same(sums[0], sums[1])), "magnitudes",
              name, 0, n, k);
      require(!bitnet_quantize(x, type, k, n, k, 8, q[i].data(), s[i].data(), isa, 2) && (!i || (q[0] == q[1] && same(s[0], s[1]))),
              "activation codes", name, 0, n, k);
    }
  }
}

}  // namespace

int main() {
  const int near[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129, 200, 257};
  const int tokens[] = {0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17};
  for (int i = 0; i < 150; ++i) check(tokens[draw(14)], near[draw(19)], near[draw(19)], 0);
  for (int i = 0; i < 50; ++i) check_quantizers(near[draw(19)], near[draw(19)]);
  check_quantizers(700, 530);
  check(300, 40, 20, 0);
  check(1, 1000, 1100, 0);
  check(9, 500, 600, 0);
  for (int64_t m : {1, 7})
    for (int extreme : {-1, 1}) check(m, 3, 16384, extreme);
  check(1, 2, 600001, 1);
  for (int extreme : {-1, 1}) check(2, 2, 65536, extreme);
  for (const auto& target : targets()) printf("%s ", target.isa);
  printf("agree\n");
}
