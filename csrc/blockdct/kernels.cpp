// Block DCT kernels, compiled once per ISA tier. Lanes run over contiguous columns for the vertical transform. Where the
// frequencies of a block come out together, the horizontal one follows inside the vectors. Where they go to planes, rows of
// coefficients pass through a small buffer and are de-interleaved so that a lane is a block and the horizontal transform is the
// same code again; blocks are taken in row-major order across rows of blocks, so narrow images fill their vectors too.
#include "blockdct/kernels.h"

#include "blockdct/rows.h"
#include "blockdct/transform.h"
#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using blockdct::Edge;
using blockdct::Form;
using blockdct::Plane;

// ---- pixels --------------------------------------------------------------------------------------------------------------

// n pixels (1 <= n <= lanes) from p on, every `step` elements; `whole`: a full vector may be read.
template <typename E>
FOURFOLD_INLINE Vec<Accumulate<E>> load_pixels(const E* p, int64_t step, int64_t n, bool whole) {
  if (step == 1) return whole ? load(p) : load_first(p, n);
  E lanes[kLanes<Accumulate<E>>] = {};
  for (int64_t k = 0; k < n; ++k) lanes[k] = p[k * step];
  return load(lanes);
}

template <typename E>
FOURFOLD_INLINE void store_pixels(E* p, int64_t step, int64_t n, Vec<Accumulate<E>> x, bool stream) {
  if (step == 1) {
    if (n < kLanes<Accumulate<E>>) return store_first(p, x, n);
    return stream ? store_stream(p, x) : store(p, x);
  }
  E lanes[kLanes<Accumulate<E>>];
  store(lanes, x);
  for (int64_t k = 0; k < n; ++k) p[k * step] = lanes[k];
}

// A run of blocks of one row of blocks.
struct Run {
  int64_t i, j;   // the first block
  int64_t count;  // blocks
  int64_t start;  // blocks before it in the range that was cut into runs
};

// Calls visit(run) for each row of blocks that blocks [first, last), in row-major order, touch.
template <typename Visit>
FOURFOLD_INLINE void for_each_run(const Plane& p, int64_t first, int64_t last, Visit visit) {
  int64_t i = first / p.cols, j = first % p.cols;
  for (int64_t block = first; block < last; ++i, j = 0) {
    const int64_t count = least(p.cols - j, last - block);
    visit(Run{i, j, count, block - first});
    block += count;
  }
}

// The vertical transform: calls take(c, v) for each vector of columns of the run, c columns from its start, v[u] frequency u.
template <typename E, int N, typename Take>
FOURFOLD_INLINE void columns_in(const Plane& p, const E* image, const Run& run, Take take) {
  using T = Accumulate<E>;
  const int64_t y = run.i * N, x = run.j * N;
  const int64_t columns = run.count * N, inside = least(columns, p.width - x);  // of these the image has
  const bool zeros = p.edge == Edge::zeros;
  const Vec<T> shift = broadcast(static_cast<T>(p.shift));
  const E* rows[N];  // rows below the image are its last one again, or null for zeros
  for (int64_t r = 0; r < N; ++r) {
    const bool below = y + r >= p.height;
    rows[r] = zeros && below ? nullptr : image + (below ? p.height - 1 : y + r) * p.image_row + x * p.image_col;
  }
  const E* origin = rows[0];
  const bool plain = p.image_col == 1 && y + N <= p.height;
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    const bool whole = x + c + kLanes<T> <= p.width;
    Vec<T> v[N];
    if (plain && whole) {
#pragma GCC unroll 32
      for (int r = 0; r < N; ++r) v[r] = load(origin + c + r * p.image_row) + shift;
    } else {
      const int64_t n = least(kLanes<T>, inside - c);  // columns of the image in this vector; 0 or less: all are beyond it
      for (int r = 0; r < N; ++r) {
        if (rows[r] == nullptr || (zeros && n <= 0)) {
          v[r] = Vec<T>{};
          continue;
        }
        const T edge = zeros ? T{0} : load_one(rows[r] + (inside - 1) * p.image_col) + static_cast<T>(p.shift);
        v[r] = n <= 0 ? broadcast(edge)
                      : fill_after(load_pixels(rows[r] + c * p.image_col, p.image_col, n, whole) + shift, n, edge);
      }
    }
    dct<T, N, N>(v);
    take(c, v);
  }
}

