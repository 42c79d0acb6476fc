// Bits and sparse weights on CUDA: the largest scores, values from and to their places, and products with sparse weights. What
// is tiles and epilogues is in triton_kernels/maskmm.py. Sums are made in one order, whatever the device: no float is added
// atomically. Nothing here waits for the device, so nnz is what the caller says; kernels stay inside their buffers where it is
// wrong.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <vector>

#include "common/aten.h"
#include "common/cuda.cuh"
#include "maskmm/bits.h"
#include "maskmm/scan.cuh"
#include "maskmm/topk.cuh"

namespace fourfold::maskmm {
namespace {

using Optional = std::optional<Tensor>;

// ---- values and their places ---------------------------------------------------------------------------------------------

constexpr uint32_t kWarps = kThreads / kWarp;
constexpr int64_t kWordsPerWarp = 8;

// visit(set, e, row, column) for both halves of the words of this warp: e is where the value of a set bit lies, lanes are
// neighbouring columns.
template <typename Visit>
__device__ __forceinline__ void for_places(const uint64_t* words, const int64_t* starts, int64_t width, int64_t count,
                                           const Visit& visit) {
  const int64_t first = (blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp) * kWordsPerWarp;
  Place place(first, width);
  for (int64_t at = first; at < min(first + kWordsPerWarp, count); ++at, place.next(width)) {
    const uint64_t word = words[at];
    const int64_t start = starts[at];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t bit = half * kWarp + lane_of_thread();
      const int64_t e = start + __popcll(word & ((uint64_t{1} << bit) - 1));
      visit((word >> bit & 1) != 0, e, place.row, place.w * 64 + bit);
    }
  }
}

// Values that no bit stands for, should nnz be too large, become zero.
template <typename V>
__device__ __forceinline__ void clear_rest(V* values, int64_t from, int64_t nnz) {
  const int64_t step = int64_t{kThreads} * gridDim.x;
  for (int64_t e = from + blockIdx.x * int64_t{kThreads} + threadIdx.x; e < nnz; e += step) values[e] = V{};
}

template <typename V>
__global__ void __launch_bounds__(kThreads) gather_kernel(const V* weight, const uint64_t* words, const int64_t* starts,
                                                          int64_t width, int64_t k, int64_t count, int64_t nnz, V* values) {
  for_places(words, starts, width, count, [&](bool set, int64_t e, int64_t row, int64_t column) {
    if (set && column < k && e < nnz) values[e] = weight[row * k + column];
  });
  clear_rest(values, starts[count], nnz);
}

template <typename V>
__global__ void __launch_bounds__(kThreads) scatter_kernel(const V* values, const uint64_t* words, const int64_t* starts,
                                                           int64_t width, int64_t k, int64_t count, int64_t nnz, V* weight) {
  for_places(words, starts, width, count, [&](bool set, int64_t e, int64_t row, int64_t column) {
    if (column < k) weight[row * k + column] = set && e < nnz ? values[e] : V{};
  });
}

__global__ void __launch_bounds__(kThreads)
    columns_kernel(const uint64_t* words, const int64_t* starts, int64_t width, int64_t count, int64_t nnz, uint16_t* columns) {
  for_places(words, starts, width, count, [&](bool set, int64_t e, int64_t, int64_t column) {
    if (set && e < nnz) columns[e] = static_cast<uint16_t>(column);
  });
  clear_rest(columns, starts[count], nnz);
}

uint32_t blocks_of_places(int64_t words) { return std::max(1u, blocks_for(words, kWarps * kWordsPerWarp)); }

const int64_t* starts_data(const Tensor& starts) { return static_cast<const int64_t*>(starts.const_data_ptr()); }

// run(type) for the unsigned integer that has an element's size.
template <typename Run>
void by_size(const Tensor& x, const Run& run) {
  if (x.element_size() == 2) return run(uint16_t{});
  if (x.element_size() == 4) return run(uint32_t{});
  run(uint64_t{});
}

// ---- products with a sparse weight ---------------------------------------------------------------------------------------

// Rows of x that one reading of the weight serves, and up to how many rows that beats making the weight dense.
constexpr int64_t kBatch = 8, kSkinny = 64;
constexpr uint32_t kRowThreads = 128, kRowWarps = kRowThreads / kWarp;

struct Weight {
  const uint64_t* words;
  const uint16_t* columns;  // or null: from the bits
  const int64_t* starts;
  int64_t pieces, width, n, k, nnz;

