// The block DCT ops on CPU: checks, allocation, threads. The arithmetic is in kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "blockdct/cpu.h"
#include "blockdct/geometry.h"
#include "blockdct/kernels.h"
#include "common/isa.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(blockdct)

namespace blockdct {
namespace {

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(blockdct);
  return best;
}

int size_index(int64_t n) { return __builtin_ctzll(n) - 1; }

// Runs transform(image, coefs, scale, first block, last block) over all planes in parallel, in tiles. Tiles don't depend on
// the number of threads, so neither do the results.
template <typename Transform>
void for_all_tiles(const Geometry& g, const Tensor& like, int64_t tile_blocks, const std::optional<Tensor>& scale,
                   bool reciprocal, const Transform& transform) {
  const bool is_double = like.scalar_type() == ScalarType::Double;
  std::vector<float> floats;
  std::vector<double> doubles;
  if (scale && is_double) doubles = spread<double>(g, *scale, reciprocal);
  if (scale && !is_double) floats = spread<float>(g, *scale, reciprocal);
  const int64_t scale_channel = scale && scale->size(0) > 1 ? g.N * g.N : 0;
  const int64_t tiles = (g.rows * g.cols + tile_blocks - 1) / tile_blocks;  // of a plane
  const int64_t pixels_of_tile = tile_blocks * g.N * g.N;
  const int64_t grain = 32768 / pixels_of_tile + 1;
  torch::stable::parallel_for(0, g.B * g.C * tiles, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t plane = begin / tiles, first = begin % tiles;
      const int64_t last = first + (end - begin) < tiles ? first + (end - begin) : tiles;
      const int64_t b = plane / g.C, c = plane % g.C;
      const void* factors = nullptr;
      if (!doubles.empty()) factors = doubles.data() + c * scale_channel;
      if (!floats.empty()) factors = floats.data() + c * scale_channel;
      const int64_t block = first * tile_blocks, end_block = last * tile_blocks;
      transform(b * g.image_b + c * g.image_c, b * g.coef_b + c * g.coef_c, factors, block,
                end_block < g.rows * g.cols ? end_block : g.rows * g.cols);
      begin += last - first;
    }
  });
}

// coefs <- transform of the image x, both as g describes.
void run_forward(const Geometry& g, const Tensor& x, const Tensor& coefs, const std::optional<Tensor>& scale, double shift,
                 Edge edge, bool reciprocal, bool warm) {
  if (g.empty()) return;
  const Element element = element_of(x);
  const int64_t bytes = x.element_size();
  const Plane p = plane_of(g, edge, shift, coefs.numel() * bytes, warm);
  const Forward forward = kernels().forward[element][size_index(g.N)];
  const char* image = static_cast<const char*>(x.const_data_ptr());
  char* out = static_cast<char*>(coefs.mutable_data_ptr());
  for_all_tiles(g, x, kernels().tile_blocks[element][size_index(g.N)], scale, reciprocal,
                [&](int64_t from, int64_t to, const void* factors, int64_t first, int64_t last) {
                  forward(p, image + from * bytes, out + to * bytes, factors, first, last);
                });
}

// image <- inverse transform of the coefficients y.
void run_inverse(const Geometry& g, const Tensor& y, const Tensor& image, const std::optional<Tensor>& scale, double shift,
                 Edge edge, bool reciprocal, bool warm) {
  if (g.B * g.C * g.H * g.W == 0) return;
  const Element element = element_of(y);
  const int64_t bytes = y.element_size();
  const Plane p = plane_of(g, edge, shift, image.numel() * bytes, warm);
  const Inverse inverse = kernels().inverse[element][size_index(g.N)];
  const char* coefs = static_cast<const char*>(y.const_data_ptr());
  char* out = static_cast<char*>(image.mutable_data_ptr());
  for_all_tiles(g, y, kernels().tile_blocks[element][size_index(g.N)], scale, reciprocal,
                [&](int64_t to, int64_t from, const void* factors, int64_t first, int64_t last) {
                  inverse(p, coefs + from * bytes, out + to * bytes, factors, first, last);
                });
}

using Size = std::vector<int64_t>;

