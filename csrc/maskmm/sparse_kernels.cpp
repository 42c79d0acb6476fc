#include "maskmm/sparse_kernels.h"

#include <cstdint>

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using sparse::BitmapJob;
using sparse::kBitmapRows;
using sparse::Nonzeros;

// Nonzeros whose values are widened at a time.
constexpr int kChunk = 64;
// Rows ahead whose values are asked for; the pieces of a row don't follow the pieces of the row before.
constexpr int kAhead = 6;
constexpr int kCacheLine = 64;
// Bytes of values ahead that are asked for within a row: looking up rows of a tile distracts the processor's own guesses.
constexpr int kStreamAhead = 1024;
// A 16-bit number times this is four of them.
constexpr uint64_t kFourTimes = 0x0001000100010001;

FOURFOLD_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FOURFOLD_INLINE int64_t within(int64_t x, int64_t most) { return x < 0 ? 0 : least(x, most); }

FOURFOLD_INLINE uint64_t word_at(const uint8_t* bits, int64_t word) {
  uint64_t value;
  __builtin_memcpy(&value, bits + 8 * word, sizeof(value));
  return value;
}

// ---- for simd.h ----------------------------------------------------------------------------------------------------------

// L numbers that are computed with at once, in as many vectors of this tier as that takes; the number itself for L = 1.
template <typename T, int L>
struct GroupOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <typename T>
struct GroupOf<T, 1> {
  typedef T type;
};
template <typename T, int L>
using Group = typename GroupOf<T, L>::type;

template <typename T, int L>
FOURFOLD_INLINE Group<T, L> load_group(const T* p) {
  Group<T, L> x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T, int L>
FOURFOLD_INLINE void store_group(T* p, Group<T, L> x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

template <typename T, int L>
FOURFOLD_INLINE Group<T, L> spread(T value) {
  return value - Group<T, L>{};  // unlike an addition of 0 this one leaves no instruction
}

#if defined(__AVX2__)
// Of each byte, which of the packed lanes goes to each lane.
struct ExpandTable {
  uint8_t lanes[256][8];
};
constexpr ExpandTable expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int l = 0, from = 0; l < 8; ++l) table.lanes[bits][l] = static_cast<uint8_t>((bits >> l & 1) ? from++ : 0);
  }
  return table;
}
alignas(64) constexpr ExpandTable kExpand = expand_table();

// Lane l of the result is lane number so-many of x, as many bits below l being set; any lane where bit l is not.
FOURFOLD_INLINE __m256 spread_by(__m256 x, uint32_t byte) {
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kExpand.lanes[byte])));
}
#endif

#if defined(__AVX512F__)
typedef __mmask16 LaneMask;

// Bits in a mask register, where compilers would move them once for each use.
FOURFOLD_INLINE LaneMask lane_mask(uint32_t bits) {
  LaneMask mask = static_cast<LaneMask>(bits);
  __asm__("" : "+Yk"(mask));
  return mask;
}

// Keeps compilers from reading x again in each instruction that uses it.
template <typename V>
FOURFOLD_INLINE void in_register(V& x) {
  __asm__("" : "+v"(x));
}

// The packed lanes of x where bits are set, 0 in the others. From a register: expanding from memory is slow.
FOURFOLD_INLINE Vec<float> expand(Vec<float> x, uint32_t, LaneMask mask) {
  in_register(x);
  return (Vec<float>)_mm512_maskz_expand_ps(mask, (__m512)x);
}
FOURFOLD_INLINE Vec<double> expand(Vec<double> x, uint32_t, LaneMask mask) {
  in_register(x);
  return (Vec<double>)_mm512_maskz_expand_pd(static_cast<__mmask8>(mask), (__m512d)x);
}

// The same of the numbers from p on, of which 16 may be read, but anything where bits are not set. Halves by table cost Zen 4
// half of what expanding costs.
FOURFOLD_INLINE Vec<float> expand_from(const float* p, uint32_t bits, LaneMask) {
  const __m256 low = spread_by(_mm256_loadu_ps(p), bits & 0xff);
  const __m256 high = spread_by(_mm256_loadu_ps(p + popcount(bits & 0xff)), bits >> 8);
  const __m512 both =
      _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(low)), _mm256_castps_pd(high), 1));
  return (Vec<float>)both;
}
#else
typedef uint32_t LaneMask;
FOURFOLD_INLINE LaneMask lane_mask(uint32_t bits) { return bits; }
template <typename V>
FOURFOLD_INLINE void in_register(V&) {}
#if defined(__AVX2__)
FOURFOLD_INLINE Vec<float> expand(Vec<float> x, uint32_t bits, LaneMask) {
  return keep<float>((Vec<float>)spread_by((__m256)x, bits), bits);
}
FOURFOLD_INLINE Vec<float> expand_from(const float* p, uint32_t bits, LaneMask mask) { return expand(load(p), bits, mask); }
#endif
#endif

// sum + a * b in the lanes whose bit is set, sum in the others, whatever b holds there; a is a result of expand or expand_from.
template <typename T>
FOURFOLD_INLINE Vec<T> add_product(Vec<T> sum, Vec<T> a, Vec<T> b, LaneMask bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, bits);
  return (Vec<T>)_mm512_mask3_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum, static_cast<__mmask8>(bits));
#else
  return sum + a * keep<T>(b, bits);
#endif
}

