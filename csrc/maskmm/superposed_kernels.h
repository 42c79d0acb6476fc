// The kernels of superposed masks as superposed_cpu.cpp sees them. T is double beside double, else float.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::superposed {

// Words of a stretch at most: the sums of its columns stay in the first cache.
constexpr int64_t kStretchWords = 64;

// The same stretch of every mask: `words` words of 64 bits; those of mask t begin at bits + t * stride.
struct Stretch {
  const uint8_t* bits;
  int64_t stride;  // bytes
  int64_t tasks, words;
};

// Rows of samples that are treated at a time.
constexpr int kTeam = 4;

// 1, 2 or kTeam rows, each with a mask of its own or all with that of the first.
struct Team {
  int count;
  bool shared;
  int64_t rows[kTeam];  // of x and y
  const uint8_t* bits[kTeam];
};

// A part of the weight: `rows` rows of `columns` elements, each `k` after the one before; where its bits lie in a mask.
struct Part {
  const void* weight;
  int64_t rows, columns, k;
  int64_t first_byte, row_bytes;
};

// Rows [begin, end) wear the mask at bits.
struct Run {
  int64_t begin, end;
  const uint8_t* bits;
};

struct Kernels {
  // By T. sums[i] += factors[t] for every mask t whose bit i is set; 64 * words sums.
  void (*add_masks[2])(const Stretch& masks, const void* factors, void* sums);
  // totals[t] += the sum of the values [64 * words] whose bit is set in mask t.
  void (*sum_masks[2])(const Stretch& masks, const void* values, double* totals);

  // out = weight * factors, factors in T.
  void (*scale[kElements])(const void* weight, const void* factors, void* out, int64_t n);
  // out = a * b, out in T.
  void (*multiply[kElements])(const void* a, const void* b, void* out, int64_t n);
  // To T and, rounded once, back.
  void (*widen[kElements])(const void* in, void* out, int64_t n);
  void (*narrow[kElements])(const void* in, void* out, int64_t n);

  // y[row, n] = sum over columns of x[row, k] * (weight[n, k] where the row's bit is set, else 0) + bias[n], for the team's
  // rows and the part's, all columns; x [.., k], y [.., n] with pitch elements a row. bias may be null.
  void (*forward[kElements])(const Team& team, const Part& part, const void* x, const void* bias, void* y, int64_t pitch);
  // sums[i, k] += sum over the part's rows of grad[row i, n] * (weight[n, k] where the bit is set, else 0); grad [.., pitch]
  // and sums [team.count, sum_pitch] in T.
  void (*backward[kElements])(const Team& team, const Part& part, const void* grad, int64_t pitch, void* sums,
                              int64_t sum_pitch);
  // By T. sums[n, k] += sum over the runs' rows of grad[n, row] * x[row, k] where the bit is set; sums [part.rows, part.k], x
  // [.., part.k], grad [.., pitch]; part.weight is not looked at.
  void (*outer[2])(const Run* runs, int64_t run_count, const Part& part, const void* grad, int64_t pitch, const void* x,
                   void* sums);
};

}  // namespace fourfold::superposed
