// CoordConv kernels, compiled once per ISA tier: short loops over contiguous memory. Which memory is cpu.cpp's business.
#include "coordconv/kernels.h"

#include "common/simd.h"

namespace fourfold {
namespace FOURFOLD_ISA {
namespace {

using coordconv::Activation;

// Calls whole(i) for every full vector of n elements, then rest(i, count) for what is left.
template <typename T, typename Whole, typename Rest>
FOURFOLD_INLINE void for_vectors(int64_t n, Whole whole, Rest rest) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) whole(i);
  if (i < n) rest(i, n - i);
}

// ---- activations ---------------------------------------------------------------------------------------------------------

// Adding and taking away this leaves a float rounded to an integer, which then stands in the low bits.
constexpr float kRounder = 0x1.8p23f;

// 2^n for integers -150 <= n <= 130 as two factors, since the ends lie outside what one float holds.
FOURFOLD_INLINE Vec<float> times_power_of_two(Vec<float> x, VectorOf<float>::index n) {
  const VectorOf<float>::index half = n >> 1;
  return x * (Vec<float>)((half + 127) << 23) * (Vec<float>)((n - half + 127) << 23);
}

// e^x to about 2 units in the last place; overflow gives infinity, NaN stays.
FOURFOLD_INLINE Vec<float> exponential(Vec<float> x) {
  x = x > 89.0f ? broadcast(89.0f) : x;
  x = x < -104.0f ? broadcast(-104.0f) : x;
  const Vec<float> shifted = x * 0x1.715476p0f + kRounder;  // 1 / ln 2
  const Vec<float> n = shifted - kRounder;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
  // Minimax polynomial of e^r on [-ln 2 / 2, ln 2 / 2], relative error 1.9e-9.
  Vec<float> p = broadcast(0.0013836842f);
  p = p * r + 0.008374816f;
  p = p * r + 0.041668225f;
  p = p * r + 0.1666642f;
  p = p * r + 0.4999999f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return times_power_of_two(p, (VectorOf<float>::index)shifted - (VectorOf<float>::index)broadcast(kRounder));
}

// The complementary error function with a small relative error on both sides: e^(-x^2) t q(t) for x > 0, t = 1 / (1 + x / 2).
FOURFOLD_INLINE Vec<float> complementary_error(Vec<float> x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + 0.5f * magnitude);
  // Minimax polynomial of erfc(x) e^(x^2) / t, relative error 4.3e-8.
  Vec<float> q = broadcast(-0.059124596f);
  q = q * t + 0.284847f;
  q = q * t + -0.4877645f;
  q = q * t + 0.27871478f;
  q = q * t + -0.027073052f;
  q = q * t + 0.20287675f;
  q = q * t + 0.24305561f;
  q = q * t + 0.28238195f;
  q = q * t + 0.28208604f;
  const Vec<float> right = exponential(-magnitude * magnitude) * t * q;
  return x < 0.0f ? 2.0f - right : right;
}

FOURFOLD_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

FOURFOLD_INLINE Vec<double> complementary_error(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erfc(x[i]);
  return x;
}

template <Activation A, typename T>
FOURFOLD_INLINE Vec<T> activate(Vec<T> x, T) {
  if constexpr (A == coordconv::kRelu) return positive_part<T>(x);
  if constexpr (A == coordconv::kSilu) return x / (T{1} + exponential(-x));
  if constexpr (A == coordconv::kGelu) return x * T{0.5} * complementary_error(x * T{-0.70710678118654752440});
  return x;
}

// x as the element type holds it.
template <typename E>
FOURFOLD_INLINE Vec<Accumulate<E>> rounded(Vec<Accumulate<E>> x) {
  if constexpr (sizeof(E) == 2) {
    return widen(narrow(x, E{}), E{});
  } else {
    return x;
  }
}

// y + map activated, at elements i and on; the map is along[i] + across.
template <typename E, Activation A>
struct Added {
  using T = Accumulate<E>;
  E* y;
  const T* along;
  E* activated;

  // relu and rounding give the same in either order.
  static constexpr bool kRoundFirst = A == coordconv::kSilu || A == coordconv::kGelu;

  FOURFOLD_INLINE static Vec<T> result(Vec<T> x) { return activate<A>(kRoundFirst ? rounded<E>(x) : x, T{}); }

