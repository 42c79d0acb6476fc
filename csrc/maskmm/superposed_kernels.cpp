// Kernels of superposed masks, compiled once per ISA tier. Bits are tested where they lie and spread over lanes, never over
// memory. The order of every sum is fixed by the shapes and the tier alone.
#include "maskmm/superposed_kernels.h"

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using superposed::kTeam;
using superposed::Part;
using superposed::Run;
using superposed::Stretch;
using superposed::Team;

// How many vectors of sums fit the registers beside what is added to them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

// sum + x in the lanes whose bit is set.  // for simd.h
template <typename T>
FOURFOLD_INLINE Vec<T> add_where(Vec<T> sum, Vec<T> x, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_add_ps((__m512)sum, (__mmask16)bits, (__m512)sum, (__m512)x);
  return (Vec<T>)_mm512_mask_add_pd((__m512d)sum, (__mmask8)bits, (__m512d)sum, (__m512d)x);
#else
  return sum + keep<T>(x, bits);
#endif
}

// sum + a * b in the lanes whose bit is set.  // for simd.h
template <typename T>
FOURFOLD_INLINE Vec<T> add_product_where(Vec<T> sum, Vec<T> a, Vec<T> b, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, (__mmask16)bits);
  return (Vec<T>)_mm512_mask3_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum, (__mmask8)bits);
#else
  return sum + keep<T>(a * b, bits);
#endif
}

template <int kLanes, int kOffset>
struct Turned {
  static constexpr int at(int lane) { return (lane + kOffset) % kLanes; }
};

// x in every lane: the sum of lanes l, l + kFrom, l + 2 kFrom, ..
template <typename T, int kFrom>
FOURFOLD_INLINE Vec<T> fold(Vec<T> x) {
  if constexpr (kLanes<T> >= 16 && kFrom <= 8) x += permute<T, Turned<kLanes<T>, 8>>(x);
  if constexpr (kLanes<T> >= 8 && kFrom <= 4) x += permute<T, Turned<kLanes<T>, 4>>(x);
  if constexpr (kLanes<T> >= 4 && kFrom <= 2) x += permute<T, Turned<kLanes<T>, 2>>(x);
  if constexpr (kLanes<T> >= 2 && kFrom <= 1) x += permute<T, Turned<kLanes<T>, 1>>(x);
  return x;
}

// A vector of which the first lanes of both are added up side by side: a, b, a, b, ..
template <typename T>
FOURFOLD_INLINE Vec<T> pair(Vec<T> a, Vec<T> b) {
  Vec<T> low, high;
  interleave<T>(a, b, low, high);
  return low + high;
}

// ---- all masks at once ---------------------------------------------------------------------------------------------------

// Masks go in fours, of which a table holds the sums of all subsets, and these in passes, whose sums are added up before they
// join the total: in this order in every tier, with an error that hardly grows with their number.
constexpr int kFour = 4;
constexpr int64_t kSweep = 8;  // masks that are read side by side
constexpr int64_t kPass = 32;
constexpr int64_t kMost = 64 * superposed::kStretchWords;

// Where the masks of a sweep lie and what they add; those beyond `count` add nothing.
template <typename T>
struct Sweep {
  const uint8_t* bits[kSweep];
  T factors[kSweep];

  FOURFOLD_INLINE Sweep(const uint8_t* first, int64_t stride, const T* given, int64_t count) {
    for (int64_t t = 0; t < kSweep; ++t) {
      bits[t] = t < count ? first + t * stride : first;
      factors[t] = t < count ? given[t] : T{0};
    }
  }
};

#if defined(__AVX512F__)

// Table number: the sum of those of four values whose bit is set in it.
FOURFOLD_INLINE Vec<float> subset_sums(const float* values) {
  Vec<float> sums{};
  sums = add_where<float>(sums, broadcast(values[0]), 0xaaaa);
  sums = add_where<float>(sums, broadcast(values[1]), 0xcccc);
  sums = add_where<float>(sums, broadcast(values[2]), 0xf0f0);
  return add_where<float>(sums, broadcast(values[3]), 0xff00);
}

// Lane l: table[index[l] % 16].  // for simd.h
FOURFOLD_INLINE Vec<float> look_up(Vec<float> table, Bits32 index) {
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
}

