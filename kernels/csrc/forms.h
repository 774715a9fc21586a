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

// One lane of a form from the bytes of `here` codes, or of a whole step if there are as many; field() leaves code + 1 in
// the low two bits of each byte of a word, and turns `padding` into that of code 0, or of -1 for 1 bit, which has no 0.
// What the form does not hold is noted: 3, which is no code + 1, and 1 in a form of 1 bit.
template <class Field>
uint32_t pack_lane(const uint8_t* from, int64_t here, int32_t form, int padding, const Field& field, bool* strange) {
  uint32_t t[8] = {};
  if (form == kEightBits) {
    copy_padded<4>(t, from, here, 0);
    return t[0] ^ 0x80808080;
  }
  if (form == kFourBits) {
    uint32_t pair[2];
    copy_padded<8>(pair, from, here, 0);
    for (uint32_t& word : pair) word = (word & 0x0f0f0f0f) ^ 0x08080808;  // from two's complement to code + 8
    return pair[0] | pair[1] << 4;
  }
  if (is_one_bit(form)) copy_padded<32>(t, from, here, padding);
  else if (form == kBase3) copy_padded<20>(t, from, here, padding);
  else copy_padded<16>(t, from, here, padding);
  uint32_t any = 0;
  for (uint32_t& word : t) {
    word = field(word) & 0x03030303;
    any |= is_one_bit(form) ? word : word & word >> 1;
  }
  *strange |= (any & 0x01010101) != 0;
  if (form == kBase3) return t[0] + 3 * t[1] + 9 * t[2] + 27 * t[3] + 84 * t[4];
  if (form == kTwoBits) return t[0] | t[1] << 2 | t[2] << 4 | t[3] << 6;
  uint32_t lane = 0;
  for (int j = 0; j < 8; ++j) lane |= (t[j] >> 1) << j;
  return lane;
}

// The lane of step i of one row of stored 4-bit codes: a block of 32 features is low nibbles first, then high ones.
inline uint32_t pack_nibbles(const uint8_t* row, int64_t i) {
  uint32_t t[2];
  memcpy(t, row + i / 4 * 16 + i % 2 * 8, 8);
  for (uint32_t& word : t) word = word >> (i % 4 / 2 * 4) & 0x0f0f0f0f;
  return t[0] | t[1] << 4;
}

// Where row r of a block stands among the 32 bytes of a look-up: bitnet_cpu.h says why.
constexpr int64_t table_place(int64_t r) { return r / 8 * 4 + r % 4 + r / 4 % 2 * 16; }

// Returns whether it worked: the form may not hold these codes.
bool prepack(const void* source, bool from_codes, int64_t n, int64_t k, uint8_t* weight, int32_t form, int threads) {
  const int64_t hub_rows = ceil_div(n, 4), blocks = ceil_div(n, kBlockRows);
  const int64_t step = step_features(form), steps = ceil_div(k, step);
  const int code_padding = is_one_bit(form) ? 0xff : 0, hub_padding = is_one_bit(form) ? 0 : 0x55;
  from_codes |= form == kEightBits;
  bool failed = false;
  parallel(threads, [&](int thread, int count) {
    bool strange = false;
    for (int64_t b = share(blocks, thread, count); b < share(blocks, thread + 1, count); ++b)
      for (int64_t r = 0; r < kBlockRows; ++r) {
        const int64_t row = b * kBlockRows + r, filled = row < n ? k : 0;
        const auto* from = static_cast<const uint8_t*>(source);
        const bool nibbles = form == kFourBits && !from_codes && row < n;
        if (nibbles) from += row * ceil_div(k, 32) * 16;
        else if (row < n) from += (from_codes ? row : row % hub_rows) * k;
        const int shift = row < n ? int(row / hub_rows * 2) : 0;
        uint8_t* to = weight + b * steps * kStepBytes;
        const auto of_codes = [](uint32_t t) { return (t & 0x03030303) + 0x01010101; };  // -1 is 3 in two bits
        const auto of_hub_bytes = [=](uint32_t t) { return t >> shift; };
        for (int64_t i = 0; i < steps; ++i, to += kStepBytes) {
          const int64_t here = filled - i * step;
          const uint32_t lane = nibbles ? pack_nibbles(from, i)
                                : from_codes
                                    ? pack_lane(from + i * step, here, form, code_padding, of_codes, &strange)
                                    : pack_lane(from + i * step, here, form, hub_padding, of_hub_bytes, &strange);
          if (form == kOneBitTables)
            for (int byte = 0; byte < 4; ++byte) to[kBlockRows * byte + table_place(r)] = uint8_t(lane >> 8 * byte);
          else memcpy(to + 4 * r, &lane, 4);
        }
      }
    if (strange) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  });
  return !failed;
}

void unprepack(const uint8_t* weight, int64_t n, int64_t k, int8_t* codes, int32_t form, int threads) {
  static constexpr int kPower[] = {1, 3, 9, 27, 84};
  const int64_t step = step_features(form), steps = ceil_div(k, step);
  parallel(threads, [&](int thread, int count) {
    for (int64_t row = share(n, thread, count); row < share(n, thread + 1, count); ++row) {
      const bool tables = form == kOneBitTables;
      const int64_t r = row % kBlockRows, apart = tables ? kBlockRows : 1;  // bytes of a lane
      const uint8_t* from = weight + row / kBlockRows * steps * kStepBytes + (tables ? table_place(r) : 4 * r);
      int8_t* to = codes + row * k;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t field = i % step / 4;
        const int byte = from[i / step * kStepBytes + i % 4 * apart];
        switch (form) {
          case kEightBits: to[i] = int8_t(byte - 128); break;
          case kFourBits: to[i] = int8_t((byte >> 4 * field & 15) - 8); break;
          case kOneBit:
          case kOneBitTables: to[i] = int8_t((byte >> field & 1) * 2 - 1); break;
          case kTwoBits: to[i] = int8_t((byte >> 2 * field & 3) - 1); break;
          default: to[i] = int8_t((field < 4 ? byte % 84 : byte) / kPower[field] % 3 - 1);
        }
      }
    }
  });
}

}  // namespace
