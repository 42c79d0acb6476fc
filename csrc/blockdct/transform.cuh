// The orthonormal DCT-II of N values in the registers of one thread.
#pragma once

#include "common/cuda.cuh"

namespace fourfold::blockdct {

constexpr double kPi = 3.14159265358979323846;

__host__ __device__ constexpr double cosine_series(double x) {  // |x| <= pi / 2, to the last bit or two
  double term = 1, sum = 0;
  for (int n = 0; n < 26; n += 2) {
    sum += term;
    term *= -x * x / ((n + 1) * (n + 2));
  }
  return sum;
}

__host__ __device__ constexpr double cosine(int k, int quarter) {  // of k / quarter right angles, k >= 0
  k %= 4 * quarter;
  if (k > 2 * quarter) k = 4 * quarter - k;
  return k > quarter ? -cosine_series((2 * quarter - k) * kPi / (2 * quarter)) : cosine_series(k * kPi / (2 * quarter));
}

__host__ __device__ constexpr double square_root(double x) {
  double root = 1;
  for (int i = 0; i < 30; ++i) root = (root + x / root) / 2;
  return root;
}

// Odd frequencies 2k + 1 of a DCT of n values whose mirror images have been subtracted, scaled for a full length of N.
template <int n, int N>
struct OddBasis {
  double of[n / 2][n / 2] = {};
  __host__ __device__ constexpr OddBasis() {
    for (int k = 0; k < n / 2; ++k)
      for (int i = 0; i < n / 2; ++i) of[k][i] = cosine((2 * k + 1) * (2 * i + 1), n) * square_root(2.0 / N);
  }
};

// Orthonormal DCT-II in place. A mirrored half-length transform gives the even frequencies, a product the odd ones.
template <int N, int n = N, typename C>
__device__ __forceinline__ void dct(C (&x)[n]) {
  if constexpr (n == 1) {
    constexpr double dc = square_root(1.0 / N);
    x[0] *= static_cast<C>(dc);
  } else {
    constexpr OddBasis<n, N> basis;
    C sum[n / 2], difference[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      sum[i] = x[i] + x[n - 1 - i];
      difference[i] = x[i] - x[n - 1 - i];
    }
    dct<N>(sum);
#pragma unroll
    for (int k = 0; k < n / 2; ++k) {
      C odd = 0;
#pragma unroll
      for (int i = 0; i < n / 2; ++i) odd += difference[i] * static_cast<C>(basis.of[k][i]);
      x[2 * k] = sum[k];
      x[2 * k + 1] = odd;
    }
  }
}

// Its inverse, which is its transpose.
template <int N, int n = N, typename C>
__device__ __forceinline__ void idct(C (&x)[n]) {
  if constexpr (n == 1) {
    dct<N>(x);
  } else {
    constexpr OddBasis<n, N> basis;
    C even[n / 2], odd[n / 2] = {};
#pragma unroll
    for (int k = 0; k < n / 2; ++k) {
      even[k] = x[2 * k];
#pragma unroll
      for (int i = 0; i < n / 2; ++i) odd[i] += x[2 * k + 1] * static_cast<C>(basis.of[k][i]);
    }
    idct<N>(even);
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      x[i] = even[i] + odd[i];
      x[n - 1 - i] = even[i] - odd[i];
    }
  }
}

// Moves everything from `count` on into the last value before it.
template <int N, typename C>
__device__ __forceinline__ void fold(C (&x)[N], int count) {
  C tail = 0;
#pragma unroll
  for (int k = N - 1; k >= 0; --k) {
    tail += x[k];
    x[k] = k == count - 1 ? tail : x[k];
  }
}

}  // namespace fourfold::blockdct
