// The orthonormal DCT-II on vectors: down rows of registers (every lane a column, or a block) and along lanes.
#pragma once

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

constexpr double kPi = 3.14159265358979323846264338327950288;

// cos by its Taylor series, exact to double precision on [0, pi/4].
constexpr double cos_small(double x) {
  double term = 1, sum = 1;
  for (int k = 1; k < 14; ++k) sum += (term *= -x * x / ((2 * k - 1) * (2 * k)));
  return sum;
}
constexpr double sin_small(double x) {
  double term = x, sum = x;
  for (int k = 1; k < 14; ++k) sum += (term *= -x * x / ((2 * k) * (2 * k + 1)));
  return sum;
}

// cos(pi * a / b) for a, b > 0, by octant.
constexpr double cos_pi(int a, int b) {
  a %= 2 * b;
  if (a > b) a = 2 * b - a;
  const bool negative = 2 * a > b;
  if (negative) a = b - a;
  const double value = 4 * a <= b ? cos_small(kPi * a / b) : sin_small(kPi * (b - 2 * a) / (2 * b));
  return negative ? -value : value;
}

constexpr double square_root(double x) {
  double r = x < 1 ? 1 : x;
  for (int k = 0; k < 64; ++k) r = 0.5 * (r + x / r);
  return r;
}

// Odd rows of the orthonormal DCT-II that splits a transform of length `kTop` in halves: [k][n] for frequency 2k + 1 of an
// n-point stage.
template <typename T, int N, int kTop>
struct OddRows {
  T at[N / 2][N / 2];
  constexpr OddRows() : at{} {
    const double norm = square_root(2.0 / kTop);
    for (int k = 0; k < N / 2; ++k) {
      for (int n = 0; n < N / 2; ++n) at[k][n] = static_cast<T>(norm * cos_pi((2 * n + 1) * (2 * k + 1), 2 * N));
    }
  }
};

// x[k * stride] <- DCT-II of x[n * stride], orthonormal for kTop points: sums go to the even frequencies by a transform of half
// the length, differences to the odd ones by a dense matrix.
template <typename T, int N, int kTop>
FOURFOLD_INLINE void dct(Vec<T>* x) {
  if constexpr (N == 1) {
    constexpr T norm = static_cast<T>(square_root(1.0 / kTop));
    x[0] *= norm;
  } else {
    static constexpr OddRows<T, N, kTop> rows{};
    Vec<T> sum[N / 2], difference[N / 2];
#pragma GCC unroll 16
    for (int n = 0; n < N / 2; ++n) {
      sum[n] = x[n] + x[N - 1 - n];
      difference[n] = x[n] - x[N - 1 - n];
    }
    dct<T, N / 2, kTop>(sum);
#pragma GCC unroll 16
    for (int k = 0; k < N / 2; ++k) {
      Vec<T> odd = difference[0] * rows.at[k][0];
#pragma GCC unroll 16
      for (int n = 1; n < N / 2; ++n) odd += difference[n] * rows.at[k][n];
      x[2 * k] = sum[k];
      x[2 * k + 1] = odd;
    }
  }
}

// The transpose of dct, which is its inverse.
template <typename T, int N, int kTop>
FOURFOLD_INLINE void idct(Vec<T>* x) {
  if constexpr (N == 1) {
    constexpr T norm = static_cast<T>(square_root(1.0 / kTop));
    x[0] *= norm;
  } else {
    static constexpr OddRows<T, N, kTop> rows{};
    Vec<T> even[N / 2], odd[N / 2];
#pragma GCC unroll 16
    for (int k = 0; k < N / 2; ++k) even[k] = x[2 * k];
    idct<T, N / 2, kTop>(even);
#pragma GCC unroll 16
    for (int n = 0; n < N / 2; ++n) {
      odd[n] = x[1] * rows.at[0][n];
#pragma GCC unroll 16
      for (int k = 1; k < N / 2; ++k) odd[n] += x[2 * k + 1] * rows.at[k][n];
    }
#pragma GCC unroll 16
    for (int n = 0; n < N / 2; ++n) {
      x[n] = even[n] + odd[n];
      x[N - 1 - n] = even[n] - odd[n];
    }
  }
}