  __device__ __forceinline__ int64_t start(int64_t row) const {
    const int64_t at = starts[row * pieces];
    return at < 0 ? 0 : min(at, nnz);
  }
  // A word of a row, without bits beyond K.
  __device__ __forceinline__ uint64_t word(int64_t row, int64_t w) const {
    const uint64_t bits = words[row * width + w];
    const int64_t inside = k - w * 64;
    return inside >= 64 ? bits : bits & ((uint64_t{1} << inside) - 1);
  }
};

// One row n and kRows rows of x: acc[m] = this thread's part of <x[m], row n>.
template <int kRows, typename T, typename C>
__device__ __forceinline__ void add_value(C (&acc)[kRows], const T* x, int64_t rows, int64_t k, int64_t column, C value) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    if (kRows == 1 || m < rows) acc[m] += value * static_cast<C>(x[m * k + column]);
  }
}

// From the bits: a warp takes a quarter of the row, its lanes bits l and l + 32 of each word, so that it reads neighbouring
// columns of x and values that lie together.
template <int kRows, typename T, typename C>
__device__ __forceinline__ void add_bitmap(C (&acc)[kRows], const T* x, int64_t rows, const T* values, const Weight& weight,
                                           int64_t n) {
  const uint32_t lane = lane_of_thread(), warp = threadIdx.x / kWarp;
  const int64_t share = (weight.width + kRowWarps - 1) / kRowWarps;
  const int64_t begin = min(warp * share, weight.width), end = min(begin + share, weight.width);
  int32_t before = 0;
  for (int64_t w = lane; w < begin; w += kWarp) before += __popcll(weight.word(n, w));
  int64_t at = weight.start(n) + warp_sum(before);
  for (int64_t first = begin; first < end; first += kWarp) {
    const uint64_t mine = first + lane < end ? weight.word(n, first + lane) : 0;
    const int count = static_cast<int>(min(end - first, int64_t{kWarp}));
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const uint64_t word = __shfl_sync(kAllLanes, mine, i);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t bit = half * kWarp + lane;
        const int64_t e = at + __popcll(word & ((uint64_t{1} << bit) - 1));
        if ((word >> bit & 1) != 0 && e < weight.nnz) {
          add_value(acc, x, rows, weight.k, (first + i) * 64 + bit, static_cast<C>(values[e]));
        }
      }
      at += __popcll(word);
    }
  }
}

template <int kRows, typename T, typename C>
__device__ __forceinline__ void add_columns(C (&acc)[kRows], const T* x, int64_t rows, const T* values, const Weight& weight,
                                            int64_t n) {
  const int64_t end = weight.start(n + 1);
  for (int64_t e = weight.start(n) + threadIdx.x; e < end; e += kRowThreads) {
    const int64_t column = weight.columns[e];
    if (column < weight.k) add_value(acc, x, rows, weight.k, column, static_cast<C>(values[e]));
  }
}

