// Vectors for kernels: GCC/Clang vector extensions of this tier's width, and one name here for each operation that vector types
// can't say, with a portable fallback. The only file that may include <immintrin.h> or <arm_neon.h>.
//
// A kernel file includes this and <cstdint> only and lives in namespace FOURFOLD_ISA: a template of the standard library
// instantiated there would be a weak symbol shared by all tiers and could put AVX-512 code into the baseline path.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FOURFOLD_ISA
#error "compile kernels with -DFOURFOLD_ISA=<tier>"
#endif

#define FOURFOLD_INLINE inline __attribute__((always_inline))

namespace fourfold {
namespace FOURFOLD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Element types as they lie in memory; Accumulate<E> is the type they are computed in.
struct Half {
  static constexpr bool kIsBFloat16 = false;
  uint16_t bits;
};
struct BFloat16 {
  static constexpr bool kIsBFloat16 = true;
  uint16_t bits;
};
template <typename E>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename E>
using Accumulate = typename AccumulateOf<E>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Vec<T> is an aligned vector; Loose<T> the same read or written at any address.
template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using Loose = typename VectorOf<T>::loose;

template <typename T>
FOURFOLD_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

// x in the first n lanes, value in the others.
template <typename T>
FOURFOLD_INLINE Vec<T> fill_after(Vec<T> x, int64_t n, T value) {
  typename VectorOf<T>::index number;
  for (int i = 0; i < kLanes<T>; ++i) number[i] = i;
  return number < static_cast<decltype(number[0] + number[0])>(n) ? x : broadcast(value);
}

// x where it is above 0 or NaN, else 0.
template <typename T>
FOURFOLD_INLINE Vec<T> positive_part(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x);
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm_max_ps(_mm_setzero_ps(), (__m128)x);
#endif
  return x < T{0} ? Vec<T>{} : x;
}

// ---- 16-bit floats -------------------------------------------------------------------------------------------------------

// As many 16-bit values as a vector has floats.
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t LooseBits16 __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

FOURFOLD_INLINE Bits32 zero_extend(Bits16 x) {
#if defined(__AVX512F__)
  return (Bits32)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Bits32);
#endif
}

// The low 16 bits of each lane, whose high 16 are zero.
FOURFOLD_INLINE Bits16 truncate(Bits32 x) {
#if defined(__AVX512F__)
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Bits16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Bits16);
#endif
}

FOURFOLD_INLINE Vec<float> widen(Bits16 x, BFloat16) { return (Vec<float>)(zero_extend(x) << 16); }

// Round to nearest even; a NaN stays one (its top bit of payload is set so that truncation can't make it an infinity).
FOURFOLD_INLINE Bits16 narrow(Vec<float> x, BFloat16) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormals for zero; they are rare enough to branch on.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0, 1)) return (Bits16)_mm512_cvtneps_pbh((__m512)x);
#endif
  const Bits32 bits = (Bits32)x;
  const Bits32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits32 is_nan = (Bits32)(x != x);
  return truncate(((is_nan & (bits | 0x400000)) | (~is_nan & rounded)) >> 16);
}

FOURFOLD_INLINE Vec<float> widen(Bits16 x, Half) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)x);
#else
  // Exponent and mantissa move into place, 2^112 corrects the bias and makes subnormals normal; infinity and NaN are mended.
  const Bits32 bits = zero_extend(x);
  const Bits32 magnitude = (bits & 0x7fff) << 13;
  const Vec<float> scaled = (Vec<float>)magnitude * 0x1p112f;
  const Bits32 special = (Bits32)(magnitude >= (0x7c00u << 13));
  return (Vec<float>)((Bits32)scaled | (special & 0x7f800000) | ((bits & 0x8000) << 16));
#endif
}