// The vertical inverse: give(c, v) fills v with the frequencies of a vector of columns, which become pixels of the run.
template <typename E, int N, typename Give>
FOURFOLD_INLINE void columns_out(const Plane& p, E* image, const Run& run, Give give) {
  using T = Accumulate<E>;
  const int64_t y = run.i * N, x = run.j * N;
  const int64_t inside = least(run.count * N, p.width - x), height = least(N, p.height - y);
  E* origin = image + y * p.image_row + x * p.image_col;
  const Vec<T> shift = broadcast(static_cast<T>(p.shift));
  constexpr int kLine = kPerLine<E> * kLanes<T>;
  for (int64_t c = 0; c < inside; c += kLine) {
    const int64_t n = least(kLine, inside - c);
    Vec<T> v[kPerLine<E>][N];
#pragma GCC unroll 4
    for (int part = 0; part < kPerLine<E>; ++part) {
      if (part > 0 && part * kLanes<T> >= n) break;
      give(c + part * kLanes<T>, v[part]);
      idct<T, N, N>(v[part]);
    }
    if (n == kLine && p.image_col == 1 && height == N) {
#pragma GCC unroll 32
      for (int r = 0; r < N; ++r) {
#pragma GCC unroll 4
        for (int part = 0; part < kPerLine<E>; ++part) {
          E* to = origin + c + part * kLanes<T> + r * p.image_row;
          p.stream ? store_stream(to, v[part][r] - shift) : store(to, v[part][r] - shift);
        }
      }
      continue;
    }
    for (int part = 0; part * kLanes<T> < n; ++part) {
      if (p.edge == Edge::fold) {
        for (int64_t r = height; r < N; ++r) v[part][height - 1] += v[part][r];
      }
      E* to = origin + (c + part * kLanes<T>)*p.image_col;
      for (int64_t r = 0; r < height; ++r) {
        store_pixels(to + r * p.image_row, p.image_col, least(kLanes<T>, n - part * kLanes<T>), v[part][r] - shift, false);
      }
    }
  }
}

// ---- along lanes: forms block and pixels, all frequencies in order
// -----------------------------------------------------------

// scale [N*N] as one vector per row of frequencies, in the order that dct_lanes leaves.
template <typename T, int N>
FOURFOLD_INLINE void lane_factors(const T* scale, Vec<T>* factors) {
  for (int u = 0; u < N; ++u) {
    for (int k = 0; k < kLanes<T>; ++k) factors[u][k] = scale == nullptr ? T{1} : scale[u * N + Apart<N>::at(k) % N];
  }
}