// Byte i of 64: bit j is bit i at words[j].  // for simd.h
FOURFOLD_INLINE Bits32 columns_of(const uint8_t* const* words, int64_t offset) {
  typedef uint64_t LooseWord __attribute__((aligned(1), may_alias));
  __m512i numbers = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int j = 0; j < kFour; ++j) {
    const __mmask64 bits = *(const LooseWord*)(words[j] + offset);
    numbers = _mm512_mask_add_epi8(numbers, bits, numbers, _mm512_set1_epi8(static_cast<char>(1 << j)));
  }
  return (Bits32)numbers;
}

// sums += what each subset of the sweep's masks adds, n values in 64s, of which value 4 l + b is at 16 b + l.
template <int kFours>
FOURFOLD_INLINE void add_sweep(const Sweep<float>& sweep, int64_t n, float* sums) {
  Vec<float> tables[kFours];
  for (int f = 0; f < kFours; ++f) tables[f] = subset_sums(sweep.factors + kFour * f);
  for (int64_t i = 0; i < n; i += 64) {
    Bits32 numbers[kFours];
#pragma GCC unroll 2
    for (int f = 0; f < kFours; ++f) numbers[f] = columns_of(sweep.bits + kFour * f, i / 8);
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      Vec<float> sum = load(sums + i + 16 * b);
#pragma GCC unroll 2
      for (int f = 0; f < kFours; ++f) sum += look_up(tables[f], numbers[f] >> (8 * b));
      store(sums + i + 16 * b, sum);
    }
  }
}

FOURFOLD_INLINE void add_sweep(const Sweep<float>& sweep, int64_t count, int64_t n, float* sums) {
  count <= kFour ? add_sweep<1>(sweep, n, sums) : add_sweep<2>(sweep, n, sums);
}

// total += sums, brought back into order.
FOURFOLD_INLINE void add_pass(const float* sums, int64_t n, float* total) {
  for (int64_t i = 0; i < n; i += 64) {
    Vec<float> x[4], even[2], odd[2];
    for (int b = 0; b < 4; ++b) x[b] = load(sums + i + 16 * b);
    interleave<float>(x[0], x[2], even[0], even[1]);
    interleave<float>(x[1], x[3], odd[0], odd[1]);
    for (int half = 0; half < 2; ++half) {
      Vec<float> low, high;
      interleave<float>(even[half], odd[half], low, high);
      float* to = total + i + 32 * half;
      store(to, load(to) + low);
      store(to + 16, load(to + 16) + high);
    }
  }
}

#endif

template <typename T>
FOURFOLD_INLINE void add_sweep(const Sweep<T>& sweep, int64_t count, int64_t n, T* sums) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> sum = load(sums + i);
    for (int64_t first = 0; first < count; first += kFour) {
      Vec<T> subset{};
#pragma GCC unroll 4
      for (int t = 0; t < kFour; ++t) {
        const uint32_t bits = mask_bits(sweep.bits[first + t], i, kLanes<T>);
        subset = add_where<T>(subset, broadcast(sweep.factors[first + t]), bits);
      }
      sum += subset;
    }
    store(sums + i, sum);
  }
}

template <typename T>
FOURFOLD_INLINE void add_pass(const T* sums, int64_t n, T* total) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(total + i, load(total + i) + load(sums + i));
}

template <typename T>
void add_masks(const Stretch& masks, const void* factor_memory, void* total_memory) {
  const T* factors = static_cast<const T*>(factor_memory);
  T* total = static_cast<T*>(total_memory);
  const int64_t n = 64 * masks.words;
  alignas(64) T sums[kMost];
  for (int64_t pass = 0; pass < masks.tasks; pass += kPass) {
    for (int64_t i = 0; i < n; i += kLanes<T>) store(sums + i, Vec<T>{});
    const int64_t end = masks.tasks < pass + kPass ? masks.tasks : pass + kPass;
    for (int64_t t = pass; t < end; t += kSweep) {
      const int64_t count = end - t < kSweep ? end - t : kSweep;
      add_sweep(Sweep<T>(masks.bits + t * masks.stride, masks.stride, factors + t, count), count, n, sums);
    }
    add_pass(sums, n, total);
  }
}

