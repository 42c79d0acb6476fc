// Kernels of rgb_to_dct, compiled once per ISA tier. A tile of the image becomes three buffers of vertically transformed
// columns: colours, level shift and luma's transform in registers as pixels are read; chroma is summed over its cells on the
// way and transformed after. The horizontal half is that of block_dct.
#include "blockdct/rgb.h"

#include "blockdct/rows.h"
#include "blockdct/transform.h"
#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using rgbdct::Job;
using rgbdct::Tile;

constexpr double kRed = 0.299, kGreen = 0.587, kBlue = 0.114;  // BT.601

// Columns of a tile's buffer, and room for the last vectors to spill over.
template <typename T>
constexpr int64_t kPitch = 8 * rgbdct::kTileBlocks + 2 * kLanes<T> + 8;

template <typename T>
struct Buffers {
  alignas(64) T luma[8 * kPitch<T>];
  alignas(64) T chroma[2][8 * kPitch<T>];
};

// Eight rows of one vector of pixels that reaches beyond the image's last column, which is repeated; planar.
template <typename E>
struct Edge {
  static constexpr int kCount = kLanes<Accumulate<E>>;
  E at[8][3][kCount];
};
template <typename E>
__attribute__((noinline)) void load_edge(const Job& job, const E* const (&rows)[8], int64_t x, Edge<E>& edge) {
  for (int r = 0; r < 8; ++r) {
    for (int64_t k = 0; k < Edge<E>::kCount; ++k) {
      const E* pixel = rows[r] + least(x + k, job.width - 1) * job.col;
      for (int64_t c = 0; c < 3; ++c) edge.at[r][c][k] = pixel[c * job.channel];
    }
  }
}

// Luma, level-shifted, of eight rows of a vector of pixels; B - Y and R - Y summed over kV rows. load(r, rgb): the pixels of
// row r.
template <typename T, int kV, typename Load>
FOURFOLD_INLINE void convert(Load load, Vec<T> (&y)[8], Vec<T> (&blue)[8 / kV], Vec<T> (&red)[8 / kV]) {
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    Vec<T> rgb[3];
    load(r, rgb);
    const Vec<T> value = rgb[0] * static_cast<T>(kRed) + rgb[1] * static_cast<T>(kGreen) + rgb[2] * static_cast<T>(kBlue);
    blue[r / kV] = r % kV == 0 ? rgb[2] - value : blue[r / kV] + (rgb[2] - value);
    red[r / kV] = r % kV == 0 ? rgb[0] - value : red[r / kV] + (rgb[0] - value);
    y[r] = value - T{128};
  }
}

template <typename T>
FOURFOLD_INLINE void store_columns(T* to, Vec<T> (&rows)[8]) {
  dct<T, 8, 8>(rows);
#pragma GCC unroll 8
  for (int u = 0; u < 8; ++u) *(Loose<T>*)(to + u * kPitch<T>) = rows[u];
}

// The tile's pixels to its buffers.
template <typename E, int kV, int kH, bool kInterleaved>
void separate(const Job& job_, const Tile& tile, const E* rgb, Buffers<Accumulate<E>>& buffers) {
  using T = Accumulate<E>;
  const Job job = job_;          // a copy that no store can alias
  constexpr int kSums = 8 / kV;  // rows of chroma that 8 rows of pixels give
  const Vec<T> blue_factor = broadcast(static_cast<T>(1 / (2 - 2 * kBlue) / (kV * kH)));
  const Vec<T> red_factor = broadcast(static_cast<T>(1 / (2 - 2 * kRed) / (kV * kH)));
  const int64_t chroma_columns = tile.cols * 8, columns = chroma_columns * kH;
  const int64_t first = tile.col * 8 * kH;
  // At full width the last MCU may have fewer blocks of luma that count.
  const int64_t luma_columns = tile.rows > 1 ? job.luma.cols * 8 : columns;
  for (int64_t m = 0; m < tile.rows; ++m) {
    T* blue = buffers.chroma[0] + m * chroma_columns;
    T* red = buffers.chroma[1] + m * chroma_columns;
    for (int half = 0; half < kV; ++half) {
      const int64_t top = ((tile.row + m) * kV + half) * 8;
      const E* rows[8];
      for (int r = 0; r < 8; ++r) rows[r] = rgb + least(top + r, job.height - 1) * job.row;
      T* luma = buffers.luma + (m * kV + half) * luma_columns;
      for (int64_t x = 0; x < columns; x += kH * kLanes<T>) {
        Vec<T> blues[kH][kSums], reds[kH][kSums];
#pragma GCC unroll 2
        for (int part = 0; part < kH; ++part) {
          const int64_t from = first + x + part * kLanes<T>;
          Vec<T> y[8];
          if (from + kLanes<T> <= job.width) {
            convert<T, kV>(
                [&](int r, Vec<T>(&pixels)[3]) __attribute__((always_inline)) {
                  if constexpr (kInterleaved) {
                    load_triples(rows[r] + 3 * from, pixels[0], pixels[1], pixels[2]);
                  } else {
                    for (int c = 0; c < 3; ++c) pixels[c] = load(rows[r] + from + c * job.channel);
                  }
                },
                y, blues[part], reds[part]);
          } else {
            Edge<E> edge;
            load_edge(job_, rows, from, edge);
            convert<T, kV>(
                [&](int r, Vec<T>(&pixels)[3]) __attribute__((always_inline)) {
                  for (int c = 0; c < 3; ++c) pixels[c] = load(edge.at[r][c]);
                },
                y, blues[part], reds[part]);
          }
          store_columns(luma + x + part * kLanes<T>, y);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kSums; ++r) {
          if constexpr (kH == 2) {
            Vec<T> even, odd;
            deinterleave<T>(blues[0][r], blues[1][r], even, odd);
            blues[0][r] = even + odd;
            deinterleave<T>(reds[0][r], reds[1][r], even, odd);
            reds[0][r] = even + odd;
          }
          const int64_t at = (half * kSums + r) * kPitch<T> + x / kH;
          *(Loose<T>*)(blue + at) = blues[0][r] * blue_factor;
          *(Loose<T>*)(red + at) = reds[0][r] * red_factor;
        }
      }
    }
    T* const planes[2] = {blue, red};
    for (T* chroma : planes) {
      for (int64_t x = 0; x < chroma_columns; x += kLanes<T>) {
        Vec<T> rows[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) rows[r] = *(const Loose<T>*)(chroma + r * kPitch<T> + x);
        store_columns(chroma + x, rows);
      }
    }
  }
}

