// What one call of a block DCT op works on: sizes, strides and tables, checked. Shared by cpu.cpp and cuda.cu.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"

namespace fourfold::blockdct {

using torch::stable::Tensor;
using Freqs = std::optional<std::vector<int64_t>>;

enum class Layout { planar, blocks, interleaved };

// The image is read or written at  b*image_b + c*image_c + y*image_row + x*image_col,  coefficient (u, v) of block (i, j) at
// b*coef_b + c*coef_c + i*coef_i + j*coef_j + offset(u*N + v), all in elements.
struct Geometry {
  const char* op;
  Layout layout;
  int64_t N, B, C, H, W;
  int64_t rows, cols;          // blocks down and across: ceil(H / N), ceil(W / N)
  int64_t F;                   // frequencies kept
  std::vector<int16_t> slots;  // [N*N] place of frequency u*N + v in the output, or -1
  int64_t image_b = 0, image_c = 0, image_row = 0, image_col = 0;
  int64_t coef_b = 0, coef_c = 0, coef_i = 0, coef_j = 0;
  int64_t coef_f = 0;              // planar, blocks: offset(f) = slots[f] * coef_f
  int64_t coef_u = 0, coef_v = 0;  // interleaved: offset(u*N + v) = u * coef_u + v * coef_v

  bool empty() const { return B * C * rows * cols * F == 0; }
};

inline Layout parse_layout(const char* op, const std::string& layout) {
  if (layout == "planar") return Layout::planar;
  if (layout == "blocks") return Layout::blocks;
  require(layout == "interleaved", op, ": layout must be 'planar', 'blocks' or 'interleaved', got '", layout, "'");
  return Layout::interleaved;
}

// block_size, layout and freqs, the part that needs no tensor.
inline Geometry describe(const char* op, int64_t block_size, const std::string& layout, const Freqs& freqs) {
  Geometry g{};
  g.op = op;
  g.N = block_size;
  require(g.N == 2 || g.N == 4 || g.N == 8 || g.N == 16 || g.N == 32, op, ": block_size must be 2, 4, 8, 16 or 32, got ",
          block_size);
  g.layout = parse_layout(op, layout);
  require(!freqs || g.layout != Layout::interleaved, op, ": layout 'interleaved' keeps every frequency in place; drop freqs");
  const int64_t all = g.N * g.N;
  g.F = freqs ? static_cast<int64_t>(freqs->size()) : all;
  g.slots.resize(all);
  for (int64_t f = 0; f < all; ++f) g.slots[f] = freqs ? -1 : static_cast<int16_t>(f);
  for (int64_t slot = 0; freqs && slot < g.F; ++slot) {
    const int64_t f = (*freqs)[slot];
    require(0 <= f && f < all, op, ": freqs must lie in 0..", all - 1, " for block_size ", g.N, ", got ", f);
    require(g.slots[f] < 0, op, ": freqs must not repeat, got ", f, " twice");
    g.slots[f] = static_cast<int16_t>(slot);
  }
  return g;
}

// Takes the image's sizes from a given H and W.
inline void set_image_size(Geometry& g, int64_t B, int64_t C, int64_t H, int64_t W) {
  g.B = B, g.C = C, g.H = H, g.W = W;
  require(H > 0 && W > 0, g.op, ": the image must have H and W of at least 1, got (", B, ", ", C, ", ", H, ", ", W, ")");
  g.rows = (H + g.N - 1) / g.N;
  g.cols = (W + g.N - 1) / g.N;
}

inline void set_image(Geometry& g, const Tensor& image) {  // [B, C, H, W]
  g.image_b = image.stride(0), g.image_c = image.stride(1), g.image_row = image.stride(2), g.image_col = image.stride(3);
}

inline std::vector<int64_t> image_sizes(const Geometry& g) { return {g.B, g.C, g.H, g.W}; }

inline std::vector<int64_t> coef_sizes(const Geometry& g) {
  if (g.layout == Layout::planar) return {g.B, g.C * g.F, g.rows, g.cols};
  if (g.layout == Layout::blocks) return {g.B, g.C, g.rows, g.cols, g.F};
  return {g.B, g.C, g.rows * g.N, g.cols * g.N};
}

inline void set_coefs(Geometry& g, const Tensor& coefs) {  // shaped as coef_sizes
  g.coef_b = coefs.stride(0);
  if (g.layout == Layout::planar) {
    g.coef_f = coefs.stride(1), g.coef_c = g.F * g.coef_f, g.coef_i = coefs.stride(2), g.coef_j = coefs.stride(3);
  } else if (g.layout == Layout::blocks) {
    g.coef_c = coefs.stride(1), g.coef_i = coefs.stride(2), g.coef_j = coefs.stride(3), g.coef_f = coefs.stride(4);
  } else {
    g.coef_c = coefs.stride(1), g.coef_u = coefs.stride(2), g.coef_v = coefs.stride(3);
    g.coef_i = g.N * g.coef_u, g.coef_j = g.N * g.coef_v;
  }
}

// The geometry of a transform that reads the image x.
inline Geometry from_image(const char* op, const char* name, const Tensor& x, int64_t block_size, const std::string& layout,
                           const Freqs& freqs) {
  require_floating(op, name, x);
  require(x.dim() == 4, op, ": ", name, " must be [B, C, H, W], got ", shape_of(x));
  Geometry g = describe(op, block_size, layout, freqs);
  set_image_size(g, x.size(0), x.size(1), x.size(2), x.size(3));
  set_image(g, x);
  return g;
}

// The geometry of a transform that reads the coefficients y; size: (H, W) of the image, or none for whole blocks.
inline Geometry from_coefs(const char* op, const char* name, const Tensor& y, int64_t block_size, const std::string& layout,
                           const Freqs& freqs, const std::optional<std::vector<int64_t>>& size) {
  require_floating(op, name, y);
  Geometry g = describe(op, block_size, layout, freqs);
  const int64_t rank = g.layout == Layout::blocks ? 5 : 4;
  require(y.dim() == rank, op, ": ", name, " must be ", rank, "-D in layout '", layout, "', got ", shape_of(y));
  const int64_t step = g.layout == Layout::interleaved ? g.N : 1;
  const int64_t rows = y.size(2) / step, cols = y.size(3) / step;
  const int64_t C = g.layout == Layout::planar ? (g.F ? y.size(1) / g.F : 0) : y.size(1);
  require(!size || size->size() == 2, op, ": size must be (H, W)");
  set_image_size(g, y.size(0), C, size ? (*size)[0] : rows * g.N, size ? (*size)[1] : cols * g.N);
  require(g.rows == rows && g.cols == cols, op, ": size (", g.H, ", ", g.W, ") must round up to the ", rows, " x ", cols,
          " blocks of ", name);
  const std::vector<int64_t> expected = coef_sizes(g);
  for (int64_t d = 0; d < rank; ++d) {
    require(y.size(d) == expected[d], op, ": ", name, " of shape ", shape_of(y), " does not hold whole blocks of ", g.F,
            " frequencies in layout '", layout, "'");
  }
  set_coefs(g, y);
  return g;
}

// scale [C, F] or [1, F] in the accumulation type.
inline void require_scale(const Geometry& g, const std::optional<Tensor>& scale, const Tensor& x) {
  if (!scale) return;
  require_same_device(g.op, "scale", *scale, x);
  require(scale->scalar_type() == accumulate_type(x), g.op, ": scale must be float32 (float64 for a float64 input)");
  require(scale->dim() == 2 && (scale->size(0) == 1 || scale->size(0) == g.C) && scale->size(1) == g.F, g.op,
          ": scale must be [1, ", g.F, "] or [", g.C, ", ", g.F, "], got ", shape_of(*scale));
  require(scale->is_contiguous(), g.op, ": scale must be contiguous");
}

inline void require_out(const Geometry& g, const Tensor& out, const Tensor& x, const std::vector<int64_t>& sizes) {
  require_same_device(g.op, "out", out, x);
  require(out.scalar_type() == x.scalar_type(), g.op, ": out must have the input's dtype");
  bool same = out.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == sizes[d];
  require(same, g.op, ": out has shape ", shape_of(out), ", not that of the result");
}

// Contiguous in channels_last order and in no other: the format a result then takes over, as convolutions do.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) == 1) continue;
    if (x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// An uninitialised result of make(). aten's own words don't cross the stable ABI, so running out of memory is said here.
template <typename Make>
Tensor allocated(const Tensor& like, const std::vector<int64_t>& sizes, const char* op, const Make& make) {
  try {
    return make();
  } catch (const std::exception&) {
    std::ostringstream text;
    text << op << ": out of memory: cannot allocate a result of shape (";
    for (size_t d = 0; d < sizes.size(); ++d) text << (d ? ", " : "") << sizes[d];
    text << ") on the " << (like.is_cuda() ? "GPU" : "CPU");
    throw std::runtime_error(text.str());
  }
}

inline Tensor new_contiguous(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, const char* op) {
  return allocated(like, sizes, op, [&] { return torch::stable::new_empty(like, sizes, dtype); });
}

// 4-D results follow the memory format of `like`.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype, const char* op) {
  if (sizes.size() != 4 || !is_channels_last(like)) return new_contiguous(like, sizes, dtype, op);
  return allocated(like, sizes, op, [&] {
    return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                                torch::headeronly::MemoryFormat::ChannelsLast);
  });
}

inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes, const char* op) {
  return new_result(like, sizes, like.scalar_type(), op);
}

}  // namespace fourfold::blockdct