Tensor forward_new(Geometry& g, const Tensor& x, const std::optional<Tensor>& scale, double shift, Edge edge, bool reciprocal) {
  require_scale(g, scale, x);
  Tensor coefs = new_result(x, coef_sizes(g), g.op);
  set_coefs(g, coefs);
  run_forward(g, x, coefs, scale, shift, edge, reciprocal, /*warm=*/false);
  return coefs;
}

Tensor inverse_new(Geometry& g, const Tensor& y, const std::optional<Tensor>& scale, double shift, Edge edge, bool reciprocal) {
  require_scale(g, scale, y);
  const Tensor coefs = has_form(g) ? y : torch::stable::contiguous(y);
  set_coefs(g, coefs);
  Tensor image = new_result(y, image_sizes(g), g.op);
  set_image(g, image);
  run_inverse(g, coefs, image, scale, shift, edge, reciprocal, /*warm=*/false);
  return image;
}

Tensor block_dct(const Tensor& x, int64_t block_size, std::string layout, Freqs freqs, std::optional<Tensor> scale,
                 double shift) {
  Geometry g = from_image("block_dct", "x", x, block_size, layout, freqs);
  return forward_new(g, x, scale, shift, Edge::replicate, false);
}

void block_dct_out(const Tensor& x, int64_t block_size, std::string layout, Freqs freqs, std::optional<Tensor> scale,
                   double shift, Tensor out) {
  Geometry g = from_image("block_dct", "x", x, block_size, layout, freqs);
  require_scale(g, scale, x);
  require_out(g, out, x, coef_sizes(g));
  set_coefs(g, out);
  if (!has_form(g)) {
    torch::stable::copy_(out, forward_new(g, x, scale, shift, Edge::replicate, false));
    return;
  }
  run_forward(g, x, out, scale, shift, Edge::replicate, false, /*warm=*/true);
}

Tensor block_idct(const Tensor& y, int64_t block_size, std::string layout, Freqs freqs, std::optional<Tensor> scale,
                  double shift, std::optional<Size> size) {
  Geometry g = from_coefs("block_idct", "y", y, block_size, layout, freqs, size);
  return inverse_new(g, y, scale, shift, Edge::crop, true);
}

void block_idct_out(const Tensor& y, int64_t block_size, std::string layout, Freqs freqs, std::optional<Tensor> scale,
                    double shift, std::optional<Size> size, Tensor out) {
  Geometry g = from_coefs("block_idct", "y", y, block_size, layout, freqs, size);
  require_scale(g, scale, y);
  require_out(g, out, y, image_sizes(g));
  const Tensor coefs = has_form(g) ? y : torch::stable::contiguous(y);
  set_coefs(g, coefs);
  set_image(g, out);
  run_inverse(g, coefs, out, scale, shift, Edge::crop, true, /*warm=*/true);
}

Tensor block_dct_backward(const Tensor& grad, int64_t block_size, std::string layout, Freqs freqs, std::optional<Tensor> scale,
                          Size size) {
  Geometry g = from_coefs("_block_dct_backward", "grad", grad, block_size, layout, freqs, size);
  return inverse_new(g, grad, scale, 0.0, Edge::fold, false);
}

Tensor block_idct_backward(const Tensor& grad, int64_t block_size, std::string layout, Freqs freqs,
                           std::optional<Tensor> scale) {
  Geometry g = from_image("_block_idct_backward", "grad", grad, block_size, layout, freqs);
  return forward_new(g, grad, scale, 0.0, Edge::zeros, true);
}

// ---- dct_normalize -------------------------------------------------------------------------------------------------------

// [F] by slot spread to [64] by row-major frequency.
template <typename T>
std::vector<T> by_frequency(const Geometry& g, const std::optional<Tensor>& values, T missing) {
  std::vector<T> result(64, missing);
  for (int64_t f = 0; values && f < 64; ++f) {
    if (g.slots[f] >= 0) result[f] = static_cast<const T*>(values->const_data_ptr())[g.slots[f]];
  }
  return result;
}

