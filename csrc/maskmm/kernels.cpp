// Masks and masked weights: the arithmetic, a row at a time. Compiled once per instruction set; see kernels.h.
#include "maskmm/kernels.h"

#include <cstdint>

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using maskmm::Ranking;
using maskmm::Slope;

typedef uint64_t LooseWord64 __attribute__((aligned(1), may_alias));

FOURFOLD_INLINE uint64_t& word_at(uint8_t* bits, int64_t word) { return ((LooseWord64*)bits)[word]; }
FOURFOLD_INLINE uint64_t word_at(const uint8_t* bits, int64_t word) { return ((const LooseWord64*)bits)[word]; }

// ---- bits ----------------------------------------------------------------------------------------------------------------

void pack(const uint8_t* mask, uint8_t* bits, int64_t k) {
  int64_t begin = 0;
  for (; begin + 64 <= k; begin += 64) word_at(bits, begin / 64) = nonzero_bytes(mask + begin);
  if (begin == k) return;
  uint8_t rest[64] = {};
  for (int64_t i = begin; i < k; ++i) rest[i - begin] = mask[i];
  word_at(bits, begin / 64) = nonzero_bytes(rest);
}

void unpack(const uint8_t* bits, uint8_t* mask, int64_t k) {
  int64_t begin = 0;
  for (; begin + 64 <= k; begin += 64) spread_bits(word_at(bits, begin / 64), mask + begin);
  if (begin == k) return;
  uint8_t rest[64];
  spread_bits(word_at(bits, begin / 64), rest);
  for (int64_t i = begin; i < k; ++i) mask[i] = rest[i - begin];
}

int64_t count(const uint8_t* bits, int64_t k) {
  int64_t total = 0, word = 0;
  for (; 64 * word + 64 <= k; ++word) total += popcount(word_at(bits, word));
  if (k % 64) total += popcount(word_at(bits, word) & ((uint64_t{1} << (k % 64)) - 1));
  return total;
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

// whole(i) for every full vector of a row of k elements of T, part(i, n) for the n that are left over.
template <typename T, typename Whole, typename Part>
FOURFOLD_INLINE void for_vectors(int64_t k, const Whole& whole, const Part& part) {
  int64_t i = 0;
  for (; i + kLanes<T> <= k; i += kLanes<T>) whole(i);
  if (i < k) part(i, k - i);
}

// Writes words of bits, of_vector(i, n) giving those of n elements from i on, n of them there.
template <typename T, typename OfVector>
FOURFOLD_INLINE void write_bits(uint8_t* bits, int64_t k, const OfVector& of_vector) {
  constexpr int kL = kLanes<T>;
  int64_t begin = 0;
  for (; begin + 64 <= k; begin += 64) {
    uint64_t word = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 64; i += kL) word |= static_cast<uint64_t>(of_vector(begin + i, kL)) << i;
    word_at(bits, begin / 64) = word;
  }
  if (begin == k) return;
  uint64_t word = 0;
  for (int64_t i = begin; i < k; i += kL) {
    const int64_t n = k - i < kL ? k - i : kL;
    word |= static_cast<uint64_t>(of_vector(i, n)) << (i - begin);
  }
  word_at(bits, begin / 64) = word & ((uint64_t{1} << (k - begin)) - 1);
}

template <typename E>
FOURFOLD_INLINE Vec<Accumulate<E>> load_some(const E* p, int64_t n) {
  return n == kLanes<Accumulate<E>> ? load(p) : load_first(p, n);
}

// ---- effective weights ---------------------------------------------------------------------------------------------------

template <typename T>
FOURFOLD_INLINE Vec<T> effective(Vec<T> weight, const uint8_t* bits, const uint8_t* negative, Vec<T> factor, int64_t i) {
  Vec<T> x = weight * factor;
  if (negative != nullptr) x = lanes_of<T>(mask_bits(negative, i, kLanes<T>)) ? -x : x;
  return keep<T>(x, mask_bits(bits, i, kLanes<T>));
}

template <typename From, typename To>
void apply(const void* weight, const uint8_t* bits, const uint8_t* negative, double factor, void* out, int64_t k) {
  using T = Accumulate<From>;
  const From* from = static_cast<const From*>(weight);
  To* to = static_cast<To*>(out);
  const Vec<T> c = broadcast(static_cast<T>(factor));
  for_vectors<T>(
      k, [&](int64_t i) __attribute__((always_inline)) { store(to + i, effective<T>(load(from + i), bits, negative, c, i)); },
      [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(to + i, effective<T>(load_first(from + i, n), bits, negative, c, i), n);
      });
}

// ---- thresholds ----------------------------------------------------------------------------------------------------------