template <typename T, int kTasks>
FOURFOLD_INLINE void sum_some(const uint8_t* bits, int64_t stride, const T* values, int64_t n, double* totals) {
  Vec<T> even[kTasks] = {}, odd[kTasks] = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes<T>) {
    const Vec<T> first = load(values + i), second = load(values + i + kLanes<T>);
#pragma GCC unroll 4
    for (int t = 0; t < kTasks; ++t) {
      even[t] = add_where<T>(even[t], first, mask_bits(bits + t * stride, i, kLanes<T>));
      odd[t] = add_where<T>(odd[t], second, mask_bits(bits + t * stride, i + kLanes<T>, kLanes<T>));
    }
  }
  for (int t = 0; t < kTasks; ++t) totals[t] += fold<T, 1>(even[t] + odd[t])[0];
}

#if defined(__AVX512F__)

// totals[t] += the sums of n values under masks first, first + 1, .., `count` of 16, a lane each: four columns at a time, of
// which a mask's four bits pick the sum.
FOURFOLD_INLINE void sum_lanes(const Stretch& masks, int64_t first, int64_t count, const float* tables, int64_t n,
                               double* totals) {
  // Side by side first: where masks lie a power of two apart, their lines would drive each other out of the caches.
  alignas(64) uint8_t near[16][kMost / 8];
  const int64_t bytes = n / 8;
  const uint8_t* bits = masks.bits + first * masks.stride;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < bytes; i += 64) {
      const __mmask64 inside = ~uint64_t{0} >> (bytes - i < 64 ? 64 - (bytes - i) : 0);
      _mm512_store_si512(near[t] + i, _mm512_maskz_loadu_epi8(inside, bits + t * masks.stride + i));
    }
  }
  const int64_t after = masks.tasks - first - 16;  // masks that come next: they come near meanwhile
  Vec<float> sums[4] = {};
  for (int64_t i = 0; i < n; i += 512) {
    Vec<float> rows[16];  // 16 words of 32 bits of each mask; then of each place those of the masks
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) rows[t] = load(reinterpret_cast<const float*>(near[t < count ? t : 0] + i / 8));
    transpose<float>(rows);
    const int64_t words = n - i < 512 ? (n - i) / 32 : 16;
    for (int64_t w = 0; w < words; ++w) {
      if (w < after) __builtin_prefetch(bits + (16 + w) * masks.stride + i / 8, 0, 2);
      const Bits32 word = (Bits32)rows[w];
      const float* table = tables + (i / kFour + w * 8) * 16;
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) sums[q % 4] += look_up(load(table + 16 * q), word >> (4 * q));
    }
  }
  alignas(64) float lanes[16];
  store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t t = 0; t < count; ++t) totals[t] += lanes[t];
}

// Masks [0, returned) are done; what is left is too few to fill the lanes.
FOURFOLD_INLINE int64_t sum_most(const Stretch& masks, const float* values, double* totals) {
  constexpr int64_t kWorth = 5;
  const int64_t left = masks.tasks % 16, done = left >= kWorth ? masks.tasks : masks.tasks - left, n = 64 * masks.words;
  if (done == 0) return 0;
  alignas(64) float tables[kMost / kFour * 16];
  for (int64_t q = 0; q < n / kFour; ++q) store(tables + 16 * q, subset_sums(values + kFour * q));
  for (int64_t t = 0; t < done; t += 16) {
    sum_lanes(masks, t, done - t < 16 ? done - t : 16, tables, n, totals + t);
  }
  return done;
}

#endif

template <typename T>
FOURFOLD_INLINE int64_t sum_most(const Stretch& masks, const T* values, double* totals) {
  int64_t t = 0;
  for (; t + kFour <= masks.tasks; t += kFour) {
    sum_some<T, kFour>(masks.bits + t * masks.stride, masks.stride, values, 64 * masks.words, totals + t);
  }
  return t;
}

template <typename T>
void sum_masks(const Stretch& masks, const void* value_memory, double* totals) {
  const T* values = static_cast<const T*>(value_memory);
  for (int64_t t = sum_most(masks, values, totals); t < masks.tasks; ++t) {
    sum_some<T, 1>(masks.bits + t * masks.stride, masks.stride, values, 64 * masks.words, totals + t);
  }
}

// ---- element by element --------------------------------------------------------------------------------------------------

// Calls whole(i) for every full vector of n elements, then rest(i, count) for what is left.
template <typename T, typename Whole, typename Rest>
FOURFOLD_INLINE void for_vectors(int64_t n, Whole whole, Rest rest) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) whole(i);
  if (i < n) rest(i, n - i);
}