// The sum of the lanes, in a fixed order.
template <typename T>
FOURFOLD_INLINE T over_lanes(Vec<T> x) {
#pragma GCC unroll 4
  for (int lanes = kLanes<T>; lanes > 1; lanes /= 2) {
    Vec<T> even, odd;
    deinterleave<T>(x, x, even, odd);
    x = even + odd;
  }
  return x[0];
}

// Lane i of the result is the sum of the lanes of sums[i].
template <typename T>
FOURFOLD_INLINE Vec<T> over_lanes_of_all(Vec<T> (&sums)[kLanes<T>]) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      Vec<T> low, high;
      interleave<T>(sums[i], sums[i + half], low, high);
      sums[i] = low + high;
    }
  }
  return sums[0];
}

// ---- bits ----------------------------------------------------------------------------------------------------------------

int64_t count(const uint8_t* bits, int64_t words) {
  int64_t total = 0;
  for (int64_t w = 0; w < words; ++w) total += popcount(word_at(bits, w));
  return total;
}

int64_t columns(const uint8_t* bits, int64_t words, uint16_t base, uint16_t* out) {
  const uint16_t* const start = out;
#if defined(__AVX512VBMI2__)
  alignas(64) uint16_t numbers[32];
  for (int i = 0; i < 32; ++i) numbers[i] = static_cast<uint16_t>(base + i);
  __m512i low = _mm512_load_si512(numbers);
  for (int64_t w = 0; w < words; ++w) {
    const uint64_t word = word_at(bits, w);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(32));
    __m512i of_low = _mm512_maskz_compress_epi16((__mmask32)word, low);
    __m512i of_high = _mm512_maskz_compress_epi16((__mmask32)(word >> 32), high);
    in_register(of_low);  // compressing into memory is slow
    in_register(of_high);
    _mm512_storeu_si512(out, of_low);
    out += popcount(word & 0xffffffff);
    _mm512_storeu_si512(out, of_high);
    out += popcount(word >> 32);
    low = _mm512_add_epi16(high, _mm512_set1_epi16(32));
  }
#else
  for (int64_t w = 0; w < words; ++w) {
    const uint16_t first = static_cast<uint16_t>(base + 64 * w);
    for (uint64_t rest = word_at(bits, w); rest != 0; rest &= rest - 1) {
      *out++ = static_cast<uint16_t>(first + __builtin_ctzll(rest));
    }
  }
#endif
  return out - start;
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint64_t;
};

template <int kBytes>
void gather(const uint8_t* bits, const void* row_, int64_t k, void* values_, int64_t room) {
  using U = typename BitsOf<kBytes>::type;
  const U* row = static_cast<const U*>(row_);
  U* out = static_cast<U*>(values_);
  const U* const end = out + room;
  for (int64_t first = 0; first < k; first += 64) {
    uint64_t word = word_at(bits, first / 64);
#if defined(__AVX512F__)
    constexpr bool kCompresses = kBytes > 2
#if defined(__AVX512VBMI2__)
                                 || true
#endif
        ;
    if constexpr (kCompresses) {
      constexpr int kCount = 64 / kBytes;
      if (first + 64 <= k && out + 64 <= end) {
        for (int v = 0; v < 64 / kCount; ++v) {
          const uint64_t part = (word >> (v * kCount)) & (~uint64_t{0} >> (64 - kCount));
          const __m512i x = _mm512_loadu_si512(row + first + v * kCount);
          __m512i packed;
          if constexpr (kBytes == 4) packed = _mm512_maskz_compress_epi32((__mmask16)part, x);
          if constexpr (kBytes == 8) packed = _mm512_maskz_compress_epi64((__mmask8)part, x);
#if defined(__AVX512VBMI2__)
          if constexpr (kBytes == 2) packed = _mm512_maskz_compress_epi16((__mmask32)part, x);
#endif
          in_register(packed);  // compressing into memory is slow
          _mm512_storeu_si512(out, packed);
          out += popcount(part);
        }
        continue;
      }
    }
#endif
    for (; word != 0 && out < end; word &= word - 1) *out++ = row[first + __builtin_ctzll(word)];
  }
}