template <typename E>
void transform(const Job& job, const Tile& tile, const void* rgb_, void* y, void* cb, void* cr, void* scratch) {
  using T = Accumulate<E>;
  Buffers<T>& buffers = *static_cast<Buffers<T>*>(scratch);
  const E* rgb = static_cast<const E*>(rgb_);
  const auto run = [&](auto* planar, auto* interleaved) { (job.col == 1 ? planar : interleaved)(job, tile, rgb, buffers); };
  if (job.h == 1) {
    run(separate<E, 1, 1, false>, separate<E, 1, 1, true>);
  } else if (job.v == 1) {
    run(separate<E, 1, 2, false>, separate<E, 1, 2, true>);
  } else {
    run(separate<E, 2, 2, false>, separate<E, 2, 2, true>);
  }
  // Runs of blocks that follow each other: all rows at full width, else one row each.
  const auto emit = [&](const blockdct::Plane& p, T* buffer, int64_t v, int64_t h, void* coefs, const void* scale) {
    const bool full = tile.rows > 1;
    const int64_t row = tile.row * v, col = tile.col * h, rows = least(tile.rows * v, p.rows - row);
    const int64_t cols = full ? p.cols : least(tile.cols * h, p.cols - col);
    if (full) return job.emit(p, buffer, kPitch<T>, coefs, scale, row * p.cols, rows * p.cols);
    for (int64_t i = 0; i < rows; ++i) {
      job.emit(p, buffer + i * tile.cols * h * 8, kPitch<T>, coefs, scale, (row + i) * p.cols + col, cols);
    }
  };
  emit(job.luma, buffers.luma, job.v, job.h, y, job.scale[0]);
  emit(job.chroma, buffers.chroma[0], 1, 1, cb, job.scale[1]);
  emit(job.chroma, buffers.chroma[1], 1, 1, cr, job.scale[2]);
}

template <typename E>
void emit(const blockdct::Plane& p, void* buffer_, int64_t pitch, void* coefs_, const void* scale_, int64_t block,
          int64_t count) {
  using T = Accumulate<E>;
  T* buffer = static_cast<T*>(buffer_);
  E* coefs = static_cast<E*>(coefs_);
  const T* scale = static_cast<const T*>(scale_);
  if (p.form == Form::plane) {
    rows_out<E, 8, Form::plane>(p, buffer, pitch, coefs, scale, block, count);
  } else {
    rows_out<E, 8, Form::block>(p, buffer, pitch, coefs, scale, block, count);
  }
}

}  // namespace

extern const rgbdct::Kernels rgbdct_kernels = {
    {transform<uint8_t>, transform<Half>, transform<BFloat16>, transform<float>, transform<double>},
    {sizeof(Buffers<float>), sizeof(Buffers<float>), sizeof(Buffers<float>), sizeof(Buffers<float>), sizeof(Buffers<double>)},
    {emit<Half>, emit<BFloat16>, emit<float>, emit<double>},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