template <typename E>
void scale(const void* weight_memory, const void* factor_memory, void* out_memory, int64_t n) {
  using T = Accumulate<E>;
  const E* weight = static_cast<const E*>(weight_memory);
  const T* factors = static_cast<const T*>(factor_memory);
  E* out = static_cast<E*>(out_memory);
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(weight + i) * load(factors + i)); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store_first(out + i, load_first(weight + i, count) * load_first(factors + i, count), count);
      });
}

template <typename E>
void multiply(const void* a_memory, const void* b_memory, void* out_memory, int64_t n) {
  using T = Accumulate<E>;
  const E *a = static_cast<const E*>(a_memory), *b = static_cast<const E*>(b_memory);
  T* out = static_cast<T*>(out_memory);
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(a + i) * load(b + i)); },
      [&](int64_t i, int64_t count)
          __attribute__((always_inline)) { store_first(out + i, load_first(a + i, count) * load_first(b + i, count), count); });
}

template <typename E>
void widen_all(const void* in_memory, void* out_memory, int64_t n) {
  using T = Accumulate<E>;
  const E* in = static_cast<const E*>(in_memory);
  T* out = static_cast<T*>(out_memory);
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(in + i)); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) { store_first(out + i, load_first(in + i, count), count); });
}

template <typename E>
void narrow_all(const void* in_memory, void* out_memory, int64_t n) {
  using T = Accumulate<E>;
  const T* in = static_cast<const T*>(in_memory);
  E* out = static_cast<E*>(out_memory);
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(in + i)); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) { store_first(out + i, load_first(in + i, count), count); });
}

// ---- a mask per row ------------------------------------------------------------------------------------------------------