template <int kBytes>
void scatter_row(const uint8_t* bits, const void* values_, int64_t there, void* row_, int64_t k) {
  using U = typename BitsOf<kBytes>::type;
  const U* from = static_cast<const U*>(values_);
  const U* const end = from + there;
  U* row = static_cast<U*>(row_);
  for (int64_t first = 0; first < k; first += 64) {
    uint64_t word = word_at(bits, first / 64);
#if defined(__AVX512F__)
    constexpr bool kExpands = kBytes > 2
#if defined(__AVX512VBMI2__)
                              || true
#endif
        ;
    if constexpr (kExpands) {
      constexpr int kCount = 64 / kBytes;
      if (first + 64 <= k && from + 64 <= end) {
        for (int v = 0; v < 64 / kCount; ++v) {
          const uint64_t part = (word >> (v * kCount)) & (~uint64_t{0} >> (64 - kCount));
          __m512i x = _mm512_loadu_si512(from);
          in_register(x);  // as in expand
          U* to = row + first + v * kCount;
          if constexpr (kBytes == 4) _mm512_storeu_si512(to, _mm512_maskz_expand_epi32((__mmask16)part, x));
          if constexpr (kBytes == 8) _mm512_storeu_si512(to, _mm512_maskz_expand_epi64((__mmask8)part, x));
#if defined(__AVX512VBMI2__)
          if constexpr (kBytes == 2) _mm512_storeu_si512(to, _mm512_maskz_expand_epi16((__mmask32)part, x));
#endif
          from += popcount(part);
        }
        continue;
      }
    }
#endif
    const int64_t last = least(first + 64, k);
    for (int64_t i = first; i < last; ++i) row[i] = 0;
    for (; word != 0 && from < end; word &= word - 1) row[first + __builtin_ctzll(word)] = *from++;
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------------

// To write tiles in the type that they are computed in.
template <typename T>
struct Plainly {
  using Element = T;
  static FOURFOLD_INLINE void store(T* p, Vec<T> x, int w) { *(Loose<T>*)(p + w) = x; }
  static FOURFOLD_INLINE T convert(T x) { return x; }
  static FOURFOLD_INLINE int place(int w) { return w; }
};

template <typename E, int W, typename As>
void pack(const void* x_, int64_t stride, int64_t batch, int64_t first, int64_t last, void* tile_) {
  using T = Accumulate<E>;
  constexpr int L = kLanes<T>;
  const E* x = static_cast<const E*>(x_);
  typename As::Element* tile = static_cast<typename As::Element*>(tile_);
  int64_t k = first;
  if constexpr (W >= L) {
    for (; k + L <= last; k += L) {
      for (int w = 0; w < W; w += L) {
        Vec<T> rows[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) rows[i] = w + i < batch ? load(x + (w + i) * stride + k) : Vec<T>{};
        transpose<T>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) As::store(tile + (k + i) * W, rows[i], w);
      }
    }
  }
  for (; k < last; ++k) {
    for (int w = 0; w < W; ++w) tile[k * W + As::place(w)] = As::convert(w < batch ? load_one(x + w * stride + k) : T{0});
  }
}

template <typename E>
void unpack(const void* totals_, int64_t width, int64_t rows, int64_t batch, void* y_, int64_t stride) {
  using T = Accumulate<E>;
  constexpr int L = kLanes<T>;
  const T* totals = static_cast<const T*>(totals_);
  E* y = static_cast<E*>(y_);
  int64_t n = 0;
  if (width >= L) {
    for (; n < rows; n += L) {
      const int64_t there = least(L, rows - n);
      for (int64_t w = 0; w < batch; w += L) {
        Vec<T> lines[L];
        for (int i = 0; i < L; ++i) lines[i] = *(const Loose<T>*)(totals + (n + least(i, there - 1)) * width + w);
        transpose<T>(lines);
        const int64_t most = least(L, batch - w);
        for (int64_t i = 0; i < most; ++i) {
          E* to = y + (w + i) * stride + n;
          there == L ? store(to, lines[i]) : store_first(to, lines[i], there);
        }
      }
    }
    return;
  }
  for (int64_t w = 0; w < batch; ++w) {
    for (n = 0; n < rows; n += L) {
      const int64_t there = least(L, rows - n);
      Vec<T> line{};
      for (int64_t i = 0; i < there; ++i) line[i] = totals[(n + i) * width + w];
      there == L ? store(y + w * stride + n, line) : store_first(y + w * stride + n, line, there);
    }
  }
}

// ---- products with a tile ------------------------------------------------------------------------------------------------

// Values from p on as numbers of T: themselves, or a chunk of them widened.
template <typename E>
FOURFOLD_INLINE const Accumulate<E>* widened(const E* p, int64_t count, Accumulate<E>* chunk) {
  using T = Accumulate<E>;
  if constexpr (sizeof(E) == sizeof(T)) {
    return p;
  } else {
    constexpr int L = kLanes<T>;
    int64_t i = 0;
    for (; i + L <= count; i += L) *(Loose<T>*)(chunk + i) = load(p + i);
    if (i < count) *(Loose<T>*)(chunk + i) = load_first(p + i, count - i);
    return chunk;
  }
}

FOURFOLD_INLINE void ask_for(const Nonzeros& nz, int64_t row, int64_t last, int64_t s, int bytes) {
  const int64_t n = least(row + kAhead, last - 1);
  const int64_t from = within(nz.starts[n * nz.count + s], nz.nnz), to = within(nz.starts[n * nz.count + s + 1], nz.nnz);
  const char* values = static_cast<const char*>(nz.values);
  for (int64_t i = from * bytes; i < to * bytes; i += kCacheLine) __builtin_prefetch(values + i);
  for (int64_t i = from; i < to; i += kCacheLine / 2) __builtin_prefetch(nz.columns + i);
}

// The product of nonzeros with one row of x, four at a time: looking numbers up one by one beats instructions that gather them.
template <typename T>
FOURFOLD_INLINE void look_up(const T* x, uint32_t mask, const uint16_t* columns, const T* values, int64_t count,
                             Group<T, 4> (&sums)[4], T& rest) {
  const uint64_t masks = mask * kFourTimes;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      uint64_t four;
      __builtin_memcpy(&four, columns + i + 4 * j, sizeof(four));
      four &= masks;
      const Group<T, 4> found = {x[four & 0xffff], x[four >> 16 & 0xffff], x[four >> 32 & 0xffff], x[four >> 48]};
      sums[j] += found * load_group<T, 4>(values + i + 4 * j);
    }
  }
  for (; i < count; ++i) rest += values[i] * x[columns[i] & mask];
}