FOURFOLD_INLINE Bits16 narrow(Vec<float> x, Half) {
#if defined(__AVX512F__)
  return (Bits16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Bits16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (Bits16)vcvt_f16_f32((float32x4_t)x);
#else
  const Bits32 bits = (Bits32)x;
  const Bits32 sign = (bits >> 16) & 0x8000;
  const Bits32 magnitude = bits & 0x7fffffff;
  // Normal results: drop 13 bits to nearest even and re-bias. Overflow carries into the exponent of infinity by itself.
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal results: adding one half puts the rounded mantissa into the low bits.
  const Bits32 subnormal = (Bits32)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  const Bits32 is_small = (Bits32)(magnitude < (113u << 23));
  const Bits32 is_large = (Bits32)(magnitude >= (143u << 23));  // 65536 and more, infinity, NaN
  const Bits32 is_nan = (Bits32)(x != x);
  const Bits32 large = (Bits32{} + 0x7c00) | (is_nan & (0x200 | ((magnitude >> 13) & 0x3ff)));
  return truncate(sign | (is_small & subnormal) | (is_large & large) | (~is_small & ~is_large & normal));
#endif
}

// ---- integers ------------------------------------------------------------------------------------------------------------

// kLanes<T> signed 16-bit integers from p on.
template <typename T>
FOURFOLD_INLINE Vec<T> load_integers(const int16_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
#endif
  Vec<T> x;
  for (int i = 0; i < kLanes<T>; ++i) x[i] = static_cast<T>(p[i]);
  return x;
}

// As many pairs of signed 16-bit integers as a vector has floats, a pair a lane; integers() takes them apart.
FOURFOLD_INLINE Vec<float> load_pairs(const int16_t* p) {
  typedef float pairs __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  return *(const pairs*)p;
}

// The first or second integer of each pair.
FOURFOLD_INLINE Vec<float> integers(Vec<float> pairs, int second) {
  typedef VectorOf<float>::index Int;
  const Int bits = (Int)pairs;
  return __builtin_convertvector((second ? bits : bits << 16) >> 16, Vec<float>);
}

// As many bytes as a vector has floats, from p on.
FOURFOLD_INLINE Vec<float> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = static_cast<float>(p[i]);
  return x;
#endif
}

// ---- load and store ------------------------------------------------------------------------------------------------------

template <typename E>
FOURFOLD_INLINE Vec<Accumulate<E>> load(const E* p) {
  if constexpr (sizeof(E) == 1) {
    return load_bytes(p);
  } else if constexpr (sizeof(E) == 2) {
    return widen(*(const LooseBits16*)p, E{});
  } else {
    return *(const Loose<E>*)p;
  }
}

template <typename E>
FOURFOLD_INLINE void store(E* p, Vec<Accumulate<E>> x) {
  if constexpr (sizeof(E) == 2) {
    *(LooseBits16*)p = narrow(x, E{});
  } else {
    *(Loose<E>*)p = x;
  }
}

// Stores kCount vectors, one after the other.
template <typename E, int kCount>
FOURFOLD_INLINE void store_all(E* p, const Vec<Accumulate<E>> (&x)[kCount]) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(E) == 2 && kCount % 2 == 0) {
    if constexpr (E::kIsBFloat16) {
      // As in narrow, with one branch for all and two vectors an instruction.
      constexpr int kSubnormal = 0x20;
      __mmask16 rare = 0;
      for (int v = 0; v < kCount; ++v) rare |= _mm512_fpclass_ps_mask((__m512)x[v], kSubnormal);
      if (__builtin_expect(rare == 0, 1)) {
        for (int v = 0; v < kCount; v += 2) {
          const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]);
          _mm512_storeu_si512(p + v * kLanes<float>, (__m512i)both);
        }
        return;
      }
    }
  }
#endif
  for (int v = 0; v < kCount; ++v) store(p + v * kLanes<Accumulate<E>>, x[v]);
}

