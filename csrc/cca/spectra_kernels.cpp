// Spectra of real images, and their products, compiled once per ISA tier. As many channels side by side as a vector has doubles
// are transformed, a lane each, so that a transform is sums of whole vectors. Two directions one after the other, each as
// products with cosines and with sines: for the sizes of convolutional layers that is faster than an FFT, whatever the size's
// factors.
#include "cca/spectra_kernels.h"

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using spectra::Direction;
using spectra::Image;
using spectra::kDepth;
using spectra::Samples;
using spectra::Spectra;
typedef Vec<double> V;

constexpr int kChannels = kLanes<double>;
// Twice as many sums fit into registers beside what they are made of.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 8;
#else
constexpr int kSums = 4;
#endif

FOURFOLD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- products ------------------------------------------------------------------------------------------------------------

// out[l][k * step] = sum over j of matrix[k, j] * in[l][j], for kLines lines and kCount of k.
template <int kLines, int kCount>
FOURFOLD_INLINE void multiply_some(const double* matrix, int64_t length, const V* const (&in)[kLines], V* const (&out)[kLines],
                                   int64_t step) {
  V sums[kCount][kLines] = {};
  for (int64_t j = 0; j < length; ++j) {
    V x[kLines];
    for (int l = 0; l < kLines; ++l) x[l] = in[l][j];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      const V factor = broadcast(matrix[k * length + j]);
      for (int l = 0; l < kLines; ++l) sums[k][l] += factor * x[l];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) {
    for (int l = 0; l < kLines; ++l) out[l][k * step] = sums[k][l];
  }
}

// The same for all k; matrix [length, length].
template <int kLines>
FOURFOLD_INLINE void multiply(const double* matrix, int64_t length, const V* const (&in)[kLines], V* const (&first)[kLines],
                              int64_t step) {
  int64_t k = 0;
  V* out[kLines];
  const auto move = [&](int64_t by) __attribute__((always_inline)) {
    for (int l = 0; l < kLines; ++l) out[l] = first[l] + by * step;
    return matrix + by * length;
  };
  for (; k + kSums <= length; k += kSums) multiply_some<kLines, kSums>(move(k), length, in, out, step);
  for (; k + 2 <= length; k += 2) multiply_some<kLines, 2>(move(k), length, in, out, step);
  if (k < length) multiply_some<kLines, 1>(move(k), length, in, out, step);
}

// Of a line: what the cosines meet [half], and what the sines meet [pairs].
FOURFOLD_INLINE void fold(const Direction& d, const V* line, V* even, V* odd) {
  even[0] = line[0];
  for (int64_t j = 1; j <= d.pairs(); ++j) {
    even[j] = line[j] + line[d.size - j];
    odd[j - 1] = line[j] - line[d.size - j];
  }
  if (d.size % 2 == 0) even[d.size / 2] = line[d.size / 2];
}

// kLines lines, each [size] to the next; products with the cosines and then the sines, `step` apart. folded: 2 * size vectors.
template <int kLines>
FOURFOLD_INLINE void transform_lines(const Direction& d, const V* const (&lines)[kLines], V* const (&out)[kLines], int64_t step,
                                     V* folded) {
  const V *even[kLines], *odd[kLines];
  V* sines[kLines];
  for (int l = 0; l < kLines; ++l) {
    V* to = folded + l * d.size;
    fold(d, lines[l], to, to + d.half());
    even[l] = to;
    odd[l] = to + d.half();
    sines[l] = out[l] + d.half() * step;
  }
  multiply<kLines>(d.cosines, d.half(), even, out, step);
  multiply<kLines>(d.sines, d.pairs(), odd, sines, step);
}

// ---- reading and writing -------------------------------------------------------------------------------------------------

// A row of pixels, a vector of channels for each.
template <typename E>
FOURFOLD_INLINE void read_row(const Image& from, int64_t row, int64_t w, V* to) {
  const E* pixels = static_cast<const E*>(from.data) + row * from.row_step;
  const V* pivot = reinterpret_cast<const V*>(from.pivot) + row * w;
  if (from.channel_step == 1) {
    for (int64_t v = 0; v < w; ++v) {
      V both[2];
      load_doubles_first(pixels + v * from.column_step, from.count, both);
      to[v] = both[0] - pivot[v];
    }
    return;
  }
  constexpr int kPixels = 2 * kChannels;  // of a pair of squares, in which channels and pixels change places
  for (int64_t v = 0; v < w; v += kPixels) {
    const int64_t count = least(kPixels, w - v);
    V left[kChannels], right[kChannels];
    for (int i = 0; i < kChannels; ++i) {
      // Lanes without a channel repeat the last one; nobody looks at them.
      const E* p = pixels + least(i, from.count - 1) * from.channel_step + v * from.column_step;
      V both[2];
      if (from.column_step != 1) {
        E gathered[kPixels] = {};
        for (int64_t j = 0; j < count; ++j) gathered[j] = p[j * from.column_step];
        load_doubles(gathered, both);
      } else if (count == kPixels) {
        load_doubles(p, both);
      } else {
        load_doubles_first(p, count, both);
      }
      left[i] = both[0], right[i] = both[1];
    }
    transpose<double>(left);
    transpose<double>(right);
    for (int64_t j = 0; j < count; ++j) to[v + j] = (j < kChannels ? left[j] : right[j - kChannels]) - pivot[v + j];
  }
}