template <typename E>
void multiply_one(const Nonzeros& nonzeros, int64_t first, int64_t rows, int64_t s, const void* tile, uint32_t mask,
                  bool begins, const void* bias_, void* totals) {
  using T = Accumulate<E>;
  const Nonzeros nz = nonzeros;
  const E* bias = static_cast<const E*>(bias_);
  const T* x = static_cast<const T*>(tile);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r;
    T& total = static_cast<T*>(totals)[r];
    T rest = !begins ? total : bias != nullptr ? load_one(bias + n) : T{0};
    Group<T, 4> sums[4] = {};
    const int64_t from = within(nz.starts[n * nz.count + s], nz.nnz), to = within(nz.starts[n * nz.count + s + 1], nz.nnz);
    const E* values = static_cast<const E*>(nz.values);
    if constexpr (sizeof(E) == sizeof(T)) {
      look_up<T>(x, mask, nz.columns + from, values + from, to - from, sums, rest);
    } else {
      for (int64_t at = from; at < to; at += kChunk) {
        const int64_t count = least(kChunk, to - at);
        T chunk[kChunk];
        look_up<T>(x, mask, nz.columns + at, widened(values + at, count, chunk), count, sums, rest);
      }
    }
    const Group<T, 4> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    total = rest + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

template <typename E, int W>
void multiply(const Nonzeros& nonzeros, int64_t first, int64_t rows, int64_t s, const void* tile_, uint32_t mask, bool begins,
              const void* bias_, void* totals_) {
  using T = Accumulate<E>;
  constexpr int L = W < kLanes<T> ? W : kLanes<T>;
  constexpr int Z = W / L < 4 ? W / L : 4;  // vectors of a row that are summed up together
  constexpr int kSets = Z == 1 ? 4 : 2;     // sums that don't wait for each other
  using V = Group<T, L>;
  const Nonzeros nz = nonzeros;
  const uint64_t masks = mask * kFourTimes;
  const E* bias = static_cast<const E*>(bias_);
  const E* all = static_cast<const E*>(nz.values);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r;
    if (nz.count > 1) ask_for(nz, n, first + rows, s, sizeof(E));
    const int64_t from = within(nz.starts[n * nz.count + s], nz.nnz), to = within(nz.starts[n * nz.count + s + 1], nz.nnz);
#pragma GCC unroll 1
    for (int part = 0; part < W; part += Z * L) {
      const T* tile = static_cast<const T*>(tile_) + part;
      T* total = static_cast<T*>(totals_) + r * W + part;
      V sums[kSets][Z] = {};
      const T start = begins && bias != nullptr ? load_one(bias + n) : T{0};
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) sums[0][z] = begins ? spread<T, L>(start) : load_group<T, L>(total + z * L);
      constexpr bool kWidens = sizeof(E) != sizeof(T);
      for (int64_t at = from; at < to; at += kChunk) {
        const int64_t count = kWidens ? least(kChunk, to - at) : to - at;
        T chunk[kWidens ? kChunk : 1];
        const T* values = widened(all + at, count, chunk);
        const uint16_t* columns = nz.columns + at;
        int64_t i = 0;
        const auto add = [&](int64_t from_here) __attribute__((always_inline)) {
          uint64_t next = 0;
          __builtin_memcpy(&next, columns + from_here, 2 * kSets);
          next &= masks;
#pragma GCC unroll 4
          for (int j = 0; j < kSets; ++j) {
            const T* x = tile + static_cast<int64_t>(next >> (16 * j) & 0xffff) * W;
            const V value = spread<T, L>(values[from_here + j]);
#pragma GCC unroll 4
            for (int z = 0; z < Z; ++z) sums[j][z] += value * load_group<T, L>(x + z * L);
          }
        };
        for (; i + 16 <= count; i += 16) {
          __builtin_prefetch(reinterpret_cast<const char*>(all + at + i) + kStreamAhead);
          if (i % 32 == 0) __builtin_prefetch(reinterpret_cast<const char*>(columns + i) + kStreamAhead / 2);
#pragma GCC unroll 8
          for (int j = 0; j < 16; j += kSets) add(i + j);
        }
        for (; i + kSets <= count; i += kSets) add(i);
        for (; i < count; ++i) {
          const T* x = tile + static_cast<int64_t>(columns[i] & mask) * W;
          const V value = spread<T, L>(values[i]);
#pragma GCC unroll 4
          for (int z = 0; z < Z; ++z) sums[0][z] += value * load_group<T, L>(x + z * L);
        }
        if constexpr (!kWidens) break;
      }
#pragma GCC unroll 4
      for (int half = kSets / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) {
          for (int z = 0; z < Z; ++z) sums[j][z] += sums[j + half][z];
        }
      }
#pragma GCC unroll 4
      for (int z = 0; z < Z; ++z) store_group<T, L>(total + z * L, sums[0][z]);
    }
  }
}

template <typename E, int W>
void scatter(const uint16_t* columns, const void* values_, int64_t count, uint32_t base, uint32_t mask, const void* row_,
             void* tile_) {
  using T = Accumulate<E>;
  constexpr int L = W < kLanes<T> ? W : kLanes<T>;
  constexpr int Z = W / L < 4 ? W / L : 4;
  using V = Group<T, L>;
  const E* all = static_cast<const E*>(values_);
  for (int part = 0; part < W; part += Z * L) {
    V row[Z];
    for (int z = 0; z < Z; ++z) row[z] = load_group<T, L>(static_cast<const T*>(row_) + part + z * L);
    T* tile = static_cast<T*>(tile_) + part;
    for (int64_t at = 0; at < count; at += kChunk) {
      const int64_t some = least(kChunk, count - at);
      T chunk[kChunk];
      const T* values = widened(all + at, some, chunk);
#pragma GCC unroll 2
      for (int64_t i = 0; i < some; ++i) {
        T* to = tile + static_cast<int64_t>((columns[at + i] - base) & mask) * W;
        const V value = spread<T, L>(values[i]);
#pragma GCC unroll 4
        for (int z = 0; z < Z; ++z) store_group<T, L>(to + z * L, load_group<T, L>(to + z * L) + value * row[z]);
      }
    }
  }
}