// In float64: a threshold need not be a number of the scores' type.
template <typename E, bool kBelow>
bool compare(const void* scores, double threshold, uint8_t* bits, int64_t k) {
  using T = Accumulate<E>;
  const E* from = static_cast<const E*>(scores);
  // The smallest T that is not below the threshold: scores of T reach the one where they reach the other.
  T limit = static_cast<T>(threshold);
  if (static_cast<double>(limit) < threshold)
    limit = sizeof(T) == 4 ? static_cast<T>(__builtin_nextafterf(static_cast<float>(limit), __builtin_inff())) : limit;
  const Vec<T> bound = broadcast(limit);
  typename VectorOf<T>::index nan{};
  write_bits<T>(bits, k, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Vec<T> s = load_some(from + i, n);
    nan |= s != s;
    return lane_bits<T>(kBelow ? s < bound : s >= bound);
  });
  return lane_bits<T>(nan) != 0;
}

// ---- the largest scores --------------------------------------------------------------------------------------------------

template <typename E>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <typename E>
using Key = typename KeyOf<E>::type;
template <typename E>
constexpr int kKeyBits = 8 * sizeof(Key<E>);

// Vectors of keys, as many as Vec<Accumulate<E>> has lanes.
template <typename E>
struct Keys {
  typedef Key<E> type __attribute__((vector_size(kVectorBytes)));
};

// In the order of the scores, or of their magnitudes, -0 beside +0.
template <typename E>
FOURFOLD_INLINE typename Keys<E>::type keys_of(Vec<Accumulate<E>> scores, bool abs) {
  using K = typename Keys<E>::type;
  constexpr Key<E> kTop = Key<E>{1} << (kKeyBits<E> - 1);
  const K raw = (K)(scores + Accumulate<E>{0});  // -0 + 0 is +0
  if (abs) return raw & ~kTop;
  const K negative = (K)((K)(raw & kTop) != 0);
  return raw ^ (negative | kTop);
}

template <typename E>
bool histogram(const void* scores, int64_t n, const Ranking& ranking, uint32_t* counts) {
  using T = Accumulate<E>;
  constexpr int kL = kLanes<T>;
  const E* from = static_cast<const E*>(scores);
  typename VectorOf<T>::index nan{};
  alignas(64) Key<E> digits[kL];
  const int above_shift = ranking.shift + ranking.bits;
  const Key<E> digit = (Key<E>{1} << ranking.bits) - 1;
  for (int64_t i = 0; i < n; i += kL) {
    const int64_t count = n - i < kL ? n - i : kL;
    const Vec<T> s = load_some(from + i, count);
    nan |= s != s;
    const typename Keys<E>::type keys = keys_of<E>(s, ranking.abs);
    uint32_t counted = static_cast<uint32_t>((uint64_t{1} << count) - 1);
    if (!ranking.highest) {
      counted &= lane_bits<T>((typename VectorOf<T>::index)((keys >> above_shift) == static_cast<Key<E>>(ranking.above)));
      if (counted == 0) continue;
    }
    store(reinterpret_cast<T*>(digits), (Vec<T>)((keys >> ranking.shift) & digit));
    if (counted == (1u << kL) - 1) {
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) ++counts[(l % maskmm::kTables << maskmm::kDigitBits) + digits[l]];
    } else {
      for (; counted; counted &= counted - 1) ++counts[digits[__builtin_ctz(counted)]];
    }
  }
  return lane_bits<T>(nan) != 0;
}

template <typename E>
int64_t count_equal(const void* scores, int64_t k, bool abs, uint64_t key) {
  using T = Accumulate<E>;
  const E* from = static_cast<const E*>(scores);
  int64_t total = 0;
  for (int64_t i = 0; i < k; i += kLanes<T>) {
    const int64_t n = k - i < kLanes<T> ? k - i : kLanes<T>;
    const auto equal = keys_of<E>(load_some(from + i, n), abs) == static_cast<Key<E>>(key);
    total += popcount(lane_bits<T>((typename VectorOf<T>::index)equal) & ((uint64_t{1} << n) - 1));
  }
  return total;
}

template <typename E>
void select(const void* scores, int64_t k, bool abs, uint64_t key, int64_t ties, uint8_t* bits) {
  using T = Accumulate<E>;
  const E* from = static_cast<const E*>(scores);
  const Key<E> limit = static_cast<Key<E>>(key);
  write_bits<T>(bits, k, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const typename Keys<E>::type keys = keys_of<E>(load_some(from + i, n), abs);
    uint32_t kept = lane_bits<T>((typename VectorOf<T>::index)(keys > limit));
    uint32_t equal = lane_bits<T>((typename VectorOf<T>::index)(keys == limit)) & static_cast<uint32_t>((uint64_t{1} << n) - 1);
    for (; equal && ties > 0; equal &= equal - 1, --ties) kept |= equal & -equal;
    return kept;
  });
}

// ---- gradients -----------------------------------------------------------------------------------------------------------

