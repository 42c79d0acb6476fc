// The kernels of sparse weights as sparse_cpu.cpp sees them: plain pointers and numbers, one table of functions per instruction
// set. E is the type of x, values and results, T the type they are computed in.
//
// A tile holds some columns of a matrix side by side: tile[i][w] is row w's element i, w < kWidths[..]. Columns of values are
// masked before they are looked up, so that a wrong one stays inside a tile, whose rows are made a power of two in number.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace fourfold::sparse {

// The widths that tiles come in.
constexpr int kWidths[] = {1, 4, 8, 16, 32, 64};
constexpr int kWidthCount = 6;

// Rows of K bits hold whole words; a batch of at most so many rows is multiplied from the bits themselves.
constexpr int kBitmapRows = 8;

// Nonzeros of a row, as both products see them.
template <typename Column>
struct Pieces {
  const Column* columns;
  const void* values;     // of E
  const int64_t* starts;  // piece s of row n is starts[n * count + s] .. starts[n * count + s + 1], both held to 0 .. nnz
  int64_t count;
  int64_t nnz;
};
using Nonzeros = Pieces<uint16_t>;

// Adds to totals [rows, width] of T the products of piece s of rows first .. first + rows with the tile [columns, width]; where
// `begins`, totals start as the bias of those rows (null: 0) instead.
using Multiply = void (*)(const Nonzeros& nonzeros, int64_t first, int64_t rows, int64_t s, const void* tile, uint32_t mask,
                          bool begins, const void* bias, void* totals);

// tile[columns[i] - base][w] += values[i] * row[w], base and row of T
using Scatter = void (*)(const uint16_t* columns, const void* values, int64_t count, uint32_t base, uint32_t mask,
                         const void* row, void* tile);

// y[m * stride + n] = the product of row n with x[m], m < batch <= kBitmapRows, for rows [first, last). x is [batch, pitch],
// padded with zeros to whole words, in the type of Kernels::bitmap_x_bytes.
struct BitmapJob {
  const uint8_t* bits;  // [N, words]
  int64_t words;
  const void* values;
  const int64_t* starts;  // [N + 1], held to 0 .. nnz
  int64_t nnz;
  const void* x;
  int64_t pitch, batch;
  const void* bias;  // null: 0
  void* y;
  int64_t stride;
};
using Bitmap = void (*)(const BitmapJob& job, int64_t first, int64_t last);

// tile[k][w] = x[w * stride + k] for k in [first, last) and w < batch, 0 for the other w.
using Pack = void (*)(const void* x, int64_t stride, int64_t batch, int64_t first, int64_t last, void* tile);
// y[w * stride + n] = totals[n][w] for n < rows and w < batch.
using Unpack = void (*)(const void* totals, int64_t width, int64_t rows, int64_t batch, void* y, int64_t stride);

// values[i] = the inner product of a and b's row columns[i], both of depth elements
using Dots = void (*)(const void* a, const void* b, int64_t depth, const uint16_t* columns, int64_t count, void* values);

struct Kernels {
  Multiply multiply[kElements][kWidthCount];
  Pack pack_x[kElements][kWidthCount];  // for multiply, in x_bytes to an element
  int x_bytes[kElements][kWidthCount];
  Scatter scatter[kElements][kWidthCount];
  Pack pack[kElements][kWidthCount];  // for scatter, in T
  Unpack unpack[kElements];
  Bitmap bitmap[kElements];
  void (*bitmap_x[kElements])(const void* x, int64_t k, void* out, int64_t pitch);  // a row, widened and padded
  int bitmap_x_bytes[kElements];
  Dots dots[kElements];
  // The set bits of `words` words as columns from `base` on; how many. May write up to 64 columns more than there are.
  int64_t (*columns)(const uint8_t* bits, int64_t words, uint16_t base, uint16_t* columns);
  int64_t (*count)(const uint8_t* bits, int64_t words);
  // The values where bits are set, one after the other, and back with zeros between them; E is told by its bytes, 2, 4 or 8.
  // `room`: how many values may be written, of which the first ones count; `there`: how many may be read.
  void (*gather[3])(const uint8_t* bits, const void* row, int64_t k, void* values, int64_t room);
  void (*scatter_row[3])(const uint8_t* bits, const void* values, int64_t there, void* row, int64_t k);
};

}  // namespace fourfold::sparse
