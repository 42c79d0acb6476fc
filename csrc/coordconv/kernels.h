// The CoordConv kernels as cpu.cpp sees them: plain pointers and numbers, one table of functions per ISA tier. T is the map's
// type: double beside double, else float.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::coordconv {

enum Activation { kNone, kRelu, kSilu, kGelu, kActivations };

// `rows` rows of `width` elements, one after the other: y += along, and += across, which is one row for all; then the
// activation of what y's type holds, into y, or into activated where that is not null. across may be null.
using AddMap = void (*)(void* y, const void* along, const void* across, void* activated, int64_t rows, int64_t width);

// n elements of each sample, which lie `step` apart: total += grad, sample after sample; where relu_output is not null, grad
// counts as 0 where relu_output <= 0, and kept gets what counts.
using AddGrads = void (*)(const void* grad, const void* relu_output, void* kept, void* total, int64_t n, int64_t samples,
                          int64_t step);

// The pieces that maps are built from and taken apart with; strides in elements.
template <typename T>
struct Pieces {
  void (*add)(T* out, const T* in, int64_t n);                     // out += in
  void (*add_multiple)(T* out, const T* in, T factor, int64_t n);  // out += factor * in
  void (*add_number)(T* out, const T* in, T number, int64_t n);    // out = in + number
  T (*sum)(const T* in, int64_t n);
  T (*dot)(const T* a, const T* b, int64_t n);
  // out[r * out_step + i] += in[r * in_step + i]
  void (*add_rows)(T* out, int64_t out_step, const T* in, int64_t in_step, int64_t rows, int64_t width);
  // out[i] += sum over r of in[r * in_step + i]
  void (*sum_rows)(T* out, const T* in, int64_t in_step, int64_t rows, int64_t width);
};

struct Kernels {
  AddMap add_map[kElements][kActivations];
  AddGrads add_grads[kElements];
  Pieces<float> floats;
  Pieces<double> doubles;
};

}  // namespace fourfold::coordconv