// The first n lanes (0 <= n <= lanes), zero in the rest; reads nothing past them.
template <typename E>
FOURFOLD_INLINE Vec<Accumulate<E>> load_first(const E* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) {
    return widen((Bits16)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p), E{});
  } else if constexpr (sizeof(E) == 4) {
    return (Vec<float>)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  } else {
    return (Vec<double>)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(E) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec<float>)_mm256_maskload_ps((const float*)p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
  } else if constexpr (sizeof(E) == 8) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return (Vec<double>)_mm256_maskload_pd((const double*)p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
#endif
  E lanes[kLanes<Accumulate<E>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <typename E>
FOURFOLD_INLINE Accumulate<E> load_one(const E* p) {
  return load_first(p, 1)[0];
}

// Writes the first n lanes and nothing past them.
template <typename E>
FOURFOLD_INLINE void store_first(E* p, Vec<Accumulate<E>> x, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) {
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)narrow(x, E{}));
  } else if constexpr (sizeof(E) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
  } else {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)x);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(E) == 4) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps((float*)p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane), (__m256)x);
    return;
  } else if constexpr (sizeof(E) == 8) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    _mm256_maskstore_pd((double*)p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane), (__m256d)x);
    return;
  }
#endif
  E lanes[kLanes<Accumulate<E>>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// A store past the caches, for results larger than they are; an address that is not aligned for it is stored normally.
// Other threads see it after stream_fence().
template <typename E>
FOURFOLD_INLINE void store_stream(E* p, Vec<Accumulate<E>> x) {
#if defined(__x86_64__)
  constexpr int kBytes = kLanes<Accumulate<E>> * static_cast<int>(sizeof(E));
  if (kBytes >= 16 && (uintptr_t)p % kBytes == 0) {
    if constexpr (sizeof(E) == 2) {
#if defined(__AVX512F__)
      _mm256_stream_si256((__m256i*)p, (__m256i)narrow(x, E{}));
      return;
#elif defined(__AVX2__)
      _mm_stream_si128((__m128i*)p, (__m128i)narrow(x, E{}));
      return;
#endif
    } else {
#if defined(__AVX512F__)
      _mm512_stream_ps((float*)p, (__m512)x);
#elif defined(__AVX2__)
      _mm256_stream_ps((float*)p, (__m256)x);
#else
      _mm_stream_ps((float*)p, (__m128)x);
#endif
      return;
    }
  }
#endif
  store(p, x);
}

FOURFOLD_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- bit masks -----------------------------------------------------------------------------------------------------------

// Bit l: whether lane l of a comparison's result is set.
template <typename T>
FOURFOLD_INLINE uint32_t lane_bits(typename VectorOf<T>::index compared) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)compared);
  return _mm512_movepi64_mask((__m512i)compared);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)compared));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)compared));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)compared));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)compared));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<T>; ++l) bits |= (compared[l] ? 1u : 0u) << l;
  return bits;
#endif
}

// All bits of lane l set where bit l is: what a comparison gives.
template <typename T>
FOURFOLD_INLINE typename VectorOf<T>::index lanes_of(uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (typename VectorOf<T>::index)_mm512_movm_epi32((__mmask16)bits);
  return (typename VectorOf<T>::index)_mm512_movm_epi64((__mmask8)bits);
#else
  typename VectorOf<T>::index own;
  for (int l = 0; l < kLanes<T>; ++l) own[l] = 1 << l;
  return (own & static_cast<decltype(own[0] + own[0])>(bits)) != 0;
#endif
}

// x in the lanes whose bit is set, 0 in the others, whatever they hold.
template <typename T>
FOURFOLD_INLINE Vec<T> keep(Vec<T> x, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
  return (Vec<T>)_mm512_maskz_mov_pd((__mmask8)bits, (__m512d)x);
#else
  return (Vec<T>)((typename VectorOf<T>::index)x & lanes_of<T>(bits));
#endif
}

// Bits first, first + 1, … of a packed row; `first` is a multiple of `lanes`, which is 2, 4, 8 or 16.
typedef uint16_t LooseWord16 __attribute__((aligned(1), may_alias));
FOURFOLD_INLINE uint32_t mask_bits(const uint8_t* row, int64_t first, int lanes) {
  if (lanes == 16) return *(const LooseWord16*)(row + first / 8);
  return (row[first / 8] >> (first % 8)) & ((1u << lanes) - 1);
}