// Rows kRows of a team against kCount consecutive rows of the weight: sums by lane over all k columns. The sum of one row and
// weight row takes the same course in every team, so that a sample's result does not depend on its neighbours.
template <typename E, int kRows, int kCount, bool kShared>
FOURFOLD_INLINE void dot_lanes(const E* const (&x)[kRows], const uint8_t* const (&bits)[kRows], const E* weight, int64_t k,
                               int64_t row_bytes, Vec<Accumulate<E>> (&sums)[kRows][kCount]) {
  using T = Accumulate<E>;
  const auto step = [&](int64_t i, auto take) __attribute__((always_inline)) {
    Vec<T> of_x[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) of_x[r] = take(x[r] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const Vec<T> w = take(weight + c * k + i);
      Vec<T> kept = w;
      if constexpr (kShared) kept = keep<T>(w, mask_bits(bits[0] + c * row_bytes, i, kLanes<T>));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        if constexpr (!kShared) kept = keep<T>(w, mask_bits(bits[r] + c * row_bytes, i, kLanes<T>));
        sums[r][c] += of_x[r] * kept;
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= k; i += kLanes<T>) step(i, [](const E* p) __attribute__((always_inline)) { return load(p); });
  const int64_t left = k - i;
  if (left > 0) step(i, [left](const E* p) __attribute__((always_inline)) { return load_first(p, left); });
}

// kCount sums by lane added up, with bias, to kCount results.
template <typename E, int kCount>
FOURFOLD_INLINE void finish(const Vec<Accumulate<E>>* sums, const E* bias, E* y) {
  using T = Accumulate<E>;
  const auto write = [&](Vec<T> total, int first, int count) __attribute__((always_inline)) {
    if (bias != nullptr) total += load_first(bias + first, count);
    store_first(y + first, total, count);
  };
  if constexpr (kCount == 4 && kLanes<T> >= 4) {
    write(fold<T, 4>(pair<T>(pair<T>(sums[0], sums[2]), pair<T>(sums[1], sums[3]))), 0, 4);
  } else if constexpr (kCount == 4) {
    write(pair<T>(sums[0], sums[1]), 0, 2);
    write(pair<T>(sums[2], sums[3]), 2, 2);
  } else if constexpr (kCount == 2 && kLanes<T> >= 4) {
    write(fold<T, 4>(pair<T>(pair<T>(sums[0], Vec<T>{}), pair<T>(sums[1], Vec<T>{}))), 0, 2);
  } else if constexpr (kCount == 2) {
    write(pair<T>(sums[0], sums[1]), 0, 2);
  } else if constexpr (kLanes<T> >= 4) {
    write(fold<T, 4>(pair<T>(pair<T>(sums[0], Vec<T>{}), Vec<T>{})), 0, 1);
  } else {
    write(pair<T>(sums[0], Vec<T>{}), 0, 1);
  }
}

// kCount results of each row, from weight row n on.
template <typename E, int kRows, int kCount, bool kShared>
FOURFOLD_INLINE void forward_some(const Part& part, const E* const (&x)[kRows], const uint8_t* const (&bits)[kRows],
                                  const E* bias, E* const (&y)[kRows], int64_t n) {
  Vec<Accumulate<E>> sums[kRows][kCount] = {};
  const uint8_t* at[kRows];
  for (int r = 0; r < kRows; ++r) at[r] = bits[r] + n * part.row_bytes;
  const E* weight = static_cast<const E*>(part.weight) + n * part.k;
  dot_lanes<E, kRows, kCount, kShared>(x, at, weight, part.k, part.row_bytes, sums);
  for (int r = 0; r < kRows; ++r) finish<E, kCount>(sums[r], bias == nullptr ? nullptr : bias + n, y[r] + n);
}

template <typename E, int kRows, bool kShared>
void forward_team(const Team& team, const Part& part, const E* x, const E* bias, E* y, int64_t pitch) {
  const E* from[kRows];
  E* to[kRows];
  const uint8_t* bits[kRows];
  for (int r = 0; r < kRows; ++r) {
    from[r] = x + team.rows[r] * part.k;
    to[r] = y + team.rows[r] * pitch;
    bits[r] = team.bits[kShared ? 0 : r] + part.first_byte;
  }
  int64_t n = 0;
  for (; n + kWide <= part.rows; n += kWide) forward_some<E, kRows, kWide, kShared>(part, from, bits, bias, to, n);
  for (; n < part.rows; ++n) forward_some<E, kRows, 1, kShared>(part, from, bits, bias, to, n);
}

// call(rows, shared) with both as types, for what the team is.
template <int kRows, bool kShared>
struct Kind {
  static constexpr int kCount = kRows;
  static constexpr bool kOneMask = kShared;
};
template <typename Call>
FOURFOLD_INLINE void for_kind(const Team& team, Call call) {
  if (team.count == kTeam) {
    team.shared ? call(Kind<kTeam, true>{}) : call(Kind<kTeam, false>{});
  } else if (team.count == 2) {
    team.shared ? call(Kind<2, true>{}) : call(Kind<2, false>{});
  } else {
    call(Kind<1, true>{});
  }
}

template <typename E>
void forward(const Team& team, const Part& part, const void* x, const void* bias, void* y, int64_t pitch) {
  for_kind(team, [&](auto kind) {
    using K = decltype(kind);
    forward_team<E, K::kCount, K::kOneMask>(team, part, static_cast<const E*>(x), static_cast<const E*>(bias),
                                            static_cast<E*>(y), pitch);
  });
}

// kCount vectors of columns from i on, the last `left` columns at most.
template <typename E, int kRows, int kCount, bool kShared, bool kWhole>
FOURFOLD_INLINE void backward_columns(const Part& part, const E* weight, const uint8_t* const (&bits)[kRows],
                                      const Accumulate<E>* const (&grad)[kRows], int64_t i, int64_t left, Accumulate<E>* sums,
                                      int64_t sum_pitch) {
  using T = Accumulate<E>;
  Vec<T> total[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) total[r][v] = load(sums + r * sum_pitch + i + v * kLanes<T>);
  }
  for (int64_t n = 0; n < part.rows; ++n) {
    Vec<T> factor[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) factor[r] = broadcast(grad[r][n]);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const E* p = weight + n * part.k + i + v * kLanes<T>;
      const Vec<T> w = kWhole ? load(p) : load_first(p, left);
      Vec<T> kept = w;
      if constexpr (kShared) kept = keep<T>(w, mask_bits(bits[0] + n * part.row_bytes, i + v * kLanes<T>, kLanes<T>));
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        if constexpr (!kShared) kept = keep<T>(w, mask_bits(bits[r] + n * part.row_bytes, i + v * kLanes<T>, kLanes<T>));
        total[r][v] += factor[r] * kept;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(sums + r * sum_pitch + i + v * kLanes<T>, total[r][v]);
  }
}