// e^-a for a >= 0, to about an ulp.
FOURFOLD_INLINE Vec<float> decay(Vec<float> a) {
  typedef VectorOf<float>::index Int;
  const Vec<float> x = a < 87.0f ? a : broadcast(87.0f);
  const Vec<float> n = (x * 1.44269502f + 12582912.0f) - 12582912.0f;
  const Vec<float> r = (n * 0.693359375f - x) + n * -2.12194440e-4f;
  constexpr float kOver[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec<float> e = broadcast(1.0f / 5040);
  for (const float c : kOver) e = e * r + c;
  return (Vec<float>)((Int)e - (__builtin_convertvector(n, Int) << 23));
}
FOURFOLD_INLINE Vec<double> decay(Vec<double> a) {
  typedef VectorOf<double>::index Int;
  const Vec<double> x = a < 708.0 ? a : broadcast(708.0);
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> r = (n * 0.693147180369123816490 - x) + n * 1.90821492927058770002e-10;
  constexpr double kOver[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                              1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  Vec<double> e = broadcast(1.0 / 6227020800);
  for (const double c : kOver) e = e * r + c;
  // The low bits of `shifted` are n.
  return (Vec<double>)((Int)e - ((Int)shifted << 52));
}

template <typename T>
FOURFOLD_INLINE Vec<T> slope_of(Vec<T> s, Slope slope) {
  if (slope == maskmm::kOne) return broadcast(T{1});
  if (slope == maskmm::kSign)
    return s > T{0} ? broadcast(T{1}) : (s < T{0} ? broadcast(T{-1}) : s);  // 0 and NaN are themselves
  const Vec<T> e = decay(s < T{0} ? -s : s);
  const Vec<T> result = e / ((T{1} + e) * (T{1} + e));
  return s == s ? result : s;
}

template <typename T>
FOURFOLD_INLINE T over_lanes(Vec<T> x) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += x[l];
  return total;
}

template <typename T>
T score_gradients(const T* grad, const T* weight, const T* scores, const uint8_t* bits, Slope slope, T factor, T* out,
                  int64_t k) {
  Vec<T> total{};
  for_vectors<T>(
      k,
      [&](int64_t i) __attribute__((always_inline)) {
        const Vec<T> product = load(grad + i) * load(weight + i);
        total += keep<T>(product, mask_bits(bits, i, kLanes<T>));
        store(out + i, product * (slope_of<T>(load(scores + i), slope) * factor));
      },
      [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vec<T> product = load_first(grad + i, n) * load_first(weight + i, n);
        total += keep<T>(product, mask_bits(bits, i, kLanes<T>));
        store_first(out + i, product * (slope_of<T>(load_first(scores + i, n), slope) * factor), n);
      });
  return over_lanes<T>(total);
}

template <typename T>
void add_slope(const T* scores, Slope slope, T number, T* out, int64_t k) {
  for_vectors<T>(
      k,
      [&](int64_t i)
          __attribute__((always_inline)) { store(out + i, load(out + i) + slope_of<T>(load(scores + i), slope) * number); },
      [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(out + i, n) + slope_of<T>(load_first(scores + i, n), slope) * number, n);
      });
}

// ---- conversion ----------------------------------------------------------------------------------------------------------

template <typename E>
void widen_row(const void* in, Accumulate<E>* out, int64_t k) {
  using T = Accumulate<E>;
  const E* from = static_cast<const E*>(in);
  for_vectors<T>(
      k, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(from + i)); },
      [&](int64_t i, int64_t n) __attribute__((always_inline)) { store_first(out + i, load_first(from + i, n), n); });
}

template <typename E>
void narrow_row(const Accumulate<E>* in, void* out, int64_t k) {
  using T = Accumulate<E>;
  E* to = static_cast<E*>(out);
  for_vectors<T>(
      k, [&](int64_t i) __attribute__((always_inline)) { store(to + i, load(in + i)); },
      [&](int64_t i, int64_t n) __attribute__((always_inline)) { store_first(to + i, load_first(in + i, n), n); });
}

}  // namespace

#define FOURFOLD_EACH(f) {f<Half>, f<BFloat16>, f<float>, f<double>}

extern const maskmm::Kernels maskmm_kernels = {
    pack,
    unpack,
    count,
    {{apply<Half, Half>, apply<Half, BFloat16>, apply<Half, float>, nullptr},
     {apply<BFloat16, Half>, apply<BFloat16, BFloat16>, apply<BFloat16, float>, nullptr},
     {apply<float, Half>, apply<float, BFloat16>, apply<float, float>, nullptr},
     {nullptr, nullptr, nullptr, apply<double, double>}},
    {compare<Half, false>, compare<BFloat16, false>, compare<float, false>, compare<double, false>},
    {compare<Half, true>, compare<BFloat16, true>, compare<float, true>, compare<double, true>},
    FOURFOLD_EACH(histogram),
    FOURFOLD_EACH(count_equal),
    FOURFOLD_EACH(select),
    {score_gradients<float>, add_slope<float>},
    {score_gradients<double>, add_slope<double>},
    {widen_row<Half>, widen_row<BFloat16>},
    {narrow_row<Half>, narrow_row<BFloat16>},
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
