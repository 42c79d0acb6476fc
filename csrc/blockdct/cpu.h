// Geometry as the CPU kernels take it. Shared by cpu.cpp and rgb_cpu.cpp.
#pragma once

#include <vector>

#include "blockdct/geometry.h"
#include "blockdct/kernels.h"

namespace fourfold::blockdct {

// The kernels know three ways for a plane's coefficients to lie; anything else goes through a contiguous copy.
inline bool has_form(const Geometry& g) {
  if (g.layout == Layout::interleaved) return true;
  const bool plane = (g.coef_j == 1 || g.cols == 1) && (g.coef_i == g.cols || g.rows == 1);
  return (g.layout == Layout::planar && plane) || g.coef_f == 1 || g.F == 1;
}

inline Form form_of(const Geometry& g) {
  if (g.layout == Layout::interleaved) return Form::pixels;
  const bool plane = (g.coef_j == 1 || g.cols == 1) && (g.coef_i == g.cols || g.rows == 1);
  return g.layout == Layout::planar && plane ? Form::plane : Form::block;
}

// Tensors larger than this exceed the caches; results then go past them if the caller gave warm memory (on fresh pages that
// would cost twice).
constexpr int64_t kLargeBytes = int64_t{16} << 20;

inline Plane plane_of(const Geometry& g, Edge edge, double shift, int64_t bytes, bool warm) {
  Plane p{};
  p.height = g.H, p.width = g.W, p.rows = g.rows, p.cols = g.cols;
  p.image_row = g.image_row, p.image_col = g.image_col;
  p.coef_f = g.coef_f, p.coef_i = g.coef_i, p.coef_j = g.coef_j, p.coef_u = g.coef_u, p.coef_v = g.coef_v;
  p.form = form_of(g);
  p.edge = edge;
  p.kept = g.F;
  p.slots = g.slots.data();
  p.in_order = g.F == g.N * g.N;
  for (int64_t f = 0; p.in_order && f < g.F; ++f) p.in_order = g.slots[f] == f;
  p.large = bytes > kLargeBytes;
  p.stream = p.large && warm;
  p.shift = shift;
  return p;
}

// scale [C or 1, F] spread to [C or 1][N*N] by row-major frequency; reciprocal for the inverse.
template <typename T>
std::vector<T> spread(const Geometry& g, const Tensor& scale, bool reciprocal) {
  const int64_t channels = scale.size(0), all = g.N * g.N;
  const T* values = static_cast<const T*>(scale.const_data_ptr());
  std::vector<T> result(channels * all, T{0});
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t f = 0; f < all; ++f) {
      if (g.slots[f] < 0) continue;
      const T value = values[c * g.F + g.slots[f]];
      result[c * all + f] = reciprocal ? T{1} / value : value;
    }
  }
  return result;
}

}  // namespace fourfold::blockdct
