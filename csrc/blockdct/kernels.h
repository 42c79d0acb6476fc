// The block DCT kernels as cpu.cpp sees them: plain pointers and numbers, one table of functions per ISA tier.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::blockdct {

// How one plane's coefficients lie: `plane`: the blocks of a frequency are contiguous; `block`: the frequencies of a block are;
// `pixels`: interleaved, coefficient (u, v) of a block at its pixel (u, v).
enum class Form { plane, block, pixels };

// What happens beyond the image's last row and column, where its blocks are not whole. Forward: replicate or zeros.
// Inverse: crop, or fold (the adjoint of replicate: what falls outside is summed into the edge).
enum class Edge { replicate, zeros, crop, fold };

// One plane (one channel of one sample); all strides in elements.
struct Plane {
  int64_t height, width;         // of the image
  int64_t rows, cols;            // blocks down and across
  int64_t image_row, image_col;  // strides of the image
  int64_t coef_f;                // stride from frequency to kept frequency (forms plane and block)
  int64_t coef_i, coef_j;        // strides from block to block (form block)
  int64_t coef_u, coef_v;        // strides from pixel to pixel (form pixels)
  Form form;
  Edge edge;
  const int16_t* slots;  // [N*N] place of frequency u*N + v among the kept ones, or -1
  int64_t kept;          // frequencies kept
  bool in_order;         // all are kept, slots[f] == f
  bool large;            // the whole tensor exceeds the caches
  bool stream;           // write past the caches
  double shift;
};

// Transforms blocks [first, last) of a plane, in row-major order; first is a multiple of tile_blocks. scale: [N*N] by row-major
// frequency, of the accumulation type, or null.
using Forward = void (*)(const Plane& plane, const void* image, void* coefs, const void* scale, int64_t first, int64_t last);
using Inverse = void (*)(const Plane& plane, const void* coefs, void* image, const void* scale, int64_t first, int64_t last);

constexpr int kBlockSizes = 5;  // 2, 4, 8, 16, 32

// (coefs * table - mean) * factor over blocks [.., 64]. table, mean and factor: [64] by row-major frequency, of the
// accumulation type; slots: where a frequency goes, or -1. planar: frequency f of block k lies at out[slots[f] * blocks + k],
// else at out[k * kept + slots[f]].
struct Normalize {
  const void* table;
  const void* mean;
  const void* factor;
  const int16_t* slots;
  int64_t kept;
  bool planar;
  bool stream;     // write past the caches
  int64_t blocks;  // of one plane
};
// Blocks [first, last) of one plane whose results start at out; coefs[i] is where block first + i lies.
using NormalizeBlocks = void (*)(const Normalize& n, const int16_t* const* coefs, void* out, int64_t first, int64_t last);

struct Kernels {
  Forward forward[kElements][kBlockSizes];
  Inverse inverse[kElements][kBlockSizes];
  int tile_blocks[kElements][kBlockSizes];
  NormalizeBlocks normalize[kElements];
};

}  // namespace fourfold::blockdct