  template <int kCount>
  FOURFOLD_INLINE void whole(int64_t i, const Vec<T> (&across)[kCount]) const {
    Vec<T> x[kCount];
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      const int64_t at = i + v * kLanes<T>;
      x[v] = load(y + at) + (load(along + at) + across[v]);
    }
    if (activated != nullptr) store_all(y + i, x);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) x[v] = result(x[v]);
    store_all((activated == nullptr ? y : activated) + i, x);
  }

  FOURFOLD_INLINE void rest(int64_t i, int64_t count, Vec<T> across) const {
    const Vec<T> x = load_first(y + i, count) + (load_first(along + i, count) + across);
    if (activated != nullptr) store_first(y + i, x, count);
    store_first((activated == nullptr ? y : activated) + i, result(x), count);
  }

  // Elements [0, end); across repeats every kPeriod vectors.
  template <int kPeriod>
  FOURFOLD_INLINE void repeat(const T* across, int64_t end) const {
    Vec<T> kept[kPeriod];
    for (int v = 0; v < kPeriod; ++v) kept[v] = load(across + v * kLanes<T>);
    int64_t i = 0;
    for (; i + kPeriod * kLanes<T> <= end; i += kPeriod * kLanes<T>) whole(i, kept);
    finish(i, end, kept);
  }

  // What is left of less than a period.
  template <int kPeriod>
  FOURFOLD_INLINE void finish(int64_t i, int64_t end, const Vec<T> (&across)[kPeriod]) const {
    for (int v = 0; i < end; ++v, i += kLanes<T>) {
      const Vec<T> one[1] = {across[v]};
      i + kLanes<T> <= end ? whole(i, one) : rest(i, end - i, across[v]);
    }
  }
};

// Vectors that are treated at a time, and that a repeated row may fill to stay in registers.
constexpr int kGroup = 4;

template <typename E, Activation A>
void add_map(void* y_memory, const void* along_memory, const void* across_memory, void* activated_memory, int64_t rows,
             int64_t width) {
  using T = Accumulate<E>;
  constexpr int64_t kMost = kGroup * kLanes<T>;
  const Added<E, A> added{static_cast<E*>(y_memory), static_cast<const T*>(along_memory), static_cast<E*>(activated_memory)};
  const T* across = static_cast<const T*>(across_memory);
  if (across == nullptr) {
    const T zeros[kMost] = {};
    return added.template repeat<kGroup>(zeros, rows * width);
  }
  // Short rows side by side until they fill four vectors, or three; not worth it for a few.
  if (rows * width >= 2 * kMost && (kMost % width == 0 || (kMost - kLanes<T>) % width == 0)) {
    T pattern[kMost];
    for (int64_t i = 0; i + width <= kMost; i += width) {
      for (int64_t j = 0; j < width; ++j) pattern[i + j] = across[j];
    }
    return kMost % width == 0 ? added.template repeat<kGroup>(pattern, rows * width)
                              : added.template repeat<kGroup - 1>(pattern, rows * width);
  }
  for (int64_t start = 0; start < rows * width; start += width) {
    int64_t i = 0;
    for (; i + kMost <= width; i += kMost) {
      Vec<T> part[kGroup];
      for (int v = 0; v < kGroup; ++v) part[v] = load(across + i + v * kLanes<T>);
      added.whole(start + i, part);
    }
    for (; i < width; i += kLanes<T>) {
      const int64_t count = width - i;
      const Vec<T> part[1] = {count < kLanes<T> ? load_first(across + i, count) : load(across + i)};
      count < kLanes<T> ? added.rest(start + i, count, part[0]) : added.whole(start + i, part);
    }
  }
}

// ---- gradients -----------------------------------------------------------------------------------------------------------

// kCount samples at a time: total is loaded and stored once for all of them, and memory is walked in as many places.
template <int kCount, bool kRelu, typename E>
FOURFOLD_INLINE void add_some_grads(const E* grad, const E* relu_output, E* kept, Accumulate<E>* total, int64_t n,
                                    int64_t step) {
  using T = Accumulate<E>;
  for_vectors<T>(
      n,
      [&](int64_t i) __attribute__((always_inline)) {
        Vec<T> sum = load(total + i);
#pragma GCC unroll 4
        for (int64_t at = i; at < i + kCount * step; at += step) {
          Vec<T> g = load(grad + at);
          if constexpr (kRelu) {
            g = load(relu_output + at) <= T{0} ? Vec<T>{} : g;
            store(kept + at, g);
          }
          sum += g;
        }
        store(total + i, sum);
      },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec<T> sum = load_first(total + i, count);
        for (int64_t at = i; at < i + kCount * step; at += step) {
          Vec<T> g = load_first(grad + at, count);
          if constexpr (kRelu) {
            g = load_first(relu_output + at, count) <= T{0} ? Vec<T>{} : g;
            store_first(kept + at, g, count);
          }
          sum += g;
        }
        store_first(total + i, sum, count);
      });
}