template <typename E, int N>
void forward_along_lanes(const Plane& plane, const E* image, E* coefs, const Accumulate<E>* scale, int64_t first,
                         int64_t last) {
  using T = Accumulate<E>;
  const Plane p = plane;                // a copy that no store can alias
  constexpr int kRows = kLanes<T> / N;  // blocks that a vector crosses
  Vec<T> factors[N];
  lane_factors<T, N>(scale, factors);
  for_each_run(p, first, last, [&](const Run& run) __attribute__((always_inline)) {
    columns_in<E, N>(p, image, run, [&](int64_t c, Vec<T>* v) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) v[u] = dct_lanes<T, N>(v[u]);
      if (scale != nullptr) {
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) v[u] *= factors[u];
      }
      if (p.form == Form::pixels) {
        E* to = coefs + run.i * N * p.coef_u + (run.j * N + c) * p.coef_v;
        const int64_t n = least(kLanes<T>, run.count * N - c);
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) {
          store_pixels(to + u * p.coef_u, p.coef_v, n, permute<T, InOrder<N>>(v[u]), p.stream && kPerLine<E> == 1);
        }
        return;
      }
      E* to = coefs + run.i * p.coef_i + (run.j + c / N) * p.coef_j;
      const int64_t n = least(kRows, run.count - c / N);
      rows_to_blocks<T, N>(v);
#pragma GCC unroll 8
      for (int part = 0; part < N; ++part) {
        const int64_t element = part * kLanes<T>, left = n * N * N - element;
        if (left <= 0) break;
        E* at = to + element / (N * N) * p.coef_j + element % (N * N);
        if (kLanes<T> > N * N && p.coef_j != N * N) {  // blocks smaller than a vector, apart from each other
          E lanes[kLanes<T>];
          store(lanes, v[part]);
          for (int64_t k = 0; k < least(kLanes<T>, left); ++k) at[k / (N * N) * p.coef_j + k % (N * N)] = lanes[k];
        } else if (left < kLanes<T>) {
          store_first(at, v[part], left);
        } else {
          p.stream ? store_stream(at, v[part]) : store(at, v[part]);
        }
      }
    });
  });
}

template <typename E, int N>
void inverse_along_lanes(const Plane& plane, const E* coefs, E* image, const Accumulate<E>* scale, int64_t first,
                         int64_t last) {
  using T = Accumulate<E>;
  const Plane p = plane;  // a copy that no store can alias
  constexpr int kRows = kLanes<T> / N;
  Vec<T> factors[N];
  lane_factors<T, N>(scale, factors);
  for_each_run(p, first, last, [&](const Run& run) __attribute__((always_inline)) {
    const int64_t inside = p.width - run.j * N;
    columns_out<E, N>(p, image, run, [&](int64_t c, Vec<T>* v) __attribute__((always_inline)) {
      if (p.form == Form::pixels) {
        const E* from = coefs + run.i * N * p.coef_u + (run.j * N + c) * p.coef_v;
        const int64_t n = least(kLanes<T>, run.count * N - c);
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) {
          v[u] = permute<T, Apart<N>>(load_pixels(from + u * p.coef_u, p.coef_v, n, n == kLanes<T>));
        }
      } else {
        const E* from = coefs + run.i * p.coef_i + (run.j + c / N) * p.coef_j;
        const int64_t n = least(kRows, run.count - c / N);
#pragma GCC unroll 8
        for (int part = 0; part < N; ++part) {
          const int64_t element = part * kLanes<T>, left = n * N * N - element;
          const E* at = from + element / (N * N) * p.coef_j + element % (N * N);
          if (left <= 0) {
            v[part] = Vec<T>{};
          } else if (kLanes<T> > N * N && p.coef_j != N * N) {
            E lanes[kLanes<T>] = {};
            for (int64_t k = 0; k < least(kLanes<T>, left); ++k) lanes[k] = at[k / (N * N) * p.coef_j + k % (N * N)];
            v[part] = load(lanes);
          } else {
            v[part] = left < kLanes<T> ? load_first(at, left) : load(at);
          }
        }
        blocks_to_rows<T, N>(v);
      }
      if (scale != nullptr) {
#pragma GCC unroll 8
        for (int u = 0; u < N; ++u) v[u] *= factors[u];
      }
#pragma GCC unroll 8
      for (int u = 0; u < N; ++u) v[u] = idct_lanes<T, N>(v[u]);
      if (p.edge == Edge::fold && inside - c < kLanes<T>) {
        for (int u = 0; u < N; ++u) {
          for (int64_t k = inside - c; k < kLanes<T>; ++k) v[u][inside - c - 1] += v[u][k];
        }
      }
    });
  });
}

// ---- through a buffer: any form, any frequencies
// -----------------------------------------------------------------------------