#if defined(__AVX512BF16__)

// Tiles of bfloat16 for the instruction that multiplies pairs: 32 columns of the batch a vector, so placed that the pairs of
// two rows that unpacking makes are of columns 0 .. 15 and 16 .. 31.
struct ForPairs {
  using Element = uint16_t;
  static FOURFOLD_INLINE void store(uint16_t* p, Vec<float> x, int w) {
    const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16));
    const __m512i apart = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), _mm512_castsi256_si512(bits));
    _mm512_mask_storeu_epi64(p + w / 32 * 32, w % 32 == 0 ? 0x55 : 0xaa, apart);
  }
  static FOURFOLD_INLINE uint16_t convert(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
  static FOURFOLD_INLINE int place(int w) { return w / 32 * 32 + w % 16 / 4 * 8 + w % 32 / 16 * 4 + w % 4; }
};

FOURFOLD_INLINE __m512 add_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

template <int W>
void multiply_pairs(const Nonzeros& nonzeros, int64_t first, int64_t rows, int64_t s, const void* tile_, uint32_t mask,
                    bool begins, const void* bias_, void* totals_) {
  constexpr int Z = W / 32;
  constexpr int kSets = 2;
  const Nonzeros nz = nonzeros;
  const BFloat16* bias = static_cast<const BFloat16*>(bias_);
  const uint16_t* all = static_cast<const uint16_t*>(nz.values);
  const uint16_t* tile = static_cast<const uint16_t*>(tile_);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t n = first + r;
    if (nz.count > 1) ask_for(nz, n, first + rows, s, 2);
    const int64_t from = within(nz.starts[n * nz.count + s], nz.nnz), to = within(nz.starts[n * nz.count + s + 1], nz.nnz);
    float* total = static_cast<float*>(totals_) + r * W;
    __m512 sums[kSets][2 * Z];
    const float start = begins && bias != nullptr ? load_one(bias + n) : 0.0f;
#pragma GCC unroll 4
    for (int z = 0; z < 2 * Z; ++z) {
      sums[0][z] = begins ? _mm512_set1_ps(start) : _mm512_loadu_ps(total + 16 * z);
      sums[1][z] = _mm512_setzero_ps();
    }
    int64_t i = from;
    const auto add = [&](__m512(&into)[2 * Z], int64_t at) __attribute__((always_inline)) {
      uint32_t pair;
      __builtin_memcpy(&pair, all + at, sizeof(pair));
      const __m512i values = _mm512_set1_epi32(static_cast<int>(pair));
      const uint16_t* a = tile + static_cast<int64_t>(nz.columns[at] & mask) * W;
      const uint16_t* b = tile + static_cast<int64_t>(nz.columns[at + 1] & mask) * W;
#pragma GCC unroll 2
      for (int z = 0; z < Z; ++z) {
        const __m512i x = _mm512_loadu_si512(a + 32 * z), y = _mm512_loadu_si512(b + 32 * z);
        into[2 * z] = add_pairs(into[2 * z], _mm512_unpacklo_epi16(x, y), values);
        into[2 * z + 1] = add_pairs(into[2 * z + 1], _mm512_unpackhi_epi16(x, y), values);
      }
    };
    for (; i + 4 <= to; i += 4) {
      add(sums[0], i);
      add(sums[1], i + 2);
    }
    if (i + 2 <= to) {
      add(sums[0], i);
      i += 2;
    }
    if (i < to) {
      const __m512i value = _mm512_set1_epi32(all[i]);
      const uint16_t* a = tile + static_cast<int64_t>(nz.columns[i] & mask) * W;
#pragma GCC unroll 2
      for (int z = 0; z < Z; ++z) {
        const __m512i x = _mm512_loadu_si512(a + 32 * z), zero = _mm512_setzero_si512();
        sums[1][2 * z] = add_pairs(sums[1][2 * z], _mm512_unpacklo_epi16(x, zero), value);
        sums[1][2 * z + 1] = add_pairs(sums[1][2 * z + 1], _mm512_unpackhi_epi16(x, zero), value);
      }
    }
#pragma GCC unroll 4
    for (int z = 0; z < 2 * Z; ++z) _mm512_storeu_ps(total + 16 * z, _mm512_add_ps(sums[0][z], sums[1][z]));
  }
}

#endif

// ---- products with the bits ----------------------------------------------------------------------------------------------

// Rows of the weight at a time, and bytes of x that a piece of them is multiplied with before the next.
constexpr int kBitmapBlock = 16;
constexpr int64_t kBitmapBytes = 16384;

FOURFOLD_INLINE int64_t bitmap_piece(int64_t words, int64_t bytes_of_word) {
  return words * bytes_of_word <= 2 * kBitmapBytes ? words
         : kBitmapBytes / bytes_of_word > 0        ? kBitmapBytes / bytes_of_word
                                                   : 1;
}

template <typename E>
constexpr bool kExpands =
#if defined(__AVX512F__)
    true;
#elif defined(__AVX2__)
    sizeof(Accumulate<E>) == 4;
#else
    false;
#endif

