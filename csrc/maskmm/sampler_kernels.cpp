// Random masks: Philox4x32-10 against sigmoid. Every operation here is rounded on its own (this file is compiled with
// -ffp-contract=off), in the order that reference/maskmm.py states, so that all devices and instruction sets agree to the bit.
#include <cstdint>

#include "common/simd.h"
#include "maskmm/kernels.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

constexpr int kL = kLanes<float>;
typedef VectorOf<float>::index Int;

// Words in 64-bit lanes, in their lower halves; what the upper ones hold does not matter, but that products come out whole.
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kCounters = kVectorBytes / 8;

FOURFOLD_INLINE Words multiply(Words x, uint32_t factor) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__x86_64__)
  return (Words)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// The keys of the ten rounds, each word in 64 bits.
struct RoundKeys {
  uint64_t first[10], second[10];

  explicit RoundKeys(uint64_t seed) {
    for (int round = 0; round < 10; ++round) {
      first[round] = static_cast<uint32_t>(static_cast<uint32_t>(seed) + round * 0x9E3779B9u);
      second[round] = static_cast<uint32_t>(static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u);
    }
  }
};

// The words of counters counter, counter + 1, …, in order: 4 * kCounters of them.
FOURFOLD_INLINE void philox(uint64_t counter, const RoundKeys& keys, uint32_t* words) {
  Words lane;
  for (int i = 0; i < kCounters; ++i) lane[i] = i;
  Words c0 = counter + lane, c1 = c0 >> 32, c2{}, c3{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words first = multiply(c0, 0xD2511F53), second = multiply(c2, 0xCD9E8D57);
    c0 = (second >> 32) ^ c1 ^ keys.first[round];
    c1 = second;
    c2 = (first >> 32) ^ c3 ^ keys.second[round];
    c3 = first;
  }
  Vec<double> low, high;
  interleave<double>((Vec<double>)((c0 & 0xffffffff) | c1 << 32), (Vec<double>)((c2 & 0xffffffff) | c3 << 32), low, high);
  store(reinterpret_cast<double*>(words), low);
  store(reinterpret_cast<double*>(words) + kCounters, high);
}

// As stated: every operation is rounded.
FOURFOLD_INLINE Vec<float> sigmoid(Vec<float> s) {
  const Vec<float> magnitude = (Vec<float>)((Bits32)s & 0x7fffffff);
  const Vec<float> a = magnitude < 87.0f ? magnitude : broadcast(87.0f);
  const Vec<float> n = (a * 1.44269502f + 12582912.0f) - 12582912.0f;
  const Vec<float> r = (n * 0.693359375f - a) + n * -2.12194440e-4f;
  Vec<float> e = broadcast(1.0f / 720);
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  e = (Vec<float>)((Int)e - (__builtin_convertvector(n, Int) << 23));
  return (s < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// Out of line where it is rare.
#if defined(__AVX512F__)
__attribute__((noinline))
#else
FOURFOLD_INLINE
#endif
uint32_t exactly_drawn(Vec<float> score, Bits32 word) {
  const Vec<float> p = sigmoid(score);
  // The 32 bits of p * 2^32 in halves, which signed conversions hold; every step is exact.
  const Vec<float> q = p * 65536.0f;
  const Int high = __builtin_convertvector(q, Int);
  const Int low = __builtin_convertvector((q - __builtin_convertvector(high, Vec<float>)) * 65536.0f, Int);
  const Bits32 limit = ((Bits32)high << 16) | (Bits32)low;
  return lane_bits<float>((word < limit) | (p >= 1.0f));
}

// Lanes where word < sigmoid(score) * 2^32.
FOURFOLD_INLINE uint32_t drawn(Vec<float> score, Bits32 word) {
#if defined(__AVX512F__)
  // A rough sigmoid, off by less than 1.1e-4 (4.2e-5 of the series for 2^f, 6.1e-5 of the reciprocal, and rounding), says as
  // much as the exact one about all words but those next to it.
  constexpr float kUnsure = 2.5e-4f * 4294967296.0f;
  const __m512 y = _mm512_mul_ps((__m512)score, _mm512_set1_ps(-1.44269504f)), n = _mm512_roundscale_ps(y, 0);
  const __m512 f = _mm512_sub_ps(y, n);
  __m512 e = _mm512_set1_ps(9.618129e-3f);
  constexpr float kOver[] = {5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (const float c : kOver) e = _mm512_fmadd_ps(e, f, _mm512_set1_ps(c));
  const __m512 p = _mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps(e, n), _mm512_set1_ps(1.0f)));
  const __m512 over = _mm512_fmsub_ps(p, _mm512_set1_ps(4294967296.0f), _mm512_cvtepu32_ps((__m512i)word));
  const __mmask16 sure = _mm512_cmp_ps_mask(_mm512_abs_ps(over), _mm512_set1_ps(kUnsure), _CMP_GT_OQ);
  if (__builtin_expect(sure == 0xffff, 1)) return _mm512_cmp_ps_mask(over, _mm512_setzero_ps(), _CMP_GT_OQ);
#endif
  return exactly_drawn(score, word);
}

// Scores as floats; float64 ones are rounded.
template <typename E>
FOURFOLD_INLINE Vec<float> load_scores(const E* p, int64_t count) {
  if constexpr (sizeof(E) == 8) {
    float rounded[kL] = {};
    for (int64_t i = 0; i < count && i < kL; ++i) rounded[i] = static_cast<float>(p[i]);
    return load(rounded);
  } else {
    return count >= kL ? load(p) : load_first(p, count);
  }
}

template <typename E>
bool bernoulli(const void* scores, uint64_t first, int64_t k, uint64_t seed, uint64_t offset, uint8_t* bits) {
  const E* from = static_cast<const E*>(scores);
  alignas(64) uint32_t words[64 + 4 * kL];
  const RoundKeys keys(seed);
  Int nan{};
  for (int64_t begin = 0; begin < k; begin += 64) {
    const int64_t count = k - begin < 64 ? k - begin : 64;
    const uint64_t index = first + static_cast<uint64_t>(begin);
    const int64_t skipped = static_cast<int64_t>(index % 4);  // words of the first counter that belong to earlier scores
    for (int64_t i = 0; i < skipped + count; i += 4 * kCounters) philox(offset + index / 4 + i / 4, keys, words + i);
    uint64_t word = 0;
    for (int64_t i = 0; i < count; i += kL) {
      const Vec<float> score = load_scores(from + begin + i, count - i);
      nan |= score != score;
      const Bits32 random = (Bits32)load(reinterpret_cast<const float*>(words) + skipped + i);
      word |= static_cast<uint64_t>(drawn(score, random)) << i;
    }
    if (count < 64) word &= (uint64_t{1} << count) - 1;
    for (int i = 0; i < 8; ++i) bits[begin / 8 + i] = static_cast<uint8_t>(word >> (8 * i));
  }
  return lane_bits<float>(nan) != 0;
}

}  // namespace

extern const sampling::Kernels sampling_kernels = {{bernoulli<Half>, bernoulli<BFloat16>, bernoulli<float>, bernoulli<double>}};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
