// The block DCT ops on CPU: checks, allocation, threads. The arithmetic is in kernels.cpp.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

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

// [.., F] by slot spread to [.., 64] by row-major frequency.
template <typename T>
std::vector<T> by_frequency(const Geometry& g, const std::optional<Tensor>& values, T missing) {
  const int64_t rows = values && values->dim() == 2 ? values->size(0) : 1;
  std::vector<T> result(rows * 64, missing);
  for (int64_t i = 0; values && i < rows * 64; ++i) {
    if (g.slots[i % 64] >= 0) result[i] = static_cast<const T*>(values->const_data_ptr())[i / 64 * g.F + g.slots[i % 64]];
  }
  return result;
}

// Where the blocks of a plane lie: `row` and `step` coefficients from one to the one below and to the one beside it.
struct Grid {
  const int16_t* at;
  int64_t row, step;
  bool mirrored;
};

// Whether a new result lies on pages that its memory had before, by a sample of them.
bool is_warm(const char* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kSamples = 8;
  const int64_t page = sysconf(_SC_PAGESIZE);
  for (int64_t i = 0; i < kSamples; ++i) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory) + i * (bytes / kSamples);
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(at - at % page), page, &resident) != 0 || resident % 2 == 0) return false;
  }
  return true;
#else
  return false;
#endif
}

// out: planes of rows x cols blocks. grid(plane) is where one comes from. mean, std: [F], or [S, F] with a row for each of S
// planes in turn.
template <typename T, typename GridOf>
void run_normalize(const Geometry& g, const GridOf& grid, int64_t planes, int64_t rows, int64_t cols, const Tensor& qtable,
                   const std::optional<Tensor>& mean, const std::optional<Tensor>& std, const Tensor& out) {
  const std::vector<T> means = by_frequency<T>(g, mean, T{0});
  std::vector<T> factors = by_frequency<T>(g, std, T{1});
  for (T& factor : factors) factor = 1 / factor;
  const NormalizeBlocks normalize = kernels().normalize[element_of(out)];
  const T* tables = static_cast<const T*>(qtable.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t blocks = rows * cols;
  const int64_t plane_bytes = g.F * blocks * out.element_size(), planes_per_table = planes / qtable.size(0);
  const int64_t bytes = planes * plane_bytes;
  const bool stream = bytes > kLargeBytes && is_warm(to, bytes);
  constexpr int64_t kChunk = 256;  // blocks; a multiple of every vector, so that chunks don't split one
  const int64_t chunks = (blocks + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, planes * chunks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t plane = chunk / chunks, first = chunk % chunks * kChunk;
      const int64_t last = first + kChunk < blocks ? first + kChunk : blocks;
      const Grid from = grid(plane);
      const int16_t* where[kChunk];
      int64_t i = first / cols, j = first % cols;
      for (int64_t k = 0; k < last - first; ++k) {
        where[k] = from.at + i * from.row + (from.mirrored ? cols - 1 - j : j) * from.step;
        if (++j == cols) j = 0, ++i;
      }
      const T* table = tables + plane / planes_per_table * 64;
      T signs_turned[64];
      if (from.mirrored) {  // the odd waves across
        for (int f = 0; f < 64; ++f) signs_turned[f] = f % 2 == 1 ? -table[f] : table[f];
        table = signs_turned;
      }
      const Normalize n{table,
                        means.data() + plane * 64 % means.size(),
                        factors.data() + plane * 64 % factors.size(),
                        g.slots.data(),
                        g.F,
                        g.layout == Layout::planar,
                        stream,
                        blocks};
      normalize(n, where, to + plane * plane_bytes, first, last);
    }
  });
}

template <typename GridOf>
void run_normalize_as(ScalarType work, const Geometry& g, const GridOf& grid, int64_t planes, int64_t rows, int64_t cols,
                      const Tensor& qtable, const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                      const Tensor& out) {
  if (work == ScalarType::Double) {
    run_normalize<double>(g, grid, planes, rows, cols, qtable, mean, std, out);
  } else {
    run_normalize<float>(g, grid, planes, rows, cols, qtable, mean, std, out);
  }
}

void require_dtype(const char* op, ScalarType dtype) {
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      op, ": dtype must be float16, bfloat16, float32 or float64");
}

// Of table, mean or std, which must be `shaped` as `shape` says.
void require_numbers(const char* op, const char* name, const Tensor& t, const Tensor& coefs, ScalarType work, bool shaped,
                     const char* shape) {
  require_same_device(op, name, t, coefs);
  require(t.scalar_type() == work && t.is_contiguous() && shaped, op, ": ", name, " must be contiguous ", shape,
          " in float32 (float64 for dtype float64), got shape ", shape_of(t));
}

