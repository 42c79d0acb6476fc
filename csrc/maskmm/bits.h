// Packed masks: what every op of the family checks of its bits, and of a weight that they belong to. For CPU and CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/checks.h"

namespace fourfold::maskmm {

using torch::stable::Tensor;

// Rows are padded to whole 64-bit words.
inline int64_t row_words(int64_t k) { return (k + 63) / 64; }
inline int64_t row_bytes(int64_t k) { return 8 * row_words(k); }

// A weight, or what has its shape, [N, ...] as N rows of K.
struct Rows {
  int64_t n = 0, k = 0;
  int64_t count() const { return n * k; }
};

inline Rows rows_of(const char* op, const char* name, const Tensor& x) {
  require(x.dim() >= 2, op, ": ", name, " must be [N, K], got ", shape_of(x));
  Rows rows{x.size(0), 1};
  for (int64_t d = 1; d < x.dim(); ++d) rows.k *= x.size(d);
  return rows;
}

// Bits of n rows of k, contiguous; for masks [T, ..] n is T * N.
inline void require_bits(const char* op, const char* name, const Tensor& bits, int64_t n, int64_t k) {
  require(bits.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < bits.dim(); ++d) rows *= bits.size(d);
  require(bits.dim() >= 2 && rows == n && bits.size(bits.dim() - 1) == row_bytes(k), op, ": ", name, " of ", n, " rows of ", k,
          " must have ", n, " rows of ", row_bytes(k), " bytes, got ", shape_of(bits));
  require(bits.is_contiguous(), op, ": ", name, " must be contiguous");
}

}  // namespace fourfold::maskmm