template <typename P>
struct Writer {
  P* to;
  const Spectra& spectra;
  int64_t count;

  FOURFOLD_INLINE void write(P* p, V x) const {
    if (count < kChannels) {
      for (int64_t i = 0; i < count; ++i) p[i] = static_cast<P>(x[i]);
    } else if constexpr (sizeof(P) == 8) {
      spectra.stream ? store_stream(p, x) : store(p, x);
    } else {
      store_rounded(p, x);
    }
  }
  FOURFOLD_INLINE void next(V real, V imaginary) {
    write(to, real);
    write(to + spectra.imaginary_step, imaginary);
    to += spectra.frequency_step;
  }
};

// ---- images --------------------------------------------------------------------------------------------------------------

// What lies in the scratch memory, in vectors.
struct Scratch {
  V *products, *rows, *folded, *columns;

  static int64_t size(int64_t h, int64_t w) { return h * w + 2 * w + 2 * (h > w ? h : w) + 2 * h; }
  Scratch(void* memory, int64_t h, int64_t w) {
    products = static_cast<V*>(memory);
    rows = products + h * w;
    folded = rows + 2 * w;
    columns = folded + 2 * (h > w ? h : w);
  }
};

int64_t transform_scratch(int64_t h, int64_t w) { return Scratch::size(h, w) * kVectorBytes; }

template <typename E, typename P>
void transform(const Direction& along_h, const Direction& along_w, const Image& from, const Spectra& to, void* memory) {
  const int64_t h = along_h.size, w = along_w.size;
  const Scratch s(memory, h, w);
  for (int64_t row = 0; row < h; row += 2) {
    read_row<E>(from, row, w, s.rows);
    if (row + 1 < h) {
      read_row<E>(from, row + 1, w, s.rows + w);
      transform_lines<2>(along_w, {s.rows, s.rows + w}, {s.products + row, s.products + row + 1}, h, s.folded);
    } else {
      transform_lines<1>(along_w, {s.rows}, {s.products + row}, h, s.folded);
    }
  }
  const int64_t half = along_h.half(), pairs = along_h.pairs();
  Writer<P> writer{static_cast<P*>(to.data), to, from.count};
  V *even = s.columns, *odd = s.columns + h;  // products with the cosines and with the sines along w
  for (int64_t l = 0; l < along_w.half(); ++l) {
    const V* cosine_line = s.products + l * h;
    const bool is_real = 2 * l % w == 0;  // no sine
    if (is_real) {
      transform_lines<1>(along_h, {cosine_line}, {even}, 1, s.folded);
      for (int64_t j = 0; j < h; ++j) odd[j] = V{};
    } else {
      const V* sine_line = s.products + (along_w.half() + l - 1) * h;
      transform_lines<2>(along_h, {cosine_line, sine_line}, {even, odd}, 1, s.folded);
    }
    writer.next(even[0], odd[0]);
    if (h % 2 == 0) writer.next(even[h / 2], odd[h / 2]);
    for (int64_t k = 1; k <= pairs; ++k) {
      const V even_cosine = even[k], even_sine = even[half + k - 1], odd_cosine = odd[k], odd_sine = odd[half + k - 1];
      writer.next(even_cosine - odd_sine, odd_cosine + even_sine);
      if (!is_real) writer.next(even_cosine + odd_sine, odd_cosine - even_sine);
    }
  }
}

void fence() { stream_fence(); }

// ---- products of spectra -------------------------------------------------------------------------------------------------

// A tile of the total: kRows rows of two vectors, whose sums stay in registers.
constexpr int kRows = kSums;
template <typename P>
constexpr int kColumns = 2 * kLanes<P>;

FOURFOLD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Factors are packed in panels of kRows or kColumns channels, step by step: the real parts of all samples, then the imaginary
// ones. The right one has real + imaginary for the left one's real parts, and imaginary - real for its imaginary ones.
int64_t left_size(int64_t rows) { return ceil_div(rows, kVectorBytes) * kVectorBytes * 2 * kDepth; }
int64_t right_size(int64_t columns) { return ceil_div(columns, kVectorBytes) * kVectorBytes * 2 * kDepth; }