// A block: one row of the weight, and kRows rows of x.
template <typename T, int kRows, bool kBits>
__global__ void __launch_bounds__(kRowThreads)
    sparse_linear_kernel(const T* x, int64_t batch, const T* values, const Weight weight, const T* bias, T* y) {
  using C = typename Compute<T>::type;
  __shared__ C parts[kRowWarps][kRows];
  // Neighbouring blocks read neighbouring rows of the weight, and the same rows of x.
  const int64_t chunk = blockIdx.x / weight.n, n = blockIdx.x - chunk * weight.n, first = chunk * kRows;
  const int64_t rows = min(batch - first, int64_t{kRows});
  C acc[kRows] = {};
  if (kBits) {
    add_bitmap(acc, x + first * weight.k, rows, values, weight, n);
  } else {
    add_columns(acc, x + first * weight.k, rows, values, weight, n);
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    acc[m] = warp_sum(acc[m]);
    if (lane_of_thread() == 0) parts[threadIdx.x / kWarp][m] = acc[m];
  }
  __syncthreads();
  if (threadIdx.x >= rows) return;
  C total = bias == nullptr ? C(0) : static_cast<C>(bias[n]);
  for (uint32_t w = 0; w < kRowWarps; ++w) total += parts[w][threadIdx.x];
  y[(first + threadIdx.x) * weight.n + n] = static_cast<T>(total);
}

// A warp: one word's 64 columns, a share of the rows of the weight, kRows rows of grad.
template <typename T, int kRows>
__global__ void __launch_bounds__(kRowThreads)
    sparse_transposed_kernel(const T* grad, int64_t batch, const T* values, const Weight weight, int64_t groups, int64_t chunks,
                             int64_t share, typename Compute<T>::type* parts) {
  using C = typename Compute<T>::type;
  const int64_t w = blockIdx.x % groups * kRowWarps + threadIdx.x / kWarp, rest = blockIdx.x / groups;
  const int64_t first = rest % chunks * kRows, split = rest / chunks;
  if (w >= weight.width) return;
  const int64_t rows = min(batch - first, int64_t{kRows});
  C acc[kRows][2] = {};
  const int64_t end = min((split + 1) * share, weight.n);
#pragma unroll 4
  for (int64_t n = split * share; n < end; ++n) {
    const uint64_t word = weight.word(n, w);
    const int64_t at = weight.starts[n * weight.width + w];
    C factor[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m)
      factor[m] = kRows == 1 || m < rows ? static_cast<C>(grad[(first + m) * weight.n + n]) : C(0);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t bit = half * kWarp + lane_of_thread();
      const int64_t e = at + __popcll(word & ((uint64_t{1} << bit) - 1));
      if ((word >> bit & 1) == 0 || e >= weight.nnz) continue;
      const C value = static_cast<C>(values[e]);
#pragma unroll
      for (int m = 0; m < kRows; ++m) acc[m][half] += factor[m] * value;
    }
  }
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    const int64_t column = w * 64 + half * kWarp + lane_of_thread();
    if (column >= weight.k) continue;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m < rows) parts[(split * batch + first + m) * weight.k + column] = acc[m][half];
    }
  }
}

// out [size] = the sum of parts [splits, size] in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const typename Compute<T>::type* parts, int64_t splits, int64_t size, T* out) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= size) return;
  typename Compute<T>::type total = 0;
  for (int64_t s = 0; s < splits; ++s) total += parts[s * size + i];
  out[i] = static_cast<T>(total);
}

// ---- from tensors to launches --------------------------------------------------------------------------------------------

// run(type) for the type of x's elements.
template <typename Run>
void by_type(const Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return run(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return run(torch::headeronly::BFloat16{});
    case ScalarType::Double:
      return run(double{});
    default:
      return run(float{});
  }
}

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

