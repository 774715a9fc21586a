// Codes chosen one after the other within a block of columns: convert/calibration/gptq.py, operation by operation.
#pragma once
#include "numbers.h"

namespace {

INLINE float nearest_code(float v, bool binary) {
  if (binary) return v > 0 ? 1.f : -1.f;
  return float(v > 0.5f) - float(v < -0.5f);
}

// Rows [first, last).
void choose(const Columns& c, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    float *part = c.part + row * c.part_stride, *codes = c.codes + row * c.codes_stride, *moved = c.moved + row * c.count;
    const float* scale = c.scale + row * c.scale_row;
    for (int64_t j = 0; j < c.count; ++j) {
      const float* corner = c.corner + j * c.count;
      const float own = scale[j * c.scale_column];
      if (c.descend) {
        const float old = codes[j];
        codes[j] = nearest_code(old + part[j] / (corner[j] * own), c.binary);
        moved[j] = (codes[j] - old) * own;
      } else {
        codes[j] = nearest_code(part[j] / own, c.binary);
        moved[j] = (part[j] - codes[j] * own) / corner[j];
      }
      if (const float by = moved[j]; by != 0)
        for (int64_t i = j; i < c.count; ++i) part[i] -= corner[i] * by;
    }
  }
}

}  // namespace
