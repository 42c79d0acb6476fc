// The kernels of rgb_to_dct as rgb_cpu.cpp sees them. An MCU is the smallest piece of the image that holds whole blocks of
// every component: 8v x 8h pixels.
#pragma once

#include <cstdint>

#include "blockdct/kernels.h"

namespace fourfold::rgbdct {

// MCUs [row, row + rows) x [col, col + cols) of one image. More than one row only at full width, so that the blocks of each
// component follow each other.
struct Tile {
  int64_t row, rows, col, cols;
};

// Blocks of luma in a tile at most; chroma has as many or fewer.
constexpr int64_t kTileBlocks = 256;

// Blocks [block, block + count) of a component whose columns, vertically transformed, lie in buffer.
using Emit = void (*)(const blockdct::Plane& plane, void* buffer, int64_t pitch, void* coefs, const void* scale, int64_t block,
                      int64_t count);

struct Job {
  int64_t height, width;
  int64_t channel, row, col;     // strides of the image, in elements; col is 1, or 3 where channel is 1
  int64_t v, h;                  // pixels down and across that share a chroma sample
  blockdct::Plane luma, chroma;  // how coefficients lie
  const void* scale[3];          // [64] by row-major frequency for Y, Cb, Cr, of the accumulation type, or null
  Emit emit;
};

// rgb: the sample's first pixel; y, cb, cr: its components' coefficients; scratch: Kernels::scratch_bytes, aligned to 64.
using Transform = void (*)(const Job& job, const Tile& tile, const void* rgb, void* y, void* cb, void* cr, void* scratch);

// What pixels are, in the order of Kernels::transform.
enum Pixel { kByte, kPixelHalf, kPixelBFloat16, kPixelFloat, kPixelDouble, kPixels };

struct Kernels {
  Transform transform[kPixels];
  int64_t scratch_bytes[kPixels];  // of transform
  Emit emit[kElements];            // takes float buffers, double ones for kDouble
};

}  // namespace fourfold::rgbdct