template <typename P>
FOURFOLD_INLINE Vec<P> load_channels(const P* p, int64_t count) {
  return count >= kLanes<P> ? load(p) : load_first(p, count);
}

template <typename P>
FOURFOLD_INLINE void pack_left(const Samples& a, int64_t count, P* to, double* sums) {
  constexpr int kWidth = kLanes<P>;
  for (int part = 0; part < 2; ++part) {
    const P* from = static_cast<const P*>(a.data) + part * a.imaginary_step;
    for (int64_t c = 0; c < a.channels; c += kWidth) {
      Vec<P> sum{};
      for (int64_t s = 0; s < count; ++s) {
        const Vec<P> x = load_channels(from + s * a.sample_step + c, a.channels - c);
        sum += x;
        // The lanes of a vector go to as many panels as they fill; a vector is as wide as some panels, or a panel as some
        // vectors.
        const int64_t step = part * count + s;
        if constexpr (kWidth <= kRows) {
          store(to + (c / kRows) * kRows * 2 * count + step * kRows + c % kRows, x);
        } else {
          P lanes[kWidth];
          store(lanes, x);
          for (int64_t i = 0; i < kWidth && i < ceil_div(a.channels - c, kRows) * kRows; ++i) {
            to[((c + i) / kRows) * kRows * 2 * count + step * kRows + i % kRows] = lanes[i];
          }
        }
      }
      if (sums == nullptr) continue;
      for (int64_t i = 0; i < kWidth && c + i < a.channels; ++i) sums[2 * (c + i) + part] += static_cast<double>(sum[i]);
    }
  }
}

template <typename P>
FOURFOLD_INLINE void pack_right(const Samples& b, int64_t count, P* to) {
  constexpr int kWidth = kLanes<P>;
  const P* from = static_cast<const P*>(b.data);
  for (int64_t c = 0; c < b.channels; c += kWidth) {
    P* panel = to + (c / kColumns<P>)*kColumns<P> * 2 * count + c % kColumns<P>;
    for (int64_t s = 0; s < count; ++s) {
      const P* p = from + s * b.sample_step + c;
      const Vec<P> real = load_channels(p, b.channels - c), imaginary = load_channels(p + b.imaginary_step, b.channels - c);
      store(panel + s * kColumns<P>, real + imaginary);
      store(panel + (count + s) * kColumns<P>, imaginary - real);
    }
  }
  // What a last panel has no channels for is never looked at.
}

// total[r, c] += sum over the steps, for rows x columns of a tile.
template <typename P>
FOURFOLD_INLINE void add_tile(const P* left, const P* right, int64_t steps, double* total, int64_t row_step, int64_t rows,
                              int64_t columns) {
  constexpr int kWidth = kLanes<P>;
  Vec<P> sums[kRows][2] = {};
  for (int64_t t = 0; t < steps; ++t) {
    const Vec<P> first = load(right + t * kColumns<P>), second = load(right + t * kColumns<P> + kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<P> factor = broadcast(left[t * kRows + r]);
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    double* to = total + r * row_step;
    if (sizeof(P) == 8 && columns >= kColumns<P>) {
      for (int v = 0; v < 2; ++v) {
        if constexpr (sizeof(P) == 8) store(to + v * kWidth, load(to + v * kWidth) + sums[r][v]);
      }
    } else {
      for (int64_t c = 0; c < kColumns<P> && c < columns; ++c) to[c] += static_cast<double>(sums[r][c / kWidth][c % kWidth]);
    }
  }
}

int64_t gram_scratch(int64_t rows, int64_t columns) {
  return (left_size(rows) + right_size(columns)) * static_cast<int64_t>(sizeof(double));
}

template <typename P>
void gram(const Samples& a, const Samples& b, int64_t count, double* total, int64_t row_step, double* sums, void* scratch) {
  P* left = static_cast<P*>(scratch);
  P* right = left + left_size(a.channels);
  pack_left(a, count, left, sums);
  pack_right(b, count, right);
  const int64_t steps = 2 * count;
  for (int64_t c = 0; c < b.channels; c += kColumns<P>) {
    for (int64_t r = 0; r < a.channels; r += kRows) {
      add_tile(left + r * steps, right + c * steps, steps, total + r * row_step + c, row_step, a.channels - r, b.channels - c);
    }
  }
}

}  // namespace

#define FOURFOLD_TRANSFORM(E) {transform<E, float>, transform<E, double>}

extern const spectra::Kernels spectra_kernels = {
    kChannels,
    kVectorBytes,
    transform_scratch,
    {FOURFOLD_TRANSFORM(Half), FOURFOLD_TRANSFORM(BFloat16), FOURFOLD_TRANSFORM(float), FOURFOLD_TRANSFORM(double)},
    fence,
    gram_scratch,
    {gram<float>, gram<double>},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
