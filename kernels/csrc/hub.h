// Hub bytes to form A, which every load does to every weight: forms.h would read each byte once for each of its fields.
#pragma once
#include <string.h>

#include "isa.h"
#include "threads.h"

namespace {

// Row r of the bytes holds rows r + j * hub_rows of the weight, in field j; 16 bytes of it are a lane of each. Returns
// whether all fields are codes: 3 is none.
inline bool prepack_hub(const uint8_t* hub, int64_t n, int64_t k, uint8_t* weight, int threads) {
  const int64_t hub_rows = ceil_div(n, 4), steps = ceil_div(k, 16), rows = ceil_div(n, kBlockRows) * kBlockRows;
  const auto place = [=](int64_t row) {
    return weight + row / kBlockRows * steps * kStepBytes + row % kBlockRows * 4;
  };
  bool failed = false;
  parallel(threads, [&](int thread, int count) {
    uint64_t threes = 0;
    for (int64_t r = share(hub_rows, thread, count); r < share(hub_rows, thread + 1, count); ++r) {
      const int fields = r + 3 * hub_rows < n ? 4 : int((n - r + hub_rows - 1) / hub_rows);
      uint8_t* to[4];
      for (int j = 0; j < fields; ++j) to[j] = place(r + j * hub_rows);
      for (int64_t i = 0; i < steps; ++i) {
        uint64_t low, high;  // words 0 and 1, 2 and 3
        const uint8_t* from = hub + r * k + 16 * i;
        uint8_t padded[16];
        if (i == steps - 1 && k % 16) {
          memset(padded, 0x55, 16);
          memcpy(padded, from, k % 16);
          from = padded;
        }
        memcpy(&low, from, 8);
        memcpy(&high, from + 8, 8);
        threes |= (low & low >> 1) | (high & high >> 1);
        for (int j = 0; j < fields; ++j) {
          constexpr uint64_t kField = 0x0303030303030303;
          const uint64_t pairs = (low >> 2 * j & kField) | (high >> 2 * j & kField) << 4;
          const uint32_t lane = uint32_t(pairs) | uint32_t(pairs >> 32) << 2;
          memcpy(to[j] + i * kStepBytes, &lane, 4);
        }
      }
    }
    if (thread == 0)
      for (int64_t row = n; row < rows; ++row)
        for (int64_t i = 0; i < steps; ++i) memset(place(row) + i * kStepBytes, 0x55, 4);
    if (threes & 0x5555555555555555) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  });
  return !failed;
}

}  // namespace