template <typename E, int kRows, bool kShared>
void backward_team(const Team& team, const Part& part, const Accumulate<E>* grad, int64_t pitch, Accumulate<E>* sums,
                   int64_t sum_pitch) {
  using T = Accumulate<E>;
  const T* of_row[kRows];
  const uint8_t* bits[kRows];
  for (int r = 0; r < kRows; ++r) {
    of_row[r] = grad + team.rows[r] * pitch;
    bits[r] = team.bits[kShared ? 0 : r] + part.first_byte;
  }
  const E* weight = static_cast<const E*>(part.weight);
  int64_t i = 0;
  for (; i + kWide * kLanes<T> <= part.columns; i += kWide * kLanes<T>) {
    backward_columns<E, kRows, kWide, kShared, true>(part, weight, bits, of_row, i, 0, sums, sum_pitch);
  }
  for (; i + kLanes<T> <= part.columns; i += kLanes<T>) {
    backward_columns<E, kRows, 1, kShared, true>(part, weight, bits, of_row, i, 0, sums, sum_pitch);
  }
  if (i < part.columns) {
    backward_columns<E, kRows, 1, kShared, false>(part, weight, bits, of_row, i, part.columns - i, sums, sum_pitch);
  }
}

template <typename E>
void backward(const Team& team, const Part& part, const void* grad, int64_t pitch, void* sums, int64_t sum_pitch) {
  using T = Accumulate<E>;
  for_kind(team, [&](auto kind) {
    using K = decltype(kind);
    backward_team<E, K::kCount, K::kOneMask>(team, part, static_cast<const T*>(grad), pitch, static_cast<T*>(sums), sum_pitch);
  });
}

// kRows rows of the weight and kCount vectors of columns.
template <typename T, int kRows, int kCount>
FOURFOLD_INLINE void outer_tile(const Run* runs, int64_t run_count, const Part& part, int64_t n, int64_t i, const T* grad,
                                int64_t pitch, const T* x, T* sums) {
  Vec<T> total[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) total[r][v] = load(sums + (n + r) * part.k + i + v * kLanes<T>);
  }
  for (const Run* run = runs; run < runs + run_count; ++run) {
    uint32_t bits[kRows][kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        bits[r][v] = mask_bits(run->bits + part.first_byte + (n + r) * part.row_bytes, i + v * kLanes<T>, kLanes<T>);
      }
    }
    for (int64_t row = run->begin; row < run->end; ++row) {
      Vec<T> of_x[kCount];
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) of_x[v] = load(x + row * part.k + i + v * kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> factor = broadcast(grad[(n + r) * pitch + row]);
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) total[r][v] = add_product_where<T>(total[r][v], factor, of_x[v], bits[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(sums + (n + r) * part.k + i + v * kLanes<T>, total[r][v]);
  }
}

template <typename T>
void outer(const Run* runs, int64_t run_count, const Part& part, const void* grad_memory, int64_t pitch, const void* x_memory,
           void* sum_memory) {
  const T *grad = static_cast<const T*>(grad_memory), *x = static_cast<const T*>(x_memory);
  T* sums = static_cast<T*>(sum_memory);
  int64_t n = 0;
  for (; n + 2 <= part.rows; n += 2) {
    for (int64_t i = 0; i < part.columns; i += 2 * kLanes<T>) {
      outer_tile<T, 2, 2>(runs, run_count, part, n, i, grad, pitch, x, sums);
    }
  }
  for (; n < part.rows; ++n) {
    for (int64_t i = 0; i < part.columns; i += 2 * kLanes<T>) {
      outer_tile<T, 1, 2>(runs, run_count, part, n, i, grad, pitch, x, sums);
    }
  }
}

}  // namespace

#define FOURFOLD_EACH(f) {f<Half>, f<BFloat16>, f<float>, f<double>}
#define FOURFOLD_BOTH(f) {f<float>, f<double>}

extern const superposed::Kernels superposed_kernels = {
    FOURFOLD_BOTH(add_masks), FOURFOLD_BOTH(sum_masks), FOURFOLD_EACH(scale),
    FOURFOLD_EACH(multiply),  FOURFOLD_EACH(widen_all), FOURFOLD_EACH(narrow_all),
    FOURFOLD_EACH(forward),   FOURFOLD_EACH(backward),  FOURFOLD_BOTH(outer),
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