// A tile fills a good part of the first-level cache: each frequency's plane then receives several cache lines in a row, which
// the memory system takes far better than one here and one there.
template <typename E, int N>
struct Tile {
  using T = Accumulate<E>;
  static constexpr int kBytes = 32768;
  static constexpr int kBlocks = larger(kPerLine<E> * kLanes<T>, smaller(256, kBytes / (N * N * static_cast<int>(sizeof(T)))));
  static constexpr int kGroups = kBlocks / kLanes<T>;
  static constexpr int kPitch = kBlocks * N + kLanes<T>;  // columns, and room for a run's last vector to spill over
};

template <typename E>
FOURFOLD_INLINE void blocks_in(const Plane& p, const E* coefs, int64_t block, int64_t count, Vec<Accumulate<E>>* slots) {
  using T = Accumulate<E>;
  const E* address[kLanes<T>];
  for (int64_t k = 0; k < count; ++k) address[k] = coefs + (block + k) / p.cols * p.coef_i + (block + k) % p.cols * p.coef_j;
  for (int64_t f = 0; f < p.kept; f += kLanes<T>) {
    const int64_t n = least(kLanes<T>, p.kept - f);
    Vec<T> rows[kLanes<T>];
    if (n == kLanes<T> && count == kLanes<T>) {
#pragma GCC unroll 16
      for (int k = 0; k < kLanes<T>; ++k) rows[k] = load(address[k] + f);
    } else {
      for (int64_t k = 0; k < kLanes<T>; ++k) rows[k] = k < count ? load_first(address[k] + f, n) : Vec<T>{};
    }
    transpose<T>(rows);
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) slots[f + k] = rows[k];
  }
}

template <typename E, int N>
__attribute__((noinline)) void some_planes_in(const Plane& p, const E* at, int u, int64_t n, Vec<Accumulate<E>>* v) {
  using T = Accumulate<E>;
  for (int k = 0; k < N; ++k) {
    const int64_t slot = p.slots[u * N + k];
    const E* from = at + slot * p.coef_f;
    v[k] = slot < 0 ? Vec<T>{} : n < kLanes<T> ? load_first(from, n) : load(from);
  }
}

template <typename E, int N>
FOURFOLD_INLINE void planes_in(const Plane& p, const E* from, Vec<Accumulate<E>>* v) {
#pragma GCC unroll 32
  for (int k = 0; k < N; ++k, from += p.coef_f) {
    // N*N short streams are more than a processor follows by itself: fetch the next tile while this one is in work.
    if (p.large) __builtin_prefetch(from + Tile<E, N>::kBlocks);
    v[k] = load(from);
  }
}

template <typename E, int N, Form kForm>
void forward_buffered(const Plane& plane, const E* image, E* coefs, const Accumulate<E>* scale, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  const Plane p = plane;  // a copy that no store can alias
  using Tile = Tile<E, N>;
  alignas(64) T buffer[N * Tile::kPitch];
  for (int64_t block = first; block < last; block += Tile::kBlocks) {
    const int64_t count = least(Tile::kBlocks, last - block);
    for_each_run(p, block, block + count, [&](const Run& run) __attribute__((always_inline)) {
      columns_in<E, N>(p, image, run, [&](int64_t c, Vec<T>* v) __attribute__((always_inline)) {
        T* to = buffer + run.start * N + c;
#pragma GCC unroll 32
        for (int u = 0; u < N; ++u) *(Loose<T>*)(to + u * Tile::kPitch) = v[u];
      });
    });
    rows_out<E, N, kForm>(plane, buffer, Tile::kPitch, coefs, scale, block, count);
    if constexpr (kForm == Form::pixels) {
      for_each_run(p, block, block + count, [&](const Run& run) __attribute__((always_inline)) {
        E* to = coefs + run.i * N * p.coef_u + run.j * N * p.coef_v;
        for (int u = 0; u < N; ++u) {
          const T* from = buffer + u * Tile::kPitch + run.start * N;
          for (int64_t c = 0; c < run.count * N; c += kLanes<T>) {
            store_pixels(to + u * p.coef_u + c * p.coef_v, p.coef_v, least(kLanes<T>, run.count * N - c),
                         *(const Loose<T>*)(from + c), p.stream && kPerLine<E> == 1);
          }
        }
      });
    }
  }
}

