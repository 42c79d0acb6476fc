// The kernels of masks and masked weights as cpu.cpp sees them: plain pointers and numbers, one table of functions per
// instruction set. Rows of bits are padded to whole 64-bit words with zeros, and so may be read to their end.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::maskmm {

enum Slope { kSigmoid, kSign, kOne };

// out[i] = weight[i] * factor where the bit is set, times -1 where the bit in negative is, which may be null; else 0.
using Apply = void (*)(const void* weight, const uint8_t* bits, const uint8_t* negative, double factor, void* out, int64_t k);

// bits = (scores[i] >= threshold), or with kBelow (scores[i] < threshold). Whether there is a NaN.
using Compare = bool (*)(const void* scores, double threshold, uint8_t* bits, int64_t k);

// Scores ranked by keys: unsigned integers in the order of the scores, or of their magnitudes; -0 and +0 have one key. Keys
// of 16-bit and float32 scores have 32 bits, those of float64 scores 64.
struct Ranking {
  bool abs;
  int shift, bits;  // a digit: this many bits of the key, above so many lower ones
  uint64_t above;   // histogram: only keys that have these bits above the digit; all keys, where it is the highest one
  bool highest;
};
constexpr int kDigitBits = 11, kTables = 4;

// Adds to counts [kTables][2^kDigitBits], whose tables are to be added up: scores that follow each other are counted in
// different ones, because adding to a number just written is slow. Whether there is a NaN.
using Histogram = bool (*)(const void* scores, int64_t n, const Ranking& ranking, uint32_t* counts);
// How many keys are `key`.
using CountEqual = int64_t (*)(const void* scores, int64_t k, bool abs, uint64_t key);
// bits = keys above `key`, and the first `ties` of those equal to it.
using Select = void (*)(const void* scores, int64_t k, bool abs, uint64_t key, int64_t ties, uint8_t* bits);

// Arithmetic on rows of the accumulation type.
template <typename T>
struct Gradients {
  // out = grad * weight * slope(score) * factor; returns the sum of grad * weight where the bit is set.
  T (*of_scores)(const T* grad, const T* weight, const T* scores, const uint8_t* bits, Slope slope, T factor, T* out,
                 int64_t k);
  // out += slope(score) * number
  void (*add_slope)(const T* scores, Slope slope, T number, T* out, int64_t k);
};

struct Kernels {
  void (*pack)(const uint8_t* mask, uint8_t* bits, int64_t k);
  void (*unpack)(const uint8_t* bits, uint8_t* mask, int64_t k);
  int64_t (*count)(const uint8_t* bits, int64_t k);
  Apply apply[kElements][kElements];  // by the type of weight and of out; null between float64 and others
  Compare at_least[kElements], below[kElements];
  Histogram histogram[kElements];
  CountEqual count_equal[kElements];
  Select select[kElements];
  Gradients<float> floats;
  Gradients<double> doubles;
  void (*widen[kFloat])(const void* in, float* out, int64_t k);  // 16-bit types to float and back
  void (*narrow[kFloat])(const float* in, void* out, int64_t k);
};

}  // namespace fourfold::maskmm

// Compiled apart, without fused multiplication and addition.
namespace fourfold::sampling {

// bits of the scores whose flat indices are first, first + 1, …, as bernoulli_mask says. Whether there is a NaN.
using Bernoulli = bool (*)(const void* scores, uint64_t first, int64_t k, uint64_t seed, uint64_t offset, uint8_t* bits);

struct Kernels {
  Bernoulli bernoulli[kElements];
};

}  // namespace fourfold::sampling
