// Kernels of representation similarity, compiled once per ISA tier. Which memory, and which thread, is cpu.cpp's business.
#include "cca/kernels.h"

#include "common/simd.h"
#include "common/tile_gemm.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using cca::Rows;
using cca::Samples;

constexpr int kDoubles = kLanes<double>;
constexpr int kFloats = kLanes<float>;

FOURFOLD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FOURFOLD_INLINE double over_lanes(Vec<double> x) {
  double total = 0;
  for (int i = 0; i < kDoubles; ++i) total += x[i];
  return total;
}

// ---- packing samples -----------------------------------------------------------------------------------------------------

// The samples are contiguous: kCount rows at a time, so that pivot and sums are fetched once for them.
template <typename E, typename P, int kCount>
FOURFOLD_INLINE void pack_rows(const E* x, int64_t step, int64_t channels, const double* pivot, P* panel, int64_t row_step,
                               double* norms, double* sums) {
  Vec<double> squares[kCount] = {};
  int64_t c = 0;
  for (; c + kFloats <= channels; c += kFloats) {
    Vec<double> shift[2], sum[2];
    load_doubles(pivot + c, shift);
    load_doubles(sums + c, sum);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      Vec<double> value[2];
      load_doubles(x + k * step + c, value);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        value[h] = rounded_to(value[h] - shift[h], P{});
        store_rounded(panel + k * row_step + c + h * kDoubles, value[h]);
        sum[h] += value[h];
        squares[k] += value[h] * value[h];
      }
    }
    for (int h = 0; h < 2; ++h) store(sums + c + h * kDoubles, sum[h]);
  }
  for (int k = 0; k < kCount; ++k) norms[k] = over_lanes(squares[k]);
  if (c == channels) return;
  const int64_t rest = channels - c;
  Vec<double> shift[2];
  load_doubles_first(pivot + c, rest, shift);
  for (int k = 0; k < kCount; ++k) {
    Vec<double> value[2];
    load_doubles_first(x + k * step + c, rest, value);
    double lanes[2 * kDoubles];
    for (int h = 0; h < 2; ++h) store(lanes + h * kDoubles, rounded_to(value[h] - shift[h], P{}));
    double square = 0;
    for (int64_t i = 0; i < rest; ++i) {
      panel[k * row_step + c + i] = static_cast<P>(lanes[i]);
      sums[c + i] += lanes[i];
      square += lanes[i] * lanes[i];
    }
    norms[k] += square;
  }
}

// Any other steps: squares of kDoubles channels by kDoubles samples change places, two squares beside each other.
struct Square {
  int64_t channel_step, sample_step, row_step;
  int64_t width, count;  // channels and samples that there are
};

// All there is; fewer samples, contiguous; fewer channels, or samples that are apart.
enum Shape { kWhole, kShort, kRagged };

template <Shape S, typename E>
FOURFOLD_INLINE void load_samples(const E* x, const Square& square, Vec<double> (&to)[2]) {
  if constexpr (S == kWhole) {
    load_doubles(x, to);
  } else if (S == kShort || square.sample_step == 1) {
    load_doubles_first(x, square.count, to);
  } else {
    E gathered[kFloats] = {};
    for (int64_t k = 0; k < square.count; ++k) gathered[k] = x[k * square.sample_step];
    load_doubles(gathered, to);
  }
}

// Bytes ahead of what is read of a channel: its next samples come after those of all other channels.
constexpr int kAhead = 128;

template <Shape S, typename E, typename P>
FOURFOLD_INLINE Vec<double> pack_square(const E* x, const Square& square, const double* pivot, P* panel,
                                        Vec<double> (&squares)[2]) {
  Vec<double> rows[2][kDoubles];
  uint32_t present[2];  // what is no sample counts as zero
  for (int h = 0; h < 2; ++h) present[h] = ((1u << square.count) - 1) >> (h * kDoubles) & ((1u << kDoubles) - 1);
#pragma GCC unroll 8
  for (int i = 0; i < kDoubles; ++i) {
    Vec<double> value[2] = {};
    if (S != kRagged || i < square.width) {
      const E* from = x + i * square.channel_step;
      load_samples<S>(from, square, value);
      if constexpr (S == kWhole) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        value[h] = rounded_to(value[h] - pivot[i], P{});
        if constexpr (S != kWhole) value[h] = keep<double>(value[h], present[h]);
        squares[h] += value[h] * value[h];
      }
    }
    for (int h = 0; h < 2; ++h) rows[h][i] = value[h];
  }
  Vec<double> sum{};
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    if (S != kWhole && present[h] == 0) continue;
    transpose<double>(rows[h]);
#pragma GCC unroll 8
    for (int i = 0; i < kDoubles; ++i) {
      const int64_t k = h * kDoubles + i;
      sum += rows[h][i];
      if (S != kWhole && k >= square.count) continue;
      if constexpr (S == kRagged) {
        for (int64_t c = 0; c < square.width; ++c) panel[k * square.row_step + c] = static_cast<P>(rows[h][i][c]);
      } else {
        store_rounded(panel + k * square.row_step, rows[h][i]);
      }
    }
  }
  return sum;
}