// Products of words [begin, end) of R rows of bits, whose values from p on are taken, with M rows of x. R rows share what is
// loaded of x.
template <typename E, int M, int R, int kSets>
FOURFOLD_INLINE void bitmap_words(const BitmapJob& job, const uint8_t* bits, int64_t begin, int64_t end, const E** at,
                                  Vec<Accumulate<E>> (*totals)[M]) {
  using T = Accumulate<E>;
  constexpr int L = kLanes<T>;
  const E* const last = static_cast<const E*>(job.values) + job.nnz;
  const E* p[R];
  Vec<T> sums[kSets][R][M] = {};
  for (int r = 0; r < R; ++r) {
    p[r] = at[r];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[0][r][m] = totals[r][m];
  }
  for (int64_t w = begin; w < end; ++w) {
    const T* column = static_cast<const T*>(job.x) + 64 * w;
    uint64_t words[R];
    bool room = true;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      words[r] = word_at(bits, r * job.words + w);
      room &= last - p[r] >= 64;
      __builtin_prefetch(reinterpret_cast<const char*>(p[r]) + kStreamAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(p[r]) + kStreamAhead + kCacheLine);
    }
    const auto add = [&](int j, const Vec<T>(&values)[R], const LaneMask(&masks)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        Vec<T> x = *(const Loose<T>*)(column + m * job.pitch + j * L);
        if constexpr (R > 1) in_register(x);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          Vec<T>& sum = sums[j % kSets][r][m];
          sum = add_product<T>(sum, values[r], x, masks[r]);
        }
      }
    };
    const auto bits_of = [&](int r, int j) __attribute__((always_inline)) {
      return static_cast<uint32_t>(words[r] >> (j * L)) & ((1u << L) - 1);
    };
    if constexpr (kExpands<E>) {
      if (__builtin_expect(room, 1)) {
#pragma GCC unroll 8
        for (int j = 0; j < 64 / L; ++j) {
          Vec<T> values[R];
          LaneMask masks[R];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            const uint32_t own = bits_of(r, j);
            masks[r] = lane_mask(own);
#if defined(__AVX2__)
            if constexpr (sizeof(E) == 4) {
              values[r] = expand_from(p[r], own, masks[r]);
            } else {
              values[r] = expand(load(p[r]), own, masks[r]);
            }
#endif
            p[r] += popcount(own);
          }
          add(j, values, masks);
        }
        continue;
      }
    }
    // One by one, where no vector does it, or none may be read any more.
    T places[R][64] = {};
    for (int r = 0; r < R; ++r) {
      for (uint64_t rest = words[r]; rest != 0 && p[r] < last; rest &= rest - 1) {
        places[r][__builtin_ctzll(rest)] = load_one(p[r]++);
      }
    }
#pragma GCC unroll 1
    for (int first = 0; first < 64; first += kSets * L) {
#pragma GCC unroll 4
      for (int j = 0; j < kSets; ++j) {
        Vec<T> values[R];
        LaneMask masks[R];
        for (int r = 0; r < R; ++r) {
          values[r] = *(const Loose<T>*)(places[r] + first + j * L);
          masks[r] = lane_mask(bits_of(r, first / L + j));
        }
        add(first / L + j, values, masks);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    at[r] = p[r];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      for (int j = 1; j < kSets; ++j) sums[0][r][m] += sums[j][r][m];
      totals[r][m] = sums[0][r][m];
    }
  }
}

