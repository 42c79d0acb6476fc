// A product of two packed blocks in registers, for the cases where no library can read the data in place or widen its output.
// Included by kernels.cpp files only; see simd.h for what such a file may do.
#pragma once

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {

// A block: kTile columns beside each other, step by step. T is float, or BFloat16Pair, where a step is two rows.
constexpr int kTile = 16;

// Rows of the result that are computed at a time: with the columns they fill as many registers as hide the latency of an
// addition and leave room for the factors.
constexpr int kTileVectors = kTile / kLanes<float>;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 16 / kTileVectors;
#else
constexpr int kTileRows = 8 / kTileVectors;
#endif

FOURFOLD_INLINE Vec<float> load_factor(const float* p) { return *(const Loose<float>*)p; }
FOURFOLD_INLINE Vec<float> load_factor(const BFloat16Pair* p) { return *(const Loose<float>*)p; }
FOURFOLD_INLINE Vec<float> add_product(Vec<float> sum, float a, const Vec<float>& b) { return sum + a * b; }
FOURFOLD_INLINE Vec<float> add_product(Vec<float> sum, BFloat16Pair a, const Vec<float>& b) { return dot_pairs(sum, a, b); }

// visit(row, sums) for each row of a^T b, summed in float over all steps.
template <typename T, typename Visit>
FOURFOLD_INLINE void tile_product(const T* a, const T* b, int64_t steps, Visit visit) {
  for (int first = 0; first < kTile; first += kTileRows) {
    Vec<float> sums[kTileRows][kTileVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = Vec<float>{};
    }
    for (int64_t step = 0; step < steps; ++step) {
      Vec<float> factors[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) factors[v] = load_factor(b + step * kTile + v * kLanes<float>);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          sums[r][v] = add_product(sums[r][v], a[step * kTile + first + r], factors[v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) visit(first + r, sums[r]);
  }
}

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