// At most kFloats samples.
template <typename E, typename P>
FOURFOLD_INLINE void pack_columns(const E* x, const Samples& samples, int64_t count, const double* pivot, P* panel,
                                  int64_t row_step, double* norms, double* sums) {
  Vec<double> squares[2] = {};
  Square square{samples.channel_step, samples.sample_step, row_step, kDoubles, count};
  for (int64_t c = 0; c < samples.channels; c += kDoubles) {
    square.width = least(kDoubles, samples.channels - c);
    const E* from = x + c * square.channel_step;
    Vec<double> sum;
    if (square.sample_step != 1 || square.width < kDoubles) {
      sum = pack_square<kRagged>(from, square, pivot + c, panel + c, squares);
    } else if (count < kFloats) {
      sum = pack_square<kShort>(from, square, pivot + c, panel + c, squares);
    } else {
      sum = pack_square<kWhole>(from, square, pivot + c, panel + c, squares);
    }
    store_first(sums + c, load_first(sums + c, square.width) + sum, square.width);
  }
  for (int h = 0; h < 2; ++h) store(norms + h * kDoubles, squares[h]);
}

template <typename E, typename P>
void pack(const Samples& samples, const double* pivot, const Rows& to, double* sums) {
  const E* x = static_cast<const E*>(samples.data);
  P* panel = static_cast<P*>(to.panel);
  P* norms = static_cast<P*>(to.norms);
  double found[kFloats], total = 0;
  for (int64_t s = 0; s < samples.count;) {
    int64_t count;
    const E* from = x + s * samples.sample_step;
    P* row = panel + s * to.row_step;
    if (samples.channel_step == 1) {
      constexpr int kRows = 4;
      count = samples.count - s >= kRows ? kRows : 1;
      if (count == kRows) {
        pack_rows<E, P, kRows>(from, samples.sample_step, samples.channels, pivot, row, to.row_step, found, sums);
      } else {
        pack_rows<E, P, 1>(from, samples.sample_step, samples.channels, pivot, row, to.row_step, found, sums);
      }
    } else {
      count = least(kFloats, samples.count - s);
      pack_columns(from, samples, count, pivot, row, to.row_step, found, sums);
    }
    for (int64_t k = 0; k < count; ++k) {
      norms[(s + k) * to.norm_step] = static_cast<P>(found[k]);
      total += found[k];
    }
    s += count;
  }
  sums[samples.channels] += total;
}

// ---- sums and counts -----------------------------------------------------------------------------------------------------

void add_wide(double* total, const float* part, int64_t n) {
  int64_t i = 0;
  for (; i + kFloats <= n; i += kFloats) {
    Vec<double> value[2];
    load_doubles(part + i, value);
    for (int h = 0; h < 2; ++h) store(total + i + h * kDoubles, load(total + i + h * kDoubles) + value[h]);
  }
  for (; i < n; ++i) total[i] += static_cast<double>(part[i]);
}

template <typename E>
struct BitsOf;
template <>
struct BitsOf<Half> {
  typedef uint16_t type;
  static constexpr type kExponent = 0x7c00;
};
template <>
struct BitsOf<BFloat16> {
  typedef uint16_t type;
  static constexpr type kExponent = 0x7f80;
};
template <>
struct BitsOf<float> {
  typedef uint32_t type;
  static constexpr type kExponent = 0x7f800000;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type;
  static constexpr type kExponent = 0x7ff0000000000000;
};

template <typename E>
int64_t count_nonfinite(const void* memory, int64_t n, int64_t step) {
  using Word = typename BitsOf<E>::type;
  typedef Word Words __attribute__((vector_size(kVectorBytes)));
  typedef Word LooseWords __attribute__((vector_size(kVectorBytes), aligned(sizeof(Word)), may_alias));
  typedef Word LooseWord __attribute__((may_alias));
  constexpr Word kExponent = BitsOf<E>::kExponent;
  constexpr int kWords = kVectorBytes / static_cast<int>(sizeof(Word));
  // Rounds after which the counts of 16-bit lanes are emptied, before they overflow.
  constexpr int64_t kRounds = 32768;
  const LooseWord* x = static_cast<const LooseWord*>(memory);
  int64_t total = 0, i = 0;
  while (step == 1 && i + kWords <= n) {
    const int64_t end = least(n - kWords + 1, i + kRounds * kWords);
    Words counts{};
    for (; i < end; i += kWords) counts -= (Words)((*(const LooseWords*)(x + i) & kExponent) == kExponent);
    for (int l = 0; l < kWords; ++l) total += static_cast<int64_t>(counts[l]);
  }
  for (; i < n; ++i) total += (x[i * step] & kExponent) == kExponent;
  return total;
}

// ---- products ------------------------------------------------------------------------------------------------------------

// How a type is multiplied.
template <typename E>
constexpr bool kInPairs = false;
template <>
constexpr bool kInPairs<BFloat16> = kDotsPairs;