template <int kCount, bool kRelu, typename E>
FOURFOLD_INLINE void add_all_grads(const E* grad, const E* relu_output, E* kept, Accumulate<E>* total, int64_t n,
                                   int64_t samples, int64_t step) {
  const auto beside = [&](auto* p, int64_t sample) { return kRelu ? p + sample * step : p; };
  int64_t s = 0;
  for (; s + kCount <= samples; s += kCount) {
    add_some_grads<kCount, kRelu>(grad + s * step, beside(relu_output, s), beside(kept, s), total, n, step);
  }
  for (; s < samples; ++s) add_some_grads<1, kRelu>(grad + s * step, beside(relu_output, s), beside(kept, s), total, n, step);
}

template <typename E>
void add_grads(const void* grad_memory, const void* relu_memory, void* kept_memory, void* total_memory, int64_t n,
               int64_t samples, int64_t step) {
  const E* grad = static_cast<const E*>(grad_memory);
  const E* relu_output = static_cast<const E*>(relu_memory);
  E* kept = static_cast<E*>(kept_memory);
  auto* total = static_cast<Accumulate<E>*>(total_memory);
  if (relu_output == nullptr) {
    add_all_grads<4, false>(grad, relu_output, kept, total, n, samples, step);
  } else {
    add_all_grads<2, true>(grad, relu_output, kept, total, n, samples, step);
  }
}

// ---- pieces --------------------------------------------------------------------------------------------------------------

template <typename T>
void add(T* out, const T* in, int64_t n) {
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(out + i) + load(in + i)); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store_first(out + i, load_first(out + i, count) + load_first(in + i, count), count);
      });
}

template <typename T>
void add_multiple(T* out, const T* in, T factor, int64_t n) {
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(out + i) + load(in + i) * factor); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        store_first(out + i, load_first(out + i, count) + load_first(in + i, count) * factor, count);
      });
}

template <typename T>
void add_number(T* out, const T* in, T number, int64_t n) {
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { store(out + i, load(in + i) + number); },
      [&](int64_t i, int64_t count)
          __attribute__((always_inline)) { store_first(out + i, load_first(in + i, count) + number, count); });
}

template <typename T>
FOURFOLD_INLINE T over_lanes(Vec<T> x) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

template <typename T>
T sum(const T* in, int64_t n) {
  Vec<T> total{};
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { total += load(in + i); },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) { total += load_first(in + i, count); });
  return over_lanes<T>(total);
}

template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  Vec<T> total{};
  for_vectors<T>(
      n, [&](int64_t i) __attribute__((always_inline)) { total += load(a + i) * load(b + i); },
      [&](int64_t i, int64_t count)
          __attribute__((always_inline)) { total += load_first(a + i, count) * load_first(b + i, count); });
  return over_lanes<T>(total);
}

template <typename T>
void add_rows(T* out, int64_t out_step, const T* in, int64_t in_step, int64_t rows, int64_t width) {
  if (out_step == width && in_step == width) return add(out, in, rows * width);
  for (int64_t r = 0; r < rows; ++r) add(out + r * out_step, in + r * in_step, width);
}

template <typename T>
void sum_rows(T* out, const T* in, int64_t in_step, int64_t rows, int64_t width) {
  for_vectors<T>(
      width,
      [&](int64_t i) __attribute__((always_inline)) {
        Vec<T> total = load(out + i);
        for (int64_t r = 0; r < rows; ++r) total += load(in + r * in_step + i);
        store(out + i, total);
      },
      [&](int64_t i, int64_t count) __attribute__((always_inline)) {
        Vec<T> total = load_first(out + i, count);
        for (int64_t r = 0; r < rows; ++r) total += load_first(in + r * in_step + i, count);
        store_first(out + i, total, count);
      });
}

}  // namespace

#define FOURFOLD_ACTIVATIONS(E) \
  {add_map<E, coordconv::kNone>, add_map<E, coordconv::kRelu>, add_map<E, coordconv::kSilu>, add_map<E, coordconv::kGelu>}
#define FOURFOLD_PIECES(T) {add<T>, add_multiple<T>, add_number<T>, sum<T>, dot<T>, add_rows<T>, sum_rows<T>}

extern const coordconv::Kernels coordconv_kernels = {
    {FOURFOLD_ACTIVATIONS(Half), FOURFOLD_ACTIVATIONS(BFloat16), FOURFOLD_ACTIVATIONS(float), FOURFOLD_ACTIVATIONS(double)},
    {add_grads<Half>, add_grads<BFloat16>, add_grads<float>, add_grads<double>},
    FOURFOLD_PIECES(float),
    FOURFOLD_PIECES(double),
};

}  // namespace FOURFOLD_ISA
}  // namespace fourfold
