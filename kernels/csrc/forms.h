// Weights to a form and back: what a lane holds, byte by byte. bitnet_cpu.h describes the forms.
#pragma once
#include <string.h>

#include "isa.h"
#include "threads.h"

namespace {

// `size` bytes, of which the first `here` are copied, if there are that many, and the others are `padding`.
template <int size, class Words>
void copy_padded(Words& to, const uint8_t* from, int64_t here, int padding) {
  if (here >= size) {
    memcpy(to, from, size);  // of a size that the compiler knows
  } else {
    memset(to, padding, size);
    if (here > 0) memcpy(to, from, here);
  }
}

// One lane of a form from the bytes of `here` codes, or of a whole group if there are as many; field() leaves code + 1
// in the low two bits of each byte of a word, and turns `padding` into that of code 0.
template <class Field>
uint32_t pack_lane(const uint8_t* from, int64_t here, int32_t form, int padding, const Field& field) {
  uint32_t t[5];
  if (form == kEightBits) {
    copy_padded<4>(t, from, here, 0);
    return t[0] ^ 0x80808080;
  }
  if (form == kBase3) copy_padded<20>(t, from, here, padding);
  else copy_padded<16>(t, from, here, padding), t[4] = 0;
  for (uint32_t& word : t) word = field(word) & 0x03030303;
  return form == kBase3 ? t[0] + 3 * t[1] + 9 * t[2] + 27 * t[3] + 84 * t[4]
                          : t[0] | t[1] << 2 | t[2] << 4 | t[3] << 6;
}

void prepack(const void* source, bool from_codes, int64_t n, int64_t k, uint8_t* weight, int32_t form, int threads) {
  const int64_t hub_rows = ceil_div(n, 4), blocks = ceil_div(n, kBlockRows);
  const int64_t group = group_features(form), groups = ceil_div(k, group);
  from_codes |= form == kEightBits;
  parallel(threads, [&](int thread, int count) {
    for (int64_t b = share(blocks, thread, count); b < share(blocks, thread + 1, count); ++b)
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const int64_t row = b * kBlockRows + r, filled = row < n ? k : 0;
        const auto* from = static_cast<const uint8_t*>(source);
        if (row < n) from += (from_codes ? row : row % hub_rows) * k;
        const int shift = row < n ? int(row / hub_rows * 2) : 0;
        uint8_t* to = weight + b * groups * kGroupBytes + 4 * r;
        const auto of_codes = [](uint32_t t) { return (t & 0x03030303) + 0x01010101; };  // -1 is 3 in two bits
        const auto of_hub_bytes = [=](uint32_t t) { return t >> shift; };
        for (int64_t g = 0; g < groups; ++g, to += kGroupBytes) {
          const int64_t here = filled - g * group;
          const uint32_t lane = from_codes ? pack_lane(from + g * group, here, form, 0, of_codes)
                                           : pack_lane(from + g * group, here, form, 0x55, of_hub_bytes);
          memcpy(to, &lane, 4);
        }
      }
  });
}

void unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t form, int threads) {
  static constexpr int kPower[] = {1, 3, 9, 27, 84};
  const int64_t group = group_features(form), groups = ceil_div(k, group);
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row) {
      const uint8_t* from = weight + row / kBlockRows * groups * kGroupBytes + row % kBlockRows * 4;
      int8_t* to = codes + row * k;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t field = i % group / 4;
        const int byte = from[i / group * kGroupBytes + i % 4];
        if (form == kEightBits) {
          to[i] = int8_t(byte - 128);
          continue;
        }
        const int code = form == kTwoBits ? byte >> 2 * field & 3 : (field < 4 ? byte % 84 : byte) / kPower[field] % 3;
        to[i] = int8_t(code - 1);
      }
    }
  });
}

}  // namespace