template <typename E, int M>
void bitmap_rows(const BitmapJob& job_, int64_t first, int64_t last) {
  using T = Accumulate<E>;
  constexpr int kTogether = M >= 4 && kVectorBytes == 64 ? 2 : 1;  // as many sums as there are registers for
  // Sums that don't wait for each other; as many for a row that is left over, whose result is to be the same in any company.
  constexpr int kSums = M * kTogether, kSets = kSums <= 2 ? 4 : kSums == 4 ? 2 : 1;
  const BitmapJob job = job_;
  const int64_t piece = bitmap_piece(job.words, M * 64 * static_cast<int64_t>(sizeof(T)));
  for (; first < last; first += kBitmapBlock) {
    const int64_t rows = least(kBitmapBlock, last - first);
    const E* at[kBitmapBlock];
    Vec<T> totals[kBitmapBlock][M];
    for (int64_t r = 0; r < rows; ++r) {
      at[r] = static_cast<const E*>(job.values) + within(job.starts[first + r], job.nnz);
      for (int m = 0; m < M; ++m) totals[r][m] = Vec<T>{};
    }
    for (int64_t begin = 0; begin < job.words; begin += piece) {
      const int64_t end = least(begin + piece, job.words);
      const uint8_t* bits = job.bits + first * job.words * 8;
      int64_t r = 0;
      for (; r + kTogether <= rows; r += kTogether) {
        bitmap_words<E, M, kTogether, kSets>(job, bits + r * job.words * 8, begin, end, at + r, totals + r);
      }
      if constexpr (kTogether > 1) {
        if (r < rows) bitmap_words<E, M, 1, kSets>(job, bits + r * job.words * 8, begin, end, at + r, totals + r);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T start = job.bias == nullptr ? T{0} : load_one(static_cast<const E*>(job.bias) + first + r);
      for (int m = 0; m < M && m < job.batch; ++m) {
        E* y = static_cast<E*>(job.y) + m * job.stride + first + r;
        store_first(y, broadcast(over_lanes<T>(totals[r][m]) + start), 1);
      }
    }
  }
}

template <typename E>
void bitmap_x(const void* x_, int64_t k, void* out_, int64_t pitch) {
  using T = Accumulate<E>;
  const E* x = static_cast<const E*>(x_);
  T* out = static_cast<T*>(out_);
  int64_t i = 0;
  for (; i + kLanes<T> <= k; i += kLanes<T>) *(Loose<T>*)(out + i) = load(x + i);
  for (; i < pitch; i += kLanes<T>) *(Loose<T>*)(out + i) = load_first(x + least(i, k), within(k - i, kLanes<T>));
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

template <int M>
void bitmap_rows_of_pairs(const BitmapJob& job_, int64_t first, int64_t last) {
  constexpr int kSets = M <= 4 ? 2 : 1;
  const BitmapJob job = job_;
  const uint16_t* const end = static_cast<const uint16_t*>(job.values) + job.nnz;
  const uint16_t* const x = static_cast<const uint16_t*>(job.x);
  const int64_t pitch = job.pitch, piece = bitmap_piece(job.words, M * 64 * 2);
  for (; first < last; first += kBitmapBlock) {
    const int64_t rows = least(kBitmapBlock, last - first);
    const uint16_t* at[kBitmapBlock];
    __m512 totals[kBitmapBlock][M];
    for (int64_t r = 0; r < rows; ++r) {
      at[r] = static_cast<const uint16_t*>(job.values) + within(job.starts[first + r], job.nnz);
      for (int m = 0; m < M; ++m) totals[r][m] = _mm512_setzero_ps();
    }
    for (int64_t word_start = 0; word_start < job.words; word_start += piece) {
      const int64_t word_end = least(word_start + piece, job.words);
      for (int64_t r = 0; r < rows; ++r) {
        const uint16_t* p = at[r];
        const uint8_t* bits = job.bits + (first + r) * job.words * 8;
        __m512 sums[kSets][M] = {};
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[0][m] = totals[r][m];
        for (int64_t w = word_start; w < word_end; ++w) {
          const uint64_t word = word_at(bits, w);
          const int count = popcount(word), low_count = popcount(word & 0xffffffff);
          __m512i low, high;
          __builtin_prefetch(p + kStreamAhead / 2);
          if (__builtin_expect(end - p >= 64, 1)) {
            low = _mm512_loadu_si512(p);
            high = _mm512_loadu_si512(p + low_count);
            p += count;
          } else {
            const int64_t there = end - p, later = within(there - low_count, 32);
            low = _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << least(there, 32)) - 1), p);
            high = _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << later) - 1), p + least(low_count, there));
            p += least(count, there);
          }
          __mmask32 low_mask = (__mmask32)word, high_mask = (__mmask32)(word >> 32);
          __asm__("" : "+Yk"(low_mask), "+Yk"(high_mask));  // as in lane_mask
          in_register(low);
          in_register(high);
          low = _mm512_maskz_expand_epi16(low_mask, low);
          high = _mm512_maskz_expand_epi16(high_mask, high);
          const uint16_t* column = x + 64 * w;
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const uint16_t* from = column + m * pitch;
            sums[0][m] = add_pairs(sums[0][m], low, _mm512_maskz_loadu_epi16(low_mask, from));
            __m512& other = sums[kSets - 1][m];
            other = add_pairs(other, high, _mm512_maskz_loadu_epi16(high_mask, from + 32));
          }
        }
        at[r] = p;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) totals[r][m] = kSets == 2 ? _mm512_add_ps(sums[0][m], sums[1][m]) : sums[0][m];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float start = job.bias == nullptr ? 0.0f : load_one(static_cast<const BFloat16*>(job.bias) + first + r);
      for (int m = 0; m < M && m < job.batch; ++m) {
        BFloat16* y = static_cast<BFloat16*>(job.y) + m * job.stride + first + r;
        store_first(y, broadcast(over_lanes<float>((Vec<float>)totals[r][m]) + start), 1);
      }
    }
  }
}

void bitmap_x_pairs(const void* x, int64_t k, void* out_, int64_t pitch) {
  uint16_t* out = static_cast<uint16_t*>(out_);
  __builtin_memcpy(out, x, static_cast<size_t>(k) * 2);
  __builtin_memset(out + k, 0, static_cast<size_t>(pitch - k) * 2);
}

#endif

// Batches between the sizes that are compiled take the next larger one; x is padded to it.
template <typename E>
void bitmap(const BitmapJob& job, int64_t first, int64_t last) {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  if constexpr (sizeof(E) == 2) {
    if constexpr (E::kIsBFloat16) {
      return (job.batch == 1   ? bitmap_rows_of_pairs<1>
              : job.batch == 2 ? bitmap_rows_of_pairs<2>
              : job.batch <= 4 ? bitmap_rows_of_pairs<4>
                               : bitmap_rows_of_pairs<8>)(job, first, last);
    }
  }
#endif
  (job.batch == 1   ? bitmap_rows<E, 1>
   : job.batch == 2 ? bitmap_rows<E, 2>
   : job.batch <= 4 ? bitmap_rows<E, 4>
                    : bitmap_rows<E, 8>)(job, first, last);
}

// ---- inner products ------------------------------------------------------------------------------------------------------