template <typename T>
void run_normalize(const Geometry& g, const Tensor& coefs, const Tensor& qtable, const std::optional<Tensor>& mean,
                   const std::optional<Tensor>& std, const Tensor& out, int64_t planes, int64_t blocks) {
  const std::vector<T> means = by_frequency<T>(g, mean, T{0});
  std::vector<T> factors = by_frequency<T>(g, std, T{1});
  for (T& factor : factors) factor = 1 / factor;
  const NormalizeBlocks normalize = kernels().normalize[element_of(out)];
  const int16_t* from = static_cast<const int16_t*>(coefs.const_data_ptr());
  const T* tables = static_cast<const T*>(qtable.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t plane_bytes = g.F * blocks * out.element_size(), planes_per_table = planes / qtable.size(0);
  constexpr int64_t kChunk = 64;  // blocks; a multiple of every vector, so that chunks don't split one
  const int64_t chunks = (blocks + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, planes * chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t plane = chunk / chunks, first = chunk % chunks * kChunk;
      const int64_t last = first + kChunk < blocks ? first + kChunk : blocks;
      const Normalize n{tables + plane / planes_per_table * 64,
                        means.data(),
                        factors.data(),
                        g.slots.data(),
                        g.F,
                        g.layout == Layout::planar,
                        blocks};
      normalize(n, from + plane * blocks * 64, to + plane * plane_bytes, first, last);
    }
  });
}

// coefs [.., h, w, 64]; qtable [G, 64], one table for each 1/G of the leading dimensions; mean, std [F].
Tensor dct_normalize(const Tensor& coefs, const Tensor& qtable, std::optional<Tensor> mean, std::optional<Tensor> std,
                     Freqs freqs, std::string layout, ScalarType dtype) {
  const char* op = "dct_normalize";
  Geometry g = describe(op, 8, layout, freqs);
  require(g.layout != Layout::interleaved, op, ": layout must be 'planar' or 'blocks', got 'interleaved'");
  require(coefs.scalar_type() == ScalarType::Short, op, ": coefs must be int16 quantised coefficients");
  require(coefs.dim() >= 3 && coefs.size(coefs.dim() - 1) == 64, op, ": coefs must be [.., h, w, 64], got ", shape_of(coefs));
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      op, ": dtype must be float16, bfloat16, float32 or float64");
  const ScalarType work = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t rank = coefs.dim(), blocks = coefs.size(rank - 3) * coefs.size(rank - 2);
  int64_t planes = 1;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < rank - 3; ++d) {
    planes *= coefs.size(d);
    sizes.push_back(coefs.size(d));
  }
  if (g.layout == Layout::planar) sizes.push_back(g.F);
  sizes.push_back(coefs.size(rank - 3));
  sizes.push_back(coefs.size(rank - 2));
  if (g.layout == Layout::blocks) sizes.push_back(g.F);
  const auto require_table = [&](const char* name, const Tensor& t, bool shaped, const char* shape) {
    require_same_device(op, name, t, coefs);
    require(t.scalar_type() == work && t.is_contiguous() && shaped, op, ": ", name, " must be contiguous ", shape,
            " in float32 (float64 for dtype float64), got shape ", shape_of(t));
  };
  require_table("qtable", qtable, qtable.dim() == 2 && qtable.size(1) == 64, "[G, 64]");
  if (mean) require_table("mean", *mean, mean->dim() == 1 && mean->size(0) == g.F, "[F]");
  if (std) require_table("std", *std, std->dim() == 1 && std->size(0) == g.F, "[F]");
  const Tensor dense = coefs.is_contiguous() ? coefs : torch::stable::contiguous(coefs);
  Tensor out = new_result(dense, sizes, dtype, op);
  if (out.numel() == 0) return out;
  require(qtable.size(0) > 0 && planes % qtable.size(0) == 0, op, ": ", qtable.size(0), " tables don't divide ", planes,
          " leading planes of coefs");
  if (work == ScalarType::Double) {
    run_normalize<double>(g, dense, qtable, mean, std, out, planes, blocks);
  } else {
    run_normalize<float>(g, dense, qtable, mean, std, out, planes, blocks);
  }
  return out;
}

}  // namespace
}  // namespace blockdct
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) {
  using namespace fourfold::blockdct;
  m.impl("block_dct", TORCH_BOX(&block_dct));
  m.impl("block_idct", TORCH_BOX(&block_idct));
  m.impl("_block_dct_backward", TORCH_BOX(&block_dct_backward));
  m.impl("_block_idct_backward", TORCH_BOX(&block_idct_backward));
  m.impl("_block_dct_out", TORCH_BOX(&block_dct_out));
  m.impl("_block_idct_out", TORCH_BOX(&block_idct_out));
  m.impl("dct_normalize", TORCH_BOX(&dct_normalize));
}