// Bit i: whether byte i of 64 is not zero.
FOURFOLD_INLINE uint64_t nonzero_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi8_mask(x, x);
#else
  typedef uint64_t LooseWord __attribute__((aligned(1), may_alias));
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const uint64_t x = *(const LooseWord*)(p + 8 * i);
    // The top bit of each byte that is not zero, then all eight brought together into the last byte.
    const uint64_t tops = (((x & kLow) + kLow) | x) & ~kLow;
    bits |= ((tops >> 7) * 0x0102040810204080 >> 56) << (8 * i);
  }
  return bits;
#endif
}

// Byte i of 64 becomes 1 where bit i is set, else 0.
FOURFOLD_INLINE void spread_bits(uint64_t bits, uint8_t* p) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(p, _mm512_maskz_set1_epi8(bits, 1));
#else
  typedef uint64_t LooseWord __attribute__((aligned(1), may_alias));
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  for (int i = 0; i < 8; ++i) {
    const uint64_t x = (bits >> (8 * i) & 0xff) * 0x0101010101010101 & 0x8040201008040201;
    *(LooseWord*)(p + 8 * i) = ((((x & kLow) + kLow) | x) & ~kLow) >> 7;
  }
#endif
}

FOURFOLD_INLINE int popcount(uint64_t bits) {
#if defined(__AVX2__)
  return static_cast<int>(_mm_popcnt_u64(bits));
#else
  return __builtin_popcountll(bits);
#endif
}

// ---- doubles from any type -----------------------------------------------------------------------------------------------

// Half as many floats as a vector has: as many as it has doubles.
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));
typedef float LooseHalfFloats __attribute__((vector_size(kVectorBytes / 2), aligned(4), may_alias));

// The compiler would convert half of them at a time.
FOURFOLD_INLINE Vec<double> to_doubles(HalfFloats x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_cvtps_pd((__m256)x);
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}
FOURFOLD_INLINE HalfFloats to_floats(Vec<double> x) {
#if defined(__AVX512F__)
  return (HalfFloats)_mm512_cvtpd_ps((__m512d)x);
#else
  return __builtin_convertvector(x, HalfFloats);
#endif
}

FOURFOLD_INLINE void split(Vec<float> x, Vec<double> (&to)[2]) {
#if defined(__AVX512F__)
  to[0] = to_doubles((HalfFloats)_mm512_castps512_ps256((__m512)x));
  to[1] = to_doubles((HalfFloats)_mm512_extractf32x8_ps((__m512)x, 1));
#else
  union {
    Vec<float> whole;
    HalfFloats halves[2];
  } parts = {x};
  for (int i = 0; i < 2; ++i) to[i] = to_doubles(parts.halves[i]);
#endif
}

// kLanes<float> elements from p on, or the first n of them and zeros.
template <typename E>
FOURFOLD_INLINE void load_doubles(const E* p, Vec<double> (&to)[2]) {
  if constexpr (sizeof(E) == 8) {
    for (int i = 0; i < 2; ++i) to[i] = load(p + i * kLanes<double>);
  } else if constexpr (sizeof(E) == 4) {
    for (int i = 0; i < 2; ++i) to[i] = to_doubles(*(const LooseHalfFloats*)(p + i * kLanes<double>));
  } else {
    split(load(p), to);
  }
}
template <typename E>
FOURFOLD_INLINE void load_doubles_first(const E* p, int64_t n, Vec<double> (&to)[2]) {
  if constexpr (sizeof(E) == 8) {
    constexpr int kHalf = kLanes<double>;
    to[0] = load_first(p, n < kHalf ? n : kHalf);
    to[1] = n > kHalf ? load_first(p + kHalf, n - kHalf) : Vec<double>{};
  } else {
    split(load_first(p, n), to);
  }
}

// What an element of type T holds of x.
FOURFOLD_INLINE Vec<double> rounded_to(Vec<double> x, float) { return to_doubles(to_floats(x)); }
FOURFOLD_INLINE Vec<double> rounded_to(Vec<double> x, double) { return x; }