template <typename E, int N, Form kForm>
void inverse_buffered(const Plane& plane, const E* coefs, E* image, const Accumulate<E>* scale, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  const Plane p = plane;  // a copy that no store can alias
  using Tile = Tile<E, N>;
  alignas(64) T buffer[N * Tile::kPitch];
  for (int64_t block = first; block < last; block += Tile::kBlocks) {
    const int64_t count = least(Tile::kBlocks, last - block);
    const auto transform_row = [&](int u, int64_t at, Vec<T>* v) __attribute__((always_inline)) {
      scale_row<T, N>(v, scale, u);
      idct<T, N, N>(v);
      join_blocks<T, N>(v);
      store_row<T, N>(buffer + u * Tile::kPitch + at * N, v);
    };
    if constexpr (kForm == Form::block) {
      alignas(64) Vec<T> slots[N * N + kLanes<T>];
      for (int64_t at = 0; at < count; at += kLanes<T>) {
        blocks_in(p, coefs, block + at, least(kLanes<T>, count - at), slots);
        for (int u = 0; u < N; ++u) {
          Vec<T> v[N];
#pragma GCC unroll 32
          for (int k = 0; k < N; ++k) v[k] = p.slots[u * N + k] < 0 ? Vec<T>{} : slots[p.slots[u * N + k]];
          transform_row(u, at, v);
        }
      }
    } else {
      if constexpr (kForm == Form::pixels) {
        for_each_run(p, block, block + count, [&](const Run& run) __attribute__((always_inline)) {
          const E* from = coefs + run.i * N * p.coef_u + run.j * N * p.coef_v;
          for (int u = 0; u < N; ++u) {
            T* to = buffer + u * Tile::kPitch + run.start * N;
            for (int64_t c = 0; c < run.count * N; c += kLanes<T>) {
              const int64_t n = least(kLanes<T>, run.count * N - c);
              *(Loose<T>*)(to + c) = load_pixels(from + u * p.coef_u + c * p.coef_v, p.coef_v, n, n == kLanes<T>);
            }
          }
        });
      }
      for (int u = 0; u < N; ++u) {
        for (int64_t at = 0; at < count; at += kLanes<T>) {
          Vec<T> v[N];
          if constexpr (kForm == Form::plane) {
            const E* from = coefs + block + at;
            if (p.in_order && count - at >= kLanes<T>) {
              planes_in<E, N>(p, from + u * N * p.coef_f, v);
            } else {
              some_planes_in<E, N>(plane, from, u, least(kLanes<T>, count - at), v);
            }
          } else {
            load_row<T, N>(buffer + u * Tile::kPitch + at * N, v);
            split_blocks<T, N>(v);
          }
          transform_row(u, at, v);
        }
      }
    }
    for_each_run(p, block, block + count, [&](const Run& run) __attribute__((always_inline)) {
      T* from = buffer + run.start * N;
      const int64_t inside = p.width - run.j * N;
      if (p.edge == Edge::fold && inside < run.count * N) {
        for (int u = 0; u < N; ++u) {
          T* row = from + u * Tile::kPitch;
          for (int64_t c = inside; c < run.count * N; ++c) row[inside - 1] += row[c];
        }
      }
      columns_out<E, N>(p, image, run, [&](int64_t c, Vec<T>* v) __attribute__((always_inline)) {
#pragma GCC unroll 32
        for (int u = 0; u < N; ++u) v[u] = *(const Loose<T>*)(from + u * Tile::kPitch + c);
      });
    });
  }
}

