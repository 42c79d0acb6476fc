// The horizontal half of the forward transform: rows of coefficients in a buffer to planes or blocks in memory.
#pragma once

#include "blockdct/kernels.h"
#include "blockdct/transform.h"
#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using blockdct::Form;
using blockdct::Plane;

FOURFOLD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// Vectors that fill a cache line. Stores past the caches are fast only where a line's parts follow each other.
template <typename E>
constexpr int kPerLine = larger(1, 64 / (kLanes<Accumulate<E>> * static_cast<int>(sizeof(E))));

// Coefficients of one group of kLanes blocks, slots[slot], to blocks that hold theirs contiguously.
template <typename E>
FOURFOLD_INLINE void blocks_out(const Plane& p, E* coefs, int64_t block, int64_t count, const Vec<Accumulate<E>>* slots) {
  using T = Accumulate<E>;
  E* address[kLanes<T>];
  for (int64_t k = 0; k < count; ++k) address[k] = coefs + (block + k) / p.cols * p.coef_i + (block + k) % p.cols * p.coef_j;
  for (int64_t f = 0; f < p.kept; f += kLanes<T>) {
    const int64_t n = least(kLanes<T>, p.kept - f);
    Vec<T> rows[kLanes<T>];
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) rows[k] = slots[f + k];
    transpose<T>(rows);
    if (n == kLanes<T> && count == kLanes<T>) {
#pragma GCC unroll 16
      for (int k = 0; k < kLanes<T>; ++k) p.stream ? store_stream(address[k] + f, rows[k]) : store(address[k] + f, rows[k]);
    } else {
      for (int64_t k = 0; k < count; ++k) store_first(address[k] + f, rows[k], n);
    }
  }
}

template <int N>
FOURFOLD_INLINE bool row_is_kept(const Plane& p, int u) {
  for (int v = 0; v < N; ++v) {
    if (p.slots[u * N + v] >= 0) return true;
  }
  return false;
}

template <typename T, int N>
FOURFOLD_INLINE void load_row(const T* row, Vec<T>* v) {
#pragma GCC unroll 32
  for (int k = 0; k < N; ++k) v[k] = *(const Loose<T>*)(row + k * kLanes<T>);
}
template <typename T, int N>
FOURFOLD_INLINE void store_row(T* row, const Vec<T>* v) {
#pragma GCC unroll 32
  for (int k = 0; k < N; ++k) *(Loose<T>*)(row + k * kLanes<T>) = v[k];
}
template <typename T, int N>
FOURFOLD_INLINE void scale_row(Vec<T>* v, const T* scale, int u) {
  if (scale == nullptr) return;
#pragma GCC unroll 32
  for (int k = 0; k < N; ++k) v[k] *= scale[u * N + k];
}

// Frequencies (u, 0 .. N-1) of n blocks, one cache line's worth or less, to their planes; `at`: the first block. Any
// frequencies and any n; out of line, so that the common case below keeps its registers.
template <typename E, int N>
__attribute__((noinline)) void some_planes_out(const Plane& p, E* at, int u, int64_t n,
                                               const Vec<Accumulate<E>> (&v)[kPerLine<E>][N]) {
  using T = Accumulate<E>;
  for (int k = 0; k < N; ++k) {
    const int64_t slot = p.slots[u * N + k];
    if (slot < 0) continue;
    for (int part = 0; part < kPerLine<E> && part * kLanes<T> < n; ++part) {
      E* to = at + slot * p.coef_f + part * kLanes<T>;
      const int64_t left = n - part * kLanes<T>;
      left < kLanes<T> ? store_first(to, v[part][k], left) : store(to, v[part][k]);
    }
  }
}

template <typename E, int N>
FOURFOLD_INLINE void planes_out(const Plane& p, E* to, const Vec<Accumulate<E>> (&v)[kPerLine<E>][N]) {
  using T = Accumulate<E>;
#pragma GCC unroll 32
  for (int k = 0; k < N; ++k, to += p.coef_f) {
#pragma GCC unroll 4
    for (int part = 0; part < kPerLine<E>; ++part) {
      p.stream ? store_stream(to + part * kLanes<T>, v[part][k]) : store(to + part * kLanes<T>, v[part][k]);
    }
  }
}

// Blocks [block, block + count) of a plane. buffer holds their columns after the vertical transform, frequency u in row u, rows
// `pitch` apart; form pixels leaves its coefficients there.
template <typename E, int N, Form kForm>
FOURFOLD_INLINE void rows_out(const Plane& plane, Accumulate<E>* buffer, int64_t pitch, E* coefs, const Accumulate<E>* scale,
                              int64_t block, int64_t count) {
  using T = Accumulate<E>;
  const Plane p = plane;  // a copy that no store can alias
  const auto transform_row = [&](int u, int64_t at, Vec<T>* v) __attribute__((always_inline)) {
    load_row<T, N>(buffer + u * pitch + at * N, v);
    split_blocks<T, N>(v);
    dct<T, N, N>(v);
    scale_row<T, N>(v, scale, u);
  };
  if constexpr (kForm == Form::block) {
    alignas(64) Vec<T> slots[N * N + kLanes<T>];
    for (int64_t at = 0; at < count; at += kLanes<T>) {
      for (int u = 0; u < N; ++u) {
        if (!row_is_kept<N>(p, u)) continue;
        Vec<T> v[N];
        transform_row(u, at, v);
#pragma GCC unroll 32
        for (int k = 0; k < N; ++k) {
          if (p.slots[u * N + k] >= 0) slots[p.slots[u * N + k]] = v[k];
        }
      }
      blocks_out(p, coefs, block + at, least(kLanes<T>, count - at), slots);
    }
  } else {
    for (int u = 0; u < N; ++u) {
      if (!row_is_kept<N>(p, u)) continue;
      constexpr int kLine = kForm == Form::plane ? kPerLine<E> : 1;
      for (int64_t at = 0; at < count; at += kLine * kLanes<T>) {
        Vec<T> v[kLine][N];
#pragma GCC unroll 4
        for (int part = 0; part < kLine; ++part) {
          if (part == 0 || at + part * kLanes<T> < count) transform_row(u, at + part * kLanes<T>, v[part]);
        }
        if constexpr (kForm == Form::plane) {
          E* to = coefs + block + at;
          if (p.in_order && count - at >= kLine * kLanes<T>) {
            planes_out<E, N>(p, to + u * N * p.coef_f, v);
          } else {
            some_planes_out<E, N>(plane, to, u, count - at, v);
          }
        } else {
          join_blocks<T, N>(v[0]);
          store_row<T, N>(buffer + u * pitch + at * N, v[0]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace FOURFOLD_ISA
}  // namespace fourfold
