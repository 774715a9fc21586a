// Which experts a token goes to, and with what weights.
#pragma once
#include "attention.h"

namespace {

// The next of n that is not taken and has the greatest key, the first of equals.
INLINE int64_t best(const float* key, const uint8_t* taken, int64_t n) {
  int64_t found = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!taken[i] && (found < 0 || key[i] > key[found])) found = i;
  return found;
}

// Leaves open the groups whose few greatest keys have the greatest sums.
void close_groups(const Mixture& mix, const float* key, float* sums, uint8_t* taken) {
  const int64_t size = mix.experts / mix.groups;
  uint8_t* open = taken + mix.experts;  // of each group
  memset(taken, 0, mix.experts + mix.groups);
  for (int64_t g = 0; g < mix.groups; ++g) {
    sums[g] = 0;
    for (int64_t i = 0, at; i < smaller(mix.group_best, size); ++i) {
      taken[g * size + (at = best(key + g * size, taken + g * size, size))] = 1;
      sums[g] += key[g * size + at];
    }
  }
  for (int64_t i = 0; i < mix.groups_chosen; ++i) open[best(sums, open, mix.groups)] = 1;
  for (int64_t e = 0; e < mix.experts; ++e) taken[e] = !open[e / size];
}

int64_t choice_bytes(const Mixture& mix) { return (5 * (mix.experts + mix.groups) + 7) / 8 * 8; }

// scores [experts] of one token, which are spoilt, to its experts [chosen], greatest first, and their weights. scratch:
// choice_bytes().
void choose_experts(const Mixture& mix, float* scores, int32_t* chosen, float* weights, void* scratch) {
  auto* key = static_cast<float*>(scratch);
  float* sums = key + mix.experts;
  auto* taken = reinterpret_cast<uint8_t*>(sums + mix.groups);
  if (mix.score == kSoftmax) softmax(scores, mix.experts);
  if (mix.score == kSigmoids)
    for (int64_t e = 0; e < mix.experts; ++e) scores[e] = sigmoid(scores[e]);
  for (int64_t e = 0; e < mix.experts; ++e) key[e] = mix.correction ? scores[e] + mix.correction[e] : scores[e];
  if (mix.groups_chosen < mix.groups) close_groups(mix, key, sums, taken);
  else memset(taken, 0, mix.experts);
  float sum = 0;
  for (int64_t i = 0; i < mix.chosen; ++i) {
    chosen[i] = int32_t(best(key, taken, mix.experts));
    taken[chosen[i]] = 1;
    sum += weights[i] = scores[chosen[i]];
  }
  if (mix.score == kSoftmaxOfChosen) softmax(weights, mix.chosen);
  sum += mix.added;
  if (mix.normalized)
    for (int64_t i = 0; i < mix.chosen; ++i) weights[i] /= sum > mix.least ? sum : mix.least;
  for (int64_t i = 0; i < mix.chosen; ++i) weights[i] *= mix.factors ? mix.factor * mix.factors[chosen[i]] : mix.factor;
}

}  // namespace