// ---- the two directions ----------------------------------------------------------------------------------------------------

template <typename E, int N>
void forward(const Plane& p, const void* image_, void* coefs_, const void* scale_, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  const E* image = static_cast<const E*>(image_);
  E* coefs = static_cast<E*>(coefs_);
  const T* scale = static_cast<const T*>(scale_);
  if (p.form == Form::plane) {
    forward_buffered<E, N, Form::plane>(p, image, coefs, scale, first, last);
  } else if (kAlongLanes<T, N> && p.in_order) {
    if constexpr (kAlongLanes<T, N>) forward_along_lanes<E, N>(p, image, coefs, scale, first, last);
  } else if (p.form == Form::block) {
    forward_buffered<E, N, Form::block>(p, image, coefs, scale, first, last);
  } else {
    if constexpr (!kAlongLanes<T, N>) forward_buffered<E, N, Form::pixels>(p, image, coefs, scale, first, last);
  }
  if (p.stream) stream_fence();
}

template <typename E, int N>
void inverse(const Plane& p, const void* coefs_, void* image_, const void* scale_, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  const E* coefs = static_cast<const E*>(coefs_);
  E* image = static_cast<E*>(image_);
  const T* scale = static_cast<const T*>(scale_);
  if (p.form == Form::plane) {
    inverse_buffered<E, N, Form::plane>(p, coefs, image, scale, first, last);
  } else if (kAlongLanes<T, N> && p.in_order) {
    if constexpr (kAlongLanes<T, N>) inverse_along_lanes<E, N>(p, coefs, image, scale, first, last);
  } else if (p.form == Form::block) {
    inverse_buffered<E, N, Form::block>(p, coefs, image, scale, first, last);
  } else {
    if constexpr (!kAlongLanes<T, N>) inverse_buffered<E, N, Form::pixels>(p, coefs, image, scale, first, last);
  }
  if (p.stream) stream_fence();
}

// ---- dct_normalize -------------------------------------------------------------------------------------------------------

// A vector of a plane; `stream` counts where it fills a line, as the line's other part would come much later.
template <typename E>
FOURFOLD_INLINE void store_blocks(E* to, Vec<Accumulate<E>> value, bool stream) {
  kPerLine<E> == 1 && stream ? store_stream(to, value) : store(to, value);
}

// Planes of `count` blocks, a vector's worth or fewer. Two coefficients are one number while rows of blocks turn
// into rows of frequencies, which halves the work of turning.
template <typename E>
FOURFOLD_INLINE void normalize_planes(const blockdct::Normalize& n, const int16_t* const* coefs, E* out, int f, int64_t count) {
  const auto* table = static_cast<const float*>(n.table);
  const auto* mean = static_cast<const float*>(n.mean);
  const auto* factor = static_cast<const float*>(n.factor);
  Vec<float> pairs[kLanes<float>];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<float>; ++k) {
    pairs[k] = k < count ? load_pairs(coefs[k] + f) : Vec<float>{};
  }
  transpose<float>(pairs);
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<float>; ++k) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int frequency = f + 2 * k + half;
      if (n.slots[frequency] < 0) continue;
      const Vec<float> value = (integers(pairs[k], half) * table[frequency] - mean[frequency]) * factor[frequency];
      E* to = out + n.slots[frequency] * n.blocks;
      count == kLanes<float> ? store_blocks(to, value, n.stream) : store_first(to, value, count);
    }
  }
}

