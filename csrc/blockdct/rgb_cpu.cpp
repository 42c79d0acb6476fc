// rgb_to_dct on CPU: tiles and threads. The arithmetic is in rgb_kernels.cpp.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "blockdct/cpu.h"
#include "blockdct/rgb.h"
#include "blockdct/rgb_geometry.h"
#include "common/isa.h"

namespace fourfold {

FOURFOLD_DECLARE_KERNELS(rgbdct)

namespace rgbdct {
namespace {

const Kernels& kernels() {
  static const Kernels& best = FOURFOLD_BEST_KERNELS(rgbdct);
  return best;
}

// Memory of the calling thread, kept for its next call; null if there is none to be had. Not on its stack, which may be small.
void* scratch_of_thread(size_t bytes) {
  thread_local std::unique_ptr<void, decltype(&std::free)> kept(nullptr, &std::free);
  thread_local size_t size = 0;
  if (size < bytes) {
    kept.reset(std::aligned_alloc(64, bytes));
    size = kept ? bytes : 0;
  }
  return kept.get();
}

Pixel pixel_of(const Tensor& rgb) {
  if (rgb.scalar_type() == ScalarType::Byte) return kByte;
  switch (element_of(rgb)) {
    case kHalf:
      return kPixelHalf;
    case kBFloat16:
      return kPixelBFloat16;
    case kDouble:
      return kPixelDouble;
    default:
      return kPixelFloat;
  }
}

// How an image of `down` x `across` MCUs is cut: into pieces of a row, or into whole rows.
struct Tiling {
  int64_t down, across, rows, cols;

  Tiling(const Call& call) : down(call.chroma.rows), across(call.chroma.cols), rows(1), cols(kTileBlocks / (call.v * call.h)) {
    const int64_t blocks_of_row = across * call.v * call.h;
    if (blocks_of_row <= kTileBlocks) rows = kTileBlocks / blocks_of_row, cols = across;
  }
  int64_t count_across() const { return (across + cols - 1) / cols; }
  int64_t count() const { return (down + rows - 1) / rows * count_across(); }
  Tile tile(int64_t number) const {
    const int64_t row = number / count_across() * rows, col = number % count_across() * cols;
    return {row, std::min(rows, down - row), col, std::min(cols, across - col)};
  }
};

std::tuple<Tensor, Tensor> rgb_to_dct(const Tensor& rgb, std::string subsampling, std::string layout, Freqs freqs,
                                      std::optional<Tensor> scale, ScalarType dtype) {
  Call call = describe_call(rgb, subsampling, layout, freqs, scale, dtype);
  const auto [y, cbcr] = new_results(call);
  if (call.luma.empty()) return {in_dtype(y, dtype), in_dtype(cbcr, dtype)};
  const int64_t bytes = y.element_size(), sample = call.rgb.stride(0) * call.rgb.element_size();
  Job job{};
  job.height = call.luma.H, job.width = call.luma.W;
  job.channel = call.channel, job.row = call.row, job.col = call.col;
  job.v = call.v, job.h = call.h;
  job.luma = blockdct::plane_of(call.luma, blockdct::Edge::replicate, 0.0, y.numel() * bytes, /*warm=*/false);
  job.chroma = blockdct::plane_of(call.chroma, blockdct::Edge::replicate, 0.0, cbcr.numel() * bytes, /*warm=*/false);
  job.emit = kernels().emit[element_of(y)];
  std::vector<float> floats;
  std::vector<double> doubles;
  if (scale && call.work == ScalarType::Double) doubles = blockdct::spread<double>(call.luma, *scale, false);
  if (scale && call.work == ScalarType::Float) floats = blockdct::spread<float>(call.luma, *scale, false);
  for (int k = 0; k < 3; ++k) {
    if (!doubles.empty()) job.scale[k] = doubles.data() + 64 * k;
    if (!floats.empty()) job.scale[k] = floats.data() + 64 * k;
  }
  const Transform transform = kernels().transform[pixel_of(call.rgb)];
  std::atomic<bool> lacks_memory{false};
  const size_t scratch_bytes = kernels().scratch_bytes[pixel_of(call.rgb)];
  const char* from = static_cast<const char*>(call.rgb.const_data_ptr());
  char* luma = static_cast<char*>(y.mutable_data_ptr());
  char* chroma = static_cast<char*>(cbcr.mutable_data_ptr());
  const Tiling tiling(call);
  const int64_t tiles = tiling.count();
  torch::stable::parallel_for(0, call.luma.B * tiles, 1, [&](int64_t begin, int64_t end) {
    void* const scratch = scratch_of_thread(scratch_bytes);
    if (scratch == nullptr) {  // an exception could not leave this thread
      lacks_memory = true;
      return;
    }
    for (int64_t number = begin; number < end; ++number) {
      const int64_t b = number / tiles;
      char* cb = chroma + b * call.chroma.coef_b * bytes;
      transform(job, tiling.tile(number % tiles), from + b * sample, luma + b * call.luma.coef_b * bytes, cb,
                cb + call.chroma.coef_c * bytes, scratch);
    }
  });
  if (lacks_memory)
    throw std::runtime_error(std::string(call.op) + ": out of memory: cannot allocate scratch memory on the CPU");
  return {in_dtype(y, dtype), in_dtype(cbcr, dtype)};
}

}  // namespace
}  // namespace rgbdct
}  // namespace fourfold

STABLE_TORCH_LIBRARY_IMPL(fourfold, CPU, m) { m.impl("rgb_to_dct", TORCH_BOX(&fourfold::rgbdct::rgb_to_dct)); }