FOURFOLD_INLINE void store_rounded(float* p, Vec<double> x) { *(LooseHalfFloats*)p = to_floats(x); }
FOURFOLD_INLINE void store_rounded(double* p, Vec<double> x) { store(p, x); }

// ---- pairs of bfloat16 ---------------------------------------------------------------------------------------------------

// Two numbers that meet two others in an inner product, the first in the low bits; a Vec<float> holds as many pairs as floats.
struct BFloat16Pair {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
constexpr bool kDotsPairs = true;
#else
constexpr bool kDotsPairs = false;  // nothing is gained by them
#endif

// sum + a.first * b.first + a.second * b.second, in float: products of normal numbers are exact. The instruction takes
// subnormals, of factors and of results, for zero.
FOURFOLD_INLINE Vec<float> dot_pairs(Vec<float> sum, BFloat16Pair a, Vec<float> b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a.bits), (__m512bh)b);
#else
  const Bits32 factors = Bits32{} + a.bits, bits = (Bits32)b;
  sum += (Vec<float>)(factors & 0xffff0000u) * (Vec<float>)(bits & 0xffff0000u);
  return sum + (Vec<float>)(factors << 16) * (Vec<float>)(bits << 16);
#endif
}

// Pairs of elements that follow each other, the first n of them (n <= twice the floats of a vector) and zeros.
FOURFOLD_INLINE Vec<float> load_neighbours(const BFloat16* p, int64_t n) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffffu : (1u << n) - 1, p);
#else
  BFloat16 pairs[2 * kLanes<float>] = {};
  for (int64_t i = 0; i < n; ++i) pairs[i] = p[i];
  return *(const Loose<float>*)pairs;
#endif
}

// The n numbers at `first` (n <= the floats of a vector) each beside the one at `second`, or beside a zero if that is null.
FOURFOLD_INLINE Vec<float> zip_pairs(const BFloat16* first, const BFloat16* second, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 wanted = (__mmask16)((1u << n) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, first));
  if (second == nullptr) return (Vec<float>)low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, second));
  return (Vec<float>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  Bits32 pairs{};
  for (int64_t i = 0; i < n; ++i) {
    pairs[i] = first[i].bits | (second == nullptr ? 0u : static_cast<uint32_t>(second[i].bits) << 16);
  }
  return (Vec<float>)pairs;
#endif
}

// ---- lanes ---------------------------------------------------------------------------------------------------------------

#if defined(__clang__)
#define FOURFOLD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FOURFOLD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// Lane l of the result is lane Map::at(l) of a then b.
template <typename T, typename Map>
FOURFOLD_INLINE Vec<T> permute(Vec<T> a, Vec<T> b) {
  using Index [[maybe_unused]] = typename VectorOf<T>::index;
  if constexpr (kLanes<T> == 16) {
    return FOURFOLD_SHUFFLE(a, b, Map::at(0), Map::at(1), Map::at(2), Map::at(3), Map::at(4), Map::at(5), Map::at(6),
                            Map::at(7), Map::at(8), Map::at(9), Map::at(10), Map::at(11), Map::at(12), Map::at(13), Map::at(14),
                            Map::at(15));
  } else if constexpr (kLanes<T> == 8) {
    return FOURFOLD_SHUFFLE(a, b, Map::at(0), Map::at(1), Map::at(2), Map::at(3), Map::at(4), Map::at(5), Map::at(6),
                            Map::at(7));
  } else if constexpr (kLanes<T> == 4) {
    return FOURFOLD_SHUFFLE(a, b, Map::at(0), Map::at(1), Map::at(2), Map::at(3));
  } else {
    return FOURFOLD_SHUFFLE(a, b, Map::at(0), Map::at(1));
  }
}
template <typename T, typename Map>
FOURFOLD_INLINE Vec<T> permute(Vec<T> x) {
  return permute<T, Map>(x, x);
}

template <int kOffset>
struct Strided {
  static constexpr int at(int lane) { return 2 * lane + kOffset; }
};
template <int kLanes, int kHigh>
struct Zipped {
  static constexpr int at(int lane) { return (lane + kHigh * kLanes) / 2 + lane % 2 * kLanes; }
};