template <typename E>
void normalize(const blockdct::Normalize& n_, const int16_t* const* coefs, void* out_, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  const blockdct::Normalize n = n_;  // a copy that no store can alias
  constexpr int kAll = 64;
  E* out = static_cast<E*>(out_);
  const T* table = static_cast<const T*>(n.table);
  const T* mean = static_cast<const T*>(n.mean);
  const T* factor = static_cast<const T*>(n.factor);
  const auto normalized = [&](int64_t block, int f) __attribute__((always_inline)) {
    const Vec<T> value = load_integers<T>(coefs[block - first] + f) * *(const Loose<T>*)(table + f);
    return (value - *(const Loose<T>*)(mean + f)) * *(const Loose<T>*)(factor + f);
  };
  const auto any_kept = [&](int f, int count) {
    for (int k = 0; k < count; ++k) {
      if (n.slots[f + k] >= 0) return true;
    }
    return false;
  };
  if (n.planar) {
    if constexpr (sizeof(T) == 4) {
      // Each plane receives the whole range before the next frequencies have their turn.
      for (int f = 0; f < kAll; f += 2 * kLanes<T>) {
        if (!any_kept(f, 2 * kLanes<T>)) continue;
        for (int64_t block = first; block < last; block += kLanes<T>) {
          const int64_t count = least(kLanes<T>, last - block);
          normalize_planes(n, coefs + (block - first), out + block, f, count);
        }
      }
    } else {
      for (int64_t block = first; block < last; block += kLanes<T>) {
        const int64_t count = least(kLanes<T>, last - block);
        for (int f = 0; f < kAll; f += kLanes<T>) {
          if (!any_kept(f, kLanes<T>)) continue;
          Vec<T> rows[kLanes<T>];
#pragma GCC unroll 16
          for (int k = 0; k < kLanes<T>; ++k) rows[k] = k < count ? normalized(block + k, f) : Vec<T>{};
          transpose<T>(rows);
          for (int k = 0; k < kLanes<T>; ++k) {
            if (n.slots[f + k] < 0) continue;
            E* to = out + n.slots[f + k] * n.blocks + block;
            count == kLanes<T> ? store_blocks(to, rows[k], n.stream) : store_first(to, rows[k], count);
          }
        }
      }
    }
    if (n.stream) stream_fence();
    return;
  }
  bool in_order = n.kept == kAll;
  for (int f = 0; f < kAll; ++f) in_order &= n.slots[f] == f;
  for (int64_t block = first; block < last; ++block) {
    if (in_order) {
#pragma GCC unroll 16
      for (int f = 0; f < kAll; f += kLanes<T>) {
        E* to = out + block * kAll + f;
        n.stream ? store_stream(to, normalized(block, f)) : store(to, normalized(block, f));
      }
      continue;
    }
    E row[kAll];
#pragma GCC unroll 16
    for (int f = 0; f < kAll; f += kLanes<T>) store(row + f, normalized(block, f));
    for (int f = 0; f < kAll; ++f) {
      if (n.slots[f] >= 0) out[block * n.kept + n.slots[f]] = row[f];
    }
  }
  if (n.stream) stream_fence();
}

}  // namespace

#define FOURFOLD_SIZES(fn, E) {fn<E, 2>, fn<E, 4>, fn<E, 8>, fn<E, 16>, fn<E, 32>}
#define FOURFOLD_TILES(E) \
  {Tile<E, 2>::kBlocks, Tile<E, 4>::kBlocks, Tile<E, 8>::kBlocks, Tile<E, 16>::kBlocks, Tile<E, 32>::kBlocks}

extern const blockdct::Kernels blockdct_kernels = {
    {FOURFOLD_SIZES(forward, Half), FOURFOLD_SIZES(forward, BFloat16), FOURFOLD_SIZES(forward, float),
     FOURFOLD_SIZES(forward, double)},
    {FOURFOLD_SIZES(inverse, Half), FOURFOLD_SIZES(inverse, BFloat16), FOURFOLD_SIZES(inverse, float),
     FOURFOLD_SIZES(inverse, double)},
    {FOURFOLD_TILES(Half), FOURFOLD_TILES(BFloat16), FOURFOLD_TILES(float), FOURFOLD_TILES(double)},
    {normalize<Half>, normalize<BFloat16>, normalize<float>, normalize<double>},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