// N vectors of consecutive columns <-> column k of kLanes blocks in vector k.
template <typename T, int N>
FOURFOLD_INLINE void split_blocks(Vec<T>* x) {
#pragma GCC unroll 5
  for (int run = N; run > 1; run /= 2) {  // runs of vectors still in order; evens go to a run's first half
    Vec<T> next[N];
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; ++i) {
      const int start = (2 * i) / run * run, j = (2 * i) % run / 2;
      deinterleave<T>(x[start + 2 * j], x[start + 2 * j + 1], next[start + j], next[start + run / 2 + j]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) x[i] = next[i];
  }
  // Vector i now holds the column whose number is i with its bits reversed.
  Vec<T> ordered[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) {
    int reversed = 0;
#pragma GCC unroll 5
    for (int bit = 1; bit < N; bit *= 2) reversed = 2 * reversed + ((i & bit) != 0);
    ordered[reversed] = x[i];
  }
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) x[i] = ordered[i];
}

template <typename T, int N>
FOURFOLD_INLINE void join_blocks(Vec<T>* x) {
  Vec<T> ordered[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) {
    int reversed = 0;
#pragma GCC unroll 5
    for (int bit = 1; bit < N; bit *= 2) reversed = 2 * reversed + ((i & bit) != 0);
    ordered[i] = x[reversed];
  }
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) x[i] = ordered[i];
#pragma GCC unroll 5
  for (int run = 2; run <= N; run *= 2) {
    Vec<T> next[N];
#pragma GCC unroll 32
    for (int i = 0; i < N / 2; ++i) {
      const int start = (2 * i) / run * run, j = (2 * i) % run / 2;
      interleave<T>(x[start + j], x[start + run / 2 + j], next[start + 2 * j], next[start + 2 * j + 1]);
    }
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) x[i] = next[i];
  }
}

// ---- along lanes ---------------------------------------------------------------------------------------------------------
//
// Where a vector holds whole rows of blocks (N <= 8 and N <= lanes), the horizontal transform can stay inside the vector: no
// buffer, and coefficients come out beside each other. A rotation within groups of four lanes and a multiply-add per term; for
// N = 8 sums and differences are formed first, s0 s1 s2 s3 d3 d2 d1 d0, so that four terms are enough.

template <int N>
constexpr int kGroup = N < 4 ? N : 4;  // lanes that are rotated among each other

template <int N>
struct Reversed {
  static constexpr int at(int lane) { return lane / N * N + N - 1 - lane % N; }
};
template <int N, int kBy>
struct Rotated {
  static constexpr int at(int lane) { return lane / kGroup<N> * kGroup<N> + (lane + kBy) % kGroup<N>; }
};
// dct_lanes leaves the frequencies of 8-point rows as 0 2 4 6 1 3 5 7.
template <int N>
constexpr int place_of(int frequency) {
  return N < 8 ? frequency : frequency % 2 * 4 + frequency / 2;
}
template <int N>
struct InOrder {
  static constexpr int at(int lane) { return lane / N * N + place_of<N>(lane % N); }
};
template <int N>
struct Apart {  // the inverse of InOrder
  static constexpr int at(int lane) { return lane / N * N + (N < 8 ? lane % N : lane % N % 4 * 2 + lane % N / 4); }
};

template <typename T, int N>
struct LaneFactors {
  T sign[kLanes<T>];                // of the vector's own lane in sums and differences
  T forward[kGroup<N>][kLanes<T>];  // [rotation][lane]
  T inverse[kGroup<N>][kLanes<T>];
  static constexpr double basis(int frequency, int n) {
    return square_root((frequency == 0 ? 1.0 : 2.0) / N) * (frequency == 0 ? 1.0 : cos_pi((2 * n + 1) * frequency, 2 * N));
  }
  constexpr LaneFactors() : sign{}, forward{}, inverse{} {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      const int own = lane % N;
      const bool odd = N == 8 && own >= 4;  // the half that holds differences, in reverse, and odd frequencies
      sign[lane] = odd ? -1 : 1;
      for (int by = 0; by < kGroup<N>; ++by) {
        const int other = own / kGroup<N> * kGroup<N> + (own + by) % kGroup<N>;
        const auto frequency = [&](int place) { return N < 8 ? place : place % 4 * 2 + place / 4; };
        const auto sample = [&](int place) { return odd ? 7 - place : place; };
        forward[by][lane] = static_cast<T>(basis(frequency(own), sample(other)));
        inverse[by][lane] = static_cast<T>(basis(frequency(other), sample(own)));
      }
    }
  }
};