// coefs [.., h, w, 64]; qtable [G, 64], one table for each 1/G of the leading dimensions; mean, std [F].
Tensor dct_normalize(const Tensor& coefs, const Tensor& qtable, std::optional<Tensor> mean, std::optional<Tensor> std,
                     Freqs freqs, std::string layout, ScalarType dtype) {
  const char* op = "dct_normalize";
  Geometry g = describe(op, 8, layout, freqs);
  require(g.layout != Layout::interleaved, op, ": layout must be 'planar' or 'blocks', got 'interleaved'");
  require(coefs.scalar_type() == ScalarType::Short, op, ": coefs must be int16 quantised coefficients");
  require(coefs.dim() >= 3 && coefs.size(coefs.dim() - 1) == 64, op, ": coefs must be [.., h, w, 64], got ", shape_of(coefs));
  require_dtype(op, dtype);
  const ScalarType work = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t rank = coefs.dim(), rows = coefs.size(rank - 3), cols = coefs.size(rank - 2);
  int64_t planes = 1;
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < rank - 3; ++d) {
    planes *= coefs.size(d);
    sizes.push_back(coefs.size(d));
  }
  if (g.layout == Layout::planar) sizes.push_back(g.F);
  sizes.push_back(rows);
  sizes.push_back(cols);
  if (g.layout == Layout::blocks) sizes.push_back(g.F);
  require_numbers(op, "qtable", qtable, coefs, work, qtable.dim() == 2 && qtable.size(1) == 64, "[G, 64]");
  if (mean) require_numbers(op, "mean", *mean, coefs, work, mean->dim() == 1 && mean->size(0) == g.F, "[F]");
  if (std) require_numbers(op, "std", *std, coefs, work, std->dim() == 1 && std->size(0) == g.F, "[F]");
  const Tensor dense = coefs.is_contiguous() ? coefs : torch::stable::contiguous(coefs);
  Tensor out = new_result(dense, sizes, dtype, op);
  if (out.numel() == 0) return out;
  require(qtable.size(0) > 0 && planes % qtable.size(0) == 0, op, ": ", qtable.size(0), " tables don't divide ", planes,
          " leading planes of coefs");
  const int16_t* from = static_cast<const int16_t*>(dense.const_data_ptr());
  const auto grid = [&](int64_t plane) { return Grid{from + plane * rows * cols * 64, cols * 64, 64, false}; };
  run_normalize_as(work, g, grid, planes, rows, cols, qtable, mean, std, out);
  return out;
}

// grids: the planes [h, w, 64] of images, image by image; qtable [planes of all images, 64]; mean, std [planes, F].
Tensor normalize_grids(std::vector<Tensor> grids, const Tensor& qtable, std::optional<Tensor> mean, std::optional<Tensor> std,
                       int64_t planes, std::vector<int64_t> mirrored, Freqs freqs, ScalarType dtype) {
  const char* op = "_normalize_grids";
  Geometry g = describe(op, 8, "planar", freqs);
  const auto count = static_cast<int64_t>(grids.size());
  require(planes > 0 && count > 0 && count % planes == 0, op, ": grids must be those of whole images of ", planes,
          " planes, got ", count);
  require_dtype(op, dtype);
  const ScalarType work = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor& one = grids[0];
  require(one.dim() == 3 && one.size(2) == 64, op, ": grids must be [h, w, 64], got ", shape_of(one));
  std::vector<Grid> places;
  for (Tensor& grid : grids) {
    require_same_device(op, "grids", grid, one);
    require(grid.scalar_type() == ScalarType::Short, op, ": grids must be int16 quantised coefficients");
    require(grid.dim() == 3 && grid.size(0) == one.size(0) && grid.size(1) == one.size(1) && grid.size(2) == 64, op,
            ": grids must have one shape, got ", shape_of(one), " and ", shape_of(grid));
    if (grid.stride(2) != 1) grid = torch::stable::contiguous(grid);
    places.push_back({static_cast<const int16_t*>(grid.const_data_ptr()), grid.stride(0), grid.stride(1), false});
  }
  for (int64_t k : mirrored) {
    require(k >= 0 && k < count, op, ": mirrored must hold numbers of grids below ", count, ", got ", k);
    places[k].mirrored = true;
  }
  require_numbers(op, "qtable", qtable, one, work, qtable.dim() == 2 && qtable.size(0) == count && qtable.size(1) == 64,
                  "[grids, 64]");
  const auto shaped = [&](const Tensor& t) { return t.dim() == 2 && t.size(0) == planes && t.size(1) == g.F; };
  if (mean) require_numbers(op, "mean", *mean, one, work, shaped(*mean), "[planes, F]");
  if (std) require_numbers(op, "std", *std, one, work, shaped(*std), "[planes, F]");
  const int64_t rows = one.size(0), cols = one.size(1);
  Tensor out = new_result(one, {count / planes, planes * g.F, rows, cols}, dtype, op);
  if (out.numel() == 0) return out;
  const auto grid = [&](int64_t plane) { return places[plane]; };
  run_normalize_as(work, g, grid, count, rows, cols, qtable, mean, std, out);
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
  m.impl("_normalize_grids", TORCH_BOX(&normalize_grids));
}