// even = lanes 0, 2, 4, … of a then b; odd = lanes 1, 3, 5, …
template <typename T>
FOURFOLD_INLINE void deinterleave(Vec<T> a, Vec<T> b, Vec<T>& even, Vec<T>& odd) {
  even = permute<T, Strided<0>>(a, b);
  odd = permute<T, Strided<1>>(a, b);
}

// The inverse: low then high = a0 b0 a1 b1 …
template <typename T>
FOURFOLD_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& low, Vec<T>& high) {
  low = permute<T, Zipped<kLanes<T>, 0>>(a, b);
  high = permute<T, Zipped<kLanes<T>, 1>>(a, b);
}

// Lane l of component kComponent of triples: element 3l + kComponent of three vectors, first among two of them, then with the
// third.
template <int kLanes, int kComponent>
struct FirstOfTriples {
  static constexpr int at(int lane) { return 3 * lane + kComponent < 2 * kLanes ? 3 * lane + kComponent : 0; }
};
template <int kLanes, int kComponent>
struct LastOfTriples {
  static constexpr int at(int lane) { return 3 * lane + kComponent < 2 * kLanes ? lane : 3 * lane + kComponent - kLanes; }
};

// Elements 0, 3, 6, … from p on, then 1, 4, 7, … and 2, 5, 8, …
template <typename E>
FOURFOLD_INLINE void load_triples(const E* p, Vec<Accumulate<E>>& a, Vec<Accumulate<E>>& b, Vec<Accumulate<E>>& c) {
  using T = Accumulate<E>;
#if defined(__AVX2__)
  if constexpr (sizeof(E) == 1) {
    // Twelve bytes to each 16-byte lane, and there each three of them to one 32-bit number.
#if defined(__AVX512F__)
    const __m512i in = _mm512_maskz_loadu_epi8((1ull << 48) - 1, p);
    const __m512i apart = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12), in);
    const __m512i triples =
        _mm512_shuffle_epi8(apart, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
    const __m512i byte = _mm512_set1_epi32(0xff);
    a = (Vec<T>)_mm512_cvtepi32_ps(_mm512_and_si512(triples, byte));
    b = (Vec<T>)_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(triples, 8), byte));
    c = (Vec<T>)_mm512_cvtepi32_ps(_mm512_srli_epi32(triples, 16));
#else
    const __m256i in = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                               _mm_loadu_si128((const __m128i*)(p + 8)), 1);
    const __m256i triples = _mm256_shuffle_epi8(in, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                                                     4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1));
    const __m256i byte = _mm256_set1_epi32(0xff);
    a = (Vec<T>)_mm256_cvtepi32_ps(_mm256_and_si256(triples, byte));
    b = (Vec<T>)_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(triples, 8), byte));
    c = (Vec<T>)_mm256_cvtepi32_ps(_mm256_srli_epi32(triples, 16));
#endif
    return;
  }
#endif
  constexpr int kCount = kLanes<T>;
  if constexpr (sizeof(E) == 1) {
    for (int i = 0; i < kCount; ++i) a[i] = p[3 * i], b[i] = p[3 * i + 1], c[i] = p[3 * i + 2];
  } else {
    const Vec<T> x = load(p), y = load(p + kCount), z = load(p + 2 * kCount);
    a = permute<T, LastOfTriples<kCount, 0>>(permute<T, FirstOfTriples<kCount, 0>>(x, y), z);
    b = permute<T, LastOfTriples<kCount, 1>>(permute<T, FirstOfTriples<kCount, 1>>(x, y), z);
    c = permute<T, LastOfTriples<kCount, 2>>(permute<T, FirstOfTriples<kCount, 2>>(x, y), z);
  }
}

// rows[i] lane j <-> rows[j] lane i, over a square of kLanes rows: as many perfect shuffles as a lane number has bits.
template <typename T>
FOURFOLD_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) interleave<T>(rows[i], rows[i + kHalf], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