template <typename T, int N>
FOURFOLD_INLINE Vec<T> rotations_times(Vec<T> x, const T (&factors)[kGroup<N>][kLanes<T>]) {
  Vec<T> sum = x * *(const Vec<T>*)factors[0];
  sum += permute<T, Rotated<N, 1>>(x) * *(const Vec<T>*)factors[1];
  if constexpr (kGroup<N> == 4) {
    sum += permute<T, Rotated<N, 2>>(x) * *(const Vec<T>*)factors[2];
    sum += permute<T, Rotated<N, 3>>(x) * *(const Vec<T>*)factors[3];
  }
  return sum;
}

template <typename T, int N>
FOURFOLD_INLINE Vec<T> dct_lanes(Vec<T> x) {
  alignas(64) static constexpr LaneFactors<T, N> factors{};
  if constexpr (N == 8) x = x * *(const Vec<T>*)factors.sign + permute<T, Reversed<N>>(x);
  return rotations_times<T, N>(x, factors.forward);
}

// From frequencies in the order that dct_lanes leaves.
template <typename T, int N>
FOURFOLD_INLINE Vec<T> idct_lanes(Vec<T> x) {
  alignas(64) static constexpr LaneFactors<T, N> factors{};
  x = rotations_times<T, N>(x, factors.inverse);
  if constexpr (N == 8) x = x * *(const Vec<T>*)factors.sign + permute<T, Reversed<N>>(x);
  return x;
}

// N rows of kLanes / N blocks each, frequencies as dct_lanes leaves them <-> the blocks one after the other, in order.
template <int N, int kChunks>
struct EvenChunks {  // of two rows of kChunks blocks
  static constexpr int at(int lane) {
    return lane / N % (kChunks / 2) * 2 * N + lane / N / (kChunks / 2) * N * kChunks + lane % N;
  }
};
template <int N, int kChunks, int kOdd, bool kOrder>
struct Chunks {
  static constexpr int at(int lane) { return EvenChunks<N, kChunks>::at(kOrder ? InOrder<N>::at(lane) : lane) + kOdd * N; }
};
template <int N, int kChunks, int kHigh, bool kApart>
struct Joined {
  static constexpr int at(int lane) {
    const int chunk = lane / N + kHigh * kChunks, own = kApart ? Apart<N>::at(lane % N) : lane % N;
    return (chunk / 2 + chunk % 2 * kChunks) * N + own;
  }
};

// One round: rows 2i and 2i + 1 to their even and odd chunks.
template <typename T, int N, bool kOrder>
FOURFOLD_INLINE void part_chunks(Vec<T>* x) {
  constexpr int kChunks = kLanes<T> / N;
  Vec<T> next[N];
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i) {
    next[i] = permute<T, Chunks<N, kChunks, 0, kOrder>>(x[2 * i], x[2 * i + 1]);
    next[N / 2 + i] = permute<T, Chunks<N, kChunks, 1, kOrder>>(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = next[i];
}

// Its inverse.
template <typename T, int N, bool kApart>
FOURFOLD_INLINE void join_chunks(Vec<T>* x) {
  constexpr int kChunks = kLanes<T> / N;
  Vec<T> next[N];
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i) {
    next[2 * i] = permute<T, Joined<N, kChunks, 0, kApart>>(x[i], x[N / 2 + i]);
    next[2 * i + 1] = permute<T, Joined<N, kChunks, 1, kApart>>(x[i], x[N / 2 + i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = next[i];
}

// Vector i then holds the blocks' elements from i * kLanes on.
template <typename T, int N>
FOURFOLD_INLINE void rows_to_blocks(Vec<T>* x) {
  constexpr int kChunks = kLanes<T> / N;
  if constexpr (kChunks == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = permute<T, InOrder<N>>(x[i]);
  } else if constexpr (kChunks > N) {
    static_assert(N == 2, "one round is enough for two rows only");
    join_chunks<T, N, false>(x);
  } else {
    part_chunks<T, N, true>(x);
    if constexpr (kChunks == 4) part_chunks<T, N, false>(x);
  }
}

template <typename T, int N>
FOURFOLD_INLINE void blocks_to_rows(Vec<T>* x) {
  constexpr int kChunks = kLanes<T> / N;
  if constexpr (kChunks == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = permute<T, Apart<N>>(x[i]);
  } else if constexpr (kChunks > N) {
    part_chunks<T, N, false>(x);
  } else {
    if constexpr (kChunks == 4) join_chunks<T, N, false>(x);
    join_chunks<T, N, true>(x);
  }
}

// Whether rows of blocks are transformed along lanes: the vector holds whole rows.
template <typename T, int N>
constexpr bool kAlongLanes = N <= 8 && N <= kLanes<T>;

}  // namespace
}  // namespace FOURFOLD_ISA
}  // namespace fourfold
