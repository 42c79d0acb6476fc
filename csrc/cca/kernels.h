// The kernels of representation similarity as cpu.cpp sees them: plain pointers and numbers, one table of functions per ISA
// tier. Steps are in elements.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::cca {

// `count` samples of one image, `channels` features each.
struct Samples {
  const void* data;
  int64_t channels, count;
  int64_t channel_step, sample_step;
};

// Where packed samples go: rows of the panel, and their squared norms.
struct Rows {
  void* panel;
  int64_t row_step;
  void* norms;
  int64_t norm_step;
};

enum PanelType { kFloatPanel, kDoublePanel, kPanelTypes };

// Channels of a block: what the factors of a product are packed in, 16 channels beside each other, sample by sample, or, where
// the processor multiplies them so, pair of samples by pair. The result comes in tiles of a block by a block.
constexpr int64_t kBlock = 16;

// A packed block is steps of this many bytes, each of samples_per_step samples.
constexpr int64_t step_bytes(Element element) { return kBlock * (element == kDouble ? 8 : 4); }

struct Kernels {
  // Row k = sample k minus pivot; sums[C + 1] += the column sums of what was written and the sum of the norms.
  void (*pack[kElements][kPanelTypes])(const Samples& x, const double* pivot, const Rows& to, double* sums);

  // total += part
  void (*add_wide)(double* total, const float* part, int64_t n);

  // How many of n elements, `step` apart, are NaN or infinite.
  int64_t (*count_nonfinite[kElements])(const void* x, int64_t n, int64_t step);

  // Samples that a step of a block holds, 1 or 2; the last pair of an odd number is filled up with zeros.
  int samples_per_step[kElements];
  // At most kBlock channels into a block; those that are missing are zero.
  void (*pack_block[kElements])(const Samples& x, void* block);
  // total [rows, columns] += the sum over the steps of a tile, which is computed in float32, or in float64 of kDouble.
  void (*add_tile[kElements])(const void* a, const void* b, int64_t steps, double* total, int64_t row_step, int64_t rows,
                              int64_t columns);
};

}  // namespace fourfold::cca