template <typename E, bool kPairs = kInPairs<E>>
struct FactorOf {
  typedef Accumulate<E> type;
};
template <typename E>
struct FactorOf<E, true> {
  typedef BFloat16Pair type;
};

template <typename E>
void pack_block(const Samples& samples, void* block) {
  const E* x = static_cast<const E*>(samples.data);
  using T = Accumulate<E>;
  T* to = static_cast<T*>(block);
  const int64_t step = samples.sample_step, channels = samples.channels;
  static_assert(cca::kBlock == kTile, "a block is what tiles are made of");
  constexpr int kWidth = kLanes<T>, kSamples = kInPairs<E> ? 2 * kWidth : kWidth;  // of a square
  if (samples.channel_step == 1) {
    for (int64_t s = 0; s < samples.count; s += kInPairs<E> ? 2 : 1) {
      for (int64_t c = 0; c < kTile; c += kWidth, to += kWidth) {
        const int64_t width = channels - c < 0 ? 0 : least(kWidth, channels - c);
        const E* first = x + s * step + c;
        if constexpr (kInPairs<E>) {
          store(to, zip_pairs(first, s + 1 < samples.count ? first + step : nullptr, width));
        } else {
          store(to, load_first(first, width));
        }
      }
    }
    return;
  }
  for (int64_t s = 0; s < samples.count; s += kSamples) {
    const int64_t count = least(kSamples, samples.count - s);
    const int64_t steps = kInPairs<E> ? (count + 1) / 2 : count;
    for (int64_t c = 0; c < kTile; c += kWidth) {
      Vec<T> rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        rows[i] = Vec<T>{};
        if (c + i >= channels) continue;
        E gathered[kSamples];
        const E* from = x + s * step + (c + i) * samples.channel_step;
        if (step != 1) {
          for (int64_t k = 0; k < count; ++k) gathered[k] = from[k * step];
          from = gathered;
        }
        if constexpr (kInPairs<E>) {
          rows[i] = load_neighbours(from, count);
        } else {
          rows[i] = count == kSamples ? load(from) : load_first(from, count);
        }
      }
      transpose<T>(rows);
      for (int64_t k = 0; k < steps; ++k) store(to + k * kTile + c, rows[k]);
    }
    to += steps * kTile;
  }
}

// In float64 throughout.
void add_wide_tile(const void* a, const void* b, int64_t steps, double* total, int64_t row_step, int64_t rows,
                   int64_t columns) {
  const double *left = static_cast<const double*>(a), *right = static_cast<const double*>(b);
  constexpr int kVectors = kTile / kDoubles, kRows = kTileRows * kTileVectors / kVectors;
  for (int first = 0; first < rows; first += kRows) {
    Vec<double> sums[kRows][kVectors] = {};
    for (int64_t step = 0; step < steps; ++step) {
      Vec<double> factors[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) factors[v] = load(right + step * kTile + v * kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] += left[step * kTile + first + r] * factors[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      double* to = total + (first + r) * row_step;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v, to += kDoubles) {
        const int64_t width = first + r < rows ? least(kDoubles, columns - v * kDoubles) : 0;
        if (width > 0) store_first(to, load_first(to, width) + sums[r][v], width);
      }
    }
  }
}

template <typename E>
void add_tile(const void* a, const void* b, int64_t steps, double* total, int64_t row_step, int64_t rows, int64_t columns) {
  using Factor = typename FactorOf<E>::type;
  const Factor *left = static_cast<const Factor*>(a), *right = static_cast<const Factor*>(b);
  if (rows == kTile && columns == kTile) {
    return tile_product(left, right, steps, [&](int row, const Vec<float>(&sums)[kTileVectors]) __attribute__((always_inline)) {
      double* to = total + row * row_step;
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v, to += kFloats) {
        Vec<double> sum[2];
        split(sums[v], sum);
        for (int h = 0; h < 2; ++h) store(to + h * kDoubles, load(to + h * kDoubles) + sum[h]);
      }
    });
  }
  float sums[kTile][kTile];
  tile_product(left, right, steps, [&](int row, const Vec<float>(&found)[kTileVectors]) __attribute__((always_inline)) {
    for (int v = 0; v < kTileVectors; ++v) store(sums[row] + v * kFloats, found[v]);
  });
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) total[r * row_step + c] += static_cast<double>(sums[r][c]);
  }
}

}  // namespace

#define FOURFOLD_PACK(E) {pack<E, float>, pack<E, double>}

extern const cca::Kernels cca_kernels = {
    {FOURFOLD_PACK(Half), FOURFOLD_PACK(BFloat16), FOURFOLD_PACK(float), FOURFOLD_PACK(double)},
    add_wide,
    {count_nonfinite<Half>, count_nonfinite<BFloat16>, count_nonfinite<float>, count_nonfinite<double>},
    {1, kInPairs<BFloat16> ? 2 : 1, 1, 1},
    {pack_block<Half>, pack_block<BFloat16>, pack_block<float>, pack_block<double>},
    {add_tile<Half>, add_tile<BFloat16>, add_tile<float>, add_wide_tile},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