int64_t rows_before_last(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

Tensor topk_mask(const Tensor& scores_, double density, bool abs) {
  const char* op = "topk_mask";
  require_floating(op, "scores", scores_);
  require(density > 0 && density <= 1, op, ": density must lie in (0, 1], got ", density);
  const Rows rows = rows_of(op, "scores", scores_);
  const int64_t n = rows.count(), keep = n - static_cast<int64_t>((1 - density) * static_cast<double>(n));
  const std::vector<int64_t> sizes{rows.n, row_bytes(rows.k)};
  if (keep == 0) return torch::stable::new_zeros(scores_, sizes, ScalarType::Byte);
  const Tensor bits = torch::stable::new_empty(scores_, sizes, ScalarType::Byte);
  const Tensor scores = torch::stable::contiguous(scores_);
  by_size(scores, [&](auto key) { select_largest<decltype(key)>(scores, rows, keep, abs, bits); });
  return bits;
}

// bits of any rows of whole words, for ops that don't know k.
Tensor rows_of_words(const char* op, const Tensor& bits) {
  require(bits.scalar_type() == ScalarType::Byte, op, ": bits must be uint8");
  require(bits.dim() == 2 && bits.size(1) % 8 == 0, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  return torch::stable::contiguous(bits);
}

Tensor mask_starts(const Tensor& bits_, int64_t k, int64_t slab) {
  const char* op = "_mask_starts";
  require(k >= 0, op, ": k must be at least 0, got ", k);
  require(slab >= std::max<int64_t>(k, 1) || (slab >= 64 && (slab & (slab - 1)) == 0), op,
          ": slab must be a power of two from 64 on, or at least k, got ", slab, " for k ", k);
  const Tensor bits = rows_of_words(op, bits_);
  require_bits(op, "bits", bits, bits.size(0), k);
  const int64_t pieces = k == 0 ? 0 : (k - 1) / slab + 1;
  const Words words(bits);
  return starts_of(words, pieces <= 1 ? words.width : slab / 64, pieces);
}

Tensor mask_columns(const Tensor& bits, int64_t nnz) {
  const char* op = "_mask_columns";
  const Words words(rows_of_words(op, bits));
  require(0 <= nnz && nnz <= 64 * words.count(), op, ": nnz must lie in 0..", 64 * words.count(), ", got ", nnz);
  const Tensor columns = torch::stable::new_empty(bits, {nnz}, ScalarType::Short);
  if (nnz == 0) return columns;
  const Tensor starts = word_starts(words);
  launch(columns_kernel, blocks_of_places(words.count()), kThreads, bits, words.data, starts_data(starts), words.width,
         words.count(), nnz, static_cast<uint16_t*>(columns.mutable_data_ptr()));
  return columns;
}

Tensor gather_mask(const Tensor& weight_, const Tensor& bits, int64_t nnz) {
  const char* op = "_gather_mask";
  require_floating(op, "weight", weight_);
  const Rows rows = rows_of(op, "weight", weight_);
  require_same_device(op, "bits", bits, weight_);
  require_bits(op, "bits", bits, rows.n, rows.k);
  require(0 <= nnz && nnz <= rows.count(), op, ": nnz must lie in 0..", rows.count(), ", got ", nnz);
  const Tensor values = torch::stable::new_empty(weight_, {nnz});
  if (nnz == 0) return values;
  const Tensor weight = torch::stable::contiguous(weight_);
  const Words words(bits);
  const Tensor starts = word_starts(words);
  by_size(weight, [&](auto v) {
    using V = decltype(v);
    launch(gather_kernel<V>, blocks_of_places(words.count()), kThreads, weight, data_of<V>(weight), words.data,
           starts_data(starts), words.width, rows.k, words.count(), nnz, static_cast<V*>(values.mutable_data_ptr()));
  });
  return values;
}

Tensor scatter_mask(const Tensor& values_, const Tensor& bits, int64_t k) {
  const char* op = "_scatter_mask";
  require_floating(op, "values", values_);
  require(values_.dim() == 1, op, ": values must be [nnz], got ", shape_of(values_));
  require(k >= 0, op, ": k must be at least 0, got ", k);
  require(bits.dim() == 2, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  require_same_device(op, "bits", bits, values_);
  require_bits(op, "bits", bits, bits.size(0), k);
  const Tensor weight = torch::stable::new_empty(values_, {bits.size(0), k});
  if (weight.numel() == 0) return weight;
  const Tensor values = torch::stable::contiguous(values_);
  const Words words(bits);
  const Tensor starts = word_starts(words);
  by_size(values, [&](auto v) {
    using V = decltype(v);
    launch(scatter_kernel<V>, blocks_of_places(words.count()), kThreads, values, data_of<V>(values), words.data,
           starts_data(starts), words.width, k, words.count(), values.size(0), static_cast<V*>(weight.mutable_data_ptr()));
  });
  return weight;
}

// What a sparse product works on, checked.
struct Sparse {
  Tensor values;  // contiguous
  Words words;
  Weight weight;
};

Sparse describe(const char* op, const Tensor& x, const Tensor& values, const Tensor& bits, const Tensor& starts,
                const Optional& columns, int64_t k, const std::string& format) {
  require(format == "bitmap" || format == "csr16" || format == "slab", op,
          ": format must be 'bitmap', 'csr16' or 'slab', got '", format, "'");
  require_floating(op, "values", values);
  require(values.dim() == 1, op, ": values must be [nnz], got ", shape_of(values));
  require(values.scalar_type() == x.scalar_type(), op, ": values must have the dtype of the other matrix");
  require(bits.dim() == 2, op, ": bits must be [N, 8 * ceil(K / 64)], got ", shape_of(bits));
  for (const Tensor* tensor : {&values, &bits, &starts}) require_same_device(op, "a part of the weight", *tensor, x);
  const int64_t n = bits.size(0), nnz = values.size(0);
  require_bits(op, "bits", bits, n, k);
  require(starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.is_contiguous(), op,
          ": starts must be contiguous int64 [N * S + 1]");
  const int64_t count = starts.size(0) - 1, pieces = n == 0 ? 1 : count / n;
  require(n == 0 || (count == n * pieces && (pieces > 0) == (k > 0)), op, ": starts of ", n,
          " rows must have a multiple of that and one more, got ", starts.size(0));
  Sparse sparse{torch::stable::contiguous(values), Words(bits), {}};
  sparse.weight = {sparse.words.data, nullptr, starts_data(starts), pieces, sparse.words.width, n, k, nnz};
  // Beyond 65536 columns 16 bits don't tell which; the bits do.
  if (format != "bitmap" && k <= 65536) {
    require(columns && columns->scalar_type() == ScalarType::Short && columns->dim() == 1 && columns->size(0) == nnz &&
                columns->is_contiguous(),
            op, ": columns must be contiguous int16 [", nnz, "] for format '", format, "'");
    require_same_device(op, "columns", *columns, x);
    sparse.weight.columns = static_cast<const uint16_t*>(columns->const_data_ptr());
  }
  return sparse;
}

template <typename T, int kRows>
void run_sparse_linear(const Tensor& x, int64_t batch, const Sparse& sparse, const T* bias, const Tensor& y) {
  const auto kernel =
      sparse.weight.columns == nullptr ? sparse_linear_kernel<T, kRows, true> : sparse_linear_kernel<T, kRows, false>;
  const int64_t chunks = (batch + kRows - 1) / kRows;
  launch(kernel, blocks_for(chunks * sparse.weight.n, 1), kRowThreads, x, data_of<T>(x), batch, data_of<T>(sparse.values),
         sparse.weight, bias, static_cast<T*>(y.mutable_data_ptr()));
}

Tensor sparse_linear(const Tensor& x_, const Tensor& values, const Tensor& bits, const Tensor& starts, const Optional& columns,
                     const Optional& bias_, std::string format) {
  const char* op = "_sparse_linear";
  require_floating(op, "x", x_);
  require(x_.dim() >= 1, op, ": x must be [.., K], got ", shape_of(x_));
  const int64_t k = x_.size(x_.dim() - 1), batch = rows_before_last(x_);
  const Sparse sparse = describe(op, x_, values, bits, starts, columns, k, format);
  const int64_t n = sparse.weight.n;
  Optional bias = bias_;
  if (bias) {
    require_same_device(op, "bias", *bias, x_);
    require(bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x_.scalar_type(), op, ": bias must be [", n,
            "] of the dtype of x, got ", shape_of(*bias));
    bias = torch::stable::contiguous(*bias);
  }
  const Tensor x = torch::stable::contiguous(x_), y = torch::stable::new_empty(x, with_last(x, n));
  if (y.numel() == 0) return y;
  if (batch > kSkinny) {
    aten::linear_out(torch::stable::view(x, {batch, k}), scatter_mask(sparse.values, bits, k), bias,
                     torch::stable::view(y, {batch, n}));
    return y;
  }
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const add = bias ? data_of<T>(*bias) : nullptr;
    batch == 1 ? run_sparse_linear<T, 1>(x, batch, sparse, add, y) : run_sparse_linear<T, kBatch>(x, batch, sparse, add, y);
  });
  return y;
}

template <typename T, int kRows>
void run_sparse_transposed(const Tensor& grad, int64_t batch, const Sparse& sparse, const Tensor& x) {
  constexpr int64_t kEnough = 2048, kLeast = 64;  // blocks, and rows of the weight in each
  const Weight& weight = sparse.weight;
  const int64_t groups = (weight.width + kRowWarps - 1) / kRowWarps, chunks = (batch + kRows - 1) / kRows;
  const int64_t wanted = std::clamp<int64_t>(kEnough / (groups * chunks), 1, (weight.n + kLeast - 1) / kLeast);
  const int64_t share = (weight.n + wanted - 1) / wanted, splits = (weight.n + share - 1) / share;
  using C = typename Compute<T>::type;
  const Tensor parts = torch::stable::new_empty(grad, {splits, batch, weight.k}, accumulate_type(grad));
  launch(sparse_transposed_kernel<T, kRows>, blocks_for(groups * chunks * splits, 1), kRowThreads, grad, data_of<T>(grad),
         batch, data_of<T>(sparse.values), weight, groups, chunks, share, static_cast<C*>(parts.mutable_data_ptr()));
  const int64_t size = batch * weight.k;
  launch(add_parts_kernel<T>, blocks_for(size, kThreads), kThreads, grad, data_of<C>(parts), splits, size,
         static_cast<T*>(x.mutable_data_ptr()));
}

Tensor sparse_linear_transposed(const Tensor& grad_, const Tensor& values, const Tensor& bits, const Tensor& starts,
                                const Optional& columns, int64_t k, std::string format) {
  const char* op = "_sparse_linear_transposed";
  require_floating(op, "grad", grad_);
  require(k >= 0, op, ": k must be at least 0, got ", k);
  Sparse sparse = describe(op, grad_, values, bits, starts, columns, k, format);
  const int64_t n = sparse.weight.n, batch = rows_before_last(grad_);
  require(grad_.dim() >= 1 && grad_.size(grad_.dim() - 1) == n, op, ": grad must be [.., ", n, "], got ", shape_of(grad_));
  const Tensor grad = torch::stable::contiguous(grad_);
  if (n == 0) return torch::stable::new_zeros(grad, with_last(grad, k));
  const Tensor x = torch::stable::new_empty(grad, with_last(grad, k));
  if (x.numel() == 0) return x;
  if (batch > kSkinny) {
    aten::mm_out(torch::stable::view(grad, {batch, n}), scatter_mask(sparse.values, bits, k),
                 torch::stable::view(x, {batch, k}));
    return x;
  }
  const Tensor of_words = word_starts(sparse.words);
  sparse.weight.starts = starts_data(of_words);
  by_type(grad, [&](auto zero) {
    using T = decltype(zero);
    batch == 1 ? run_sparse_transposed<T, 1>(grad, batch, sparse, x) : run_sparse_transposed<T, kBatch>(grad, batch, sparse, x);
  });
  return x;
}

}  // namespace
}  // namespace fourfold::maskmm

STABLE_TORCH_LIBRARY_IMPL(fourfold, CUDA, m) {
  using namespace fourfold::maskmm;
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("_mask_starts", TORCH_BOX(&mask_starts));
  m.impl("_mask_columns", TORCH_BOX(&mask_columns));
  m.impl("_gather_mask", TORCH_BOX(&gather_mask));
  m.impl("_scatter_mask", TORCH_BOX(&scatter_mask));
  m.impl("_sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("_sparse_linear_transposed", TORCH_BOX(&sparse_linear_transposed));
}