template <typename E>
void dots(const void* a_, const void* b_, int64_t depth, const uint16_t* columns, int64_t count, void* values_) {
  using T = Accumulate<E>;
  constexpr int L = kLanes<T>;
  const E* a = static_cast<const E*>(a_);
  const E* b = static_cast<const E*>(b_);
  E* values = static_cast<E*>(values_);
  for (int64_t i = 0; i < count; i += L) {
    const int64_t some = least(L, count - i);
    const E* rows[L];
    for (int g = 0; g < L; ++g) rows[g] = b + columns[i + least(g, some - 1)] * depth;
    Vec<T> sums[L] = {};
    int64_t d = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
      if constexpr (E::kIsBFloat16) {
        for (; d < depth; d += 32) {
          const __mmask32 valid = (__mmask32)((uint64_t{1} << least(32, depth - d)) - 1);
          const __m512i x = _mm512_maskz_loadu_epi16(valid, a + d);
#pragma GCC unroll 16
          for (int g = 0; g < L; ++g) {
            sums[g] = (Vec<T>)add_pairs((__m512)sums[g], x, _mm512_maskz_loadu_epi16(valid, rows[g] + d));
          }
        }
      }
    }
#endif
    // In pieces, so that few lanes don't lose what many would keep.
    Vec<T> totals[L] = {};
    while (d + L <= depth) {
      for (const int64_t end = least(depth, d + 64 * L); d + L <= end; d += L) {
        const Vec<T> x = load(a + d);
#pragma GCC unroll 16
        for (int g = 0; g < L; ++g) sums[g] += x * load(rows[g] + d);
      }
      for (int g = 0; g < L; ++g) totals[g] += sums[g], sums[g] = Vec<T>{};
    }
    if (d < depth) {
      const Vec<T> x = load_first(a + d, depth - d);
#pragma GCC unroll 16
      for (int g = 0; g < L; ++g) sums[g] += x * load_first(rows[g] + d, depth - d);
    }
    for (int g = 0; g < L; ++g) sums[g] += totals[g];
    const Vec<T> result = over_lanes_of_all<T>(sums);
    some == L ? store(values + i, result) : store_first(values + i, result, some);
  }
}

#define FOURFOLD_WIDTHS(function, E) \
  {function<E, 1>, function<E, 4>, function<E, 8>, function<E, 16>, function<E, 32>, function<E, 64>}
#define FOURFOLD_MULTIPLY(E) \
  {multiply_one<E>, multiply<E, 4>, multiply<E, 8>, multiply<E, 16>, multiply<E, 32>, multiply<E, 64>}
#define FOURFOLD_PACKS(E)                                                                                        \
  {pack<E, 1, Plainly<Accumulate<E>>>,  pack<E, 4, Plainly<Accumulate<E>>>,  pack<E, 8, Plainly<Accumulate<E>>>, \
   pack<E, 16, Plainly<Accumulate<E>>>, pack<E, 32, Plainly<Accumulate<E>>>, pack<E, 64, Plainly<Accumulate<E>>>}

#if defined(__AVX512BF16__)
#define FOURFOLD_PAIR_MULTIPLY                                           \
  {multiply_one<BFloat16>, multiply<BFloat16, 4>, multiply<BFloat16, 8>, \
   multiply<BFloat16, 16>, multiply_pairs<32>,    multiply_pairs<64>}
#define FOURFOLD_PAIR_PACKS                                                                                  \
  {pack<BFloat16, 1, Plainly<float>>,  pack<BFloat16, 4, Plainly<float>>, pack<BFloat16, 8, Plainly<float>>, \
   pack<BFloat16, 16, Plainly<float>>, pack<BFloat16, 32, ForPairs>,      pack<BFloat16, 64, ForPairs>}
#define FOURFOLD_PAIR_BYTES {4, 4, 4, 4, 2, 2}
#else
#define FOURFOLD_PAIR_MULTIPLY FOURFOLD_MULTIPLY(BFloat16)
#define FOURFOLD_PAIR_PACKS FOURFOLD_PACKS(BFloat16)
#define FOURFOLD_PAIR_BYTES {4, 4, 4, 4, 4, 4}
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define FOURFOLD_PAIR_BITMAP_X bitmap_x_pairs
#define FOURFOLD_PAIR_BITMAP_BYTES 2
#else
#define FOURFOLD_PAIR_BITMAP_X bitmap_x<BFloat16>
#define FOURFOLD_PAIR_BITMAP_BYTES 4
#endif

}  // namespace

extern const sparse::Kernels sparse_kernels = {
    {FOURFOLD_MULTIPLY(Half), FOURFOLD_PAIR_MULTIPLY, FOURFOLD_MULTIPLY(float), FOURFOLD_MULTIPLY(double)},
    {FOURFOLD_PACKS(Half), FOURFOLD_PAIR_PACKS, FOURFOLD_PACKS(float), FOURFOLD_PACKS(double)},
    {{4, 4, 4, 4, 4, 4}, FOURFOLD_PAIR_BYTES, {4, 4, 4, 4, 4, 4}, {8, 8, 8, 8, 8, 8}},
    {FOURFOLD_WIDTHS(scatter, Half), FOURFOLD_WIDTHS(scatter, BFloat16), FOURFOLD_WIDTHS(scatter, float),
     FOURFOLD_WIDTHS(scatter, double)},
    {FOURFOLD_PACKS(Half), FOURFOLD_PACKS(BFloat16), FOURFOLD_PACKS(float), FOURFOLD_PACKS(double)},
    {unpack<Half>, unpack<BFloat16>, unpack<float>, unpack<double>},
    {bitmap<Half>, bitmap<BFloat16>, bitmap<float>, bitmap<double>},
    {bitmap_x<Half>, FOURFOLD_PAIR_BITMAP_X, bitmap_x<float>, bitmap_x<double>},
    {4, FOURFOLD_PAIR_BITMAP_BYTES, 4, 8},
    {dots<Half>, dots<BFloat16>, dots<float>, dots<double>},
    columns,
    count,
    {gather<2>, gather<4>, gather<8>},
    {scatter_row<2>, scatter_row<4>, scatter_row<8>},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
