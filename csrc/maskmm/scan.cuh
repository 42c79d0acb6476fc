// Sums along words of bits: within a warp, within a block, and over a whole tensor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cuda.cuh"
#include "maskmm/bits.h"

namespace fourfold::maskmm {

constexpr uint32_t kWarp = 32, kAllLanes = 0xffffffff;

// Threads of the blocks here, and what each of them scans in a row.
constexpr uint32_t kThreads = 256, kItems = 8;
constexpr int64_t kScanned = kThreads * kItems;

__device__ __forceinline__ uint32_t lane_of_thread() { return threadIdx.x % kWarp; }

// The sum over the lanes, in every lane, in an order of its own: for floats not that of a loop, but always the same.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (uint32_t step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The sum over the threads before this one; total: over all of them. Every thread of the block must take part.
__device__ __forceinline__ int64_t block_scan(int64_t x, int64_t& total) {
  __shared__ int64_t warps[kThreads / kWarp];
  const uint32_t lane = lane_of_thread(), warp = threadIdx.x / kWarp;
  int64_t sum = x;
#pragma unroll
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int64_t others = 0;
  total = 0;
#pragma unroll
  for (uint32_t w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) others += warps[w];
    total += warps[w];
  }
  __syncthreads();  // the next scan writes there again
  return others + sum - x;
}

// counts [n] become the sums of those before them within a block's share; totals: one per block.
__global__ void __launch_bounds__(kThreads) scan_blocks_kernel(int64_t* counts, int64_t n, int64_t* totals) {
  const int64_t first = blockIdx.x * kScanned + threadIdx.x * kItems;
  int64_t sums[kItems], sum = 0;
#pragma unroll
  for (uint32_t i = 0; i < kItems; ++i) {
    sums[i] = sum;
    sum += first + i < n ? counts[first + i] : 0;
  }
  int64_t total;
  const int64_t before = block_scan(sum, total);
#pragma unroll
  for (uint32_t i = 0; i < kItems; ++i) {
    if (first + i < n) counts[first + i] = before + sums[i];
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// One block: totals [n] become the sums of those before them, and totals[n] that of all.
__global__ void __launch_bounds__(kThreads) scan_totals_kernel(int64_t* totals, int64_t n) {
  int64_t carried = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t at = first + threadIdx.x;
    int64_t total;
    const int64_t before = block_scan(at < n ? totals[at] : 0, total);
    if (at < n) totals[at] = carried + before;
    carried += total;
  }
  if (threadIdx.x == 0) totals[n] = carried;
}

// starts [n + 1]: the sums within each block's share and those before it put together, and the sum of all.
__global__ void __launch_bounds__(kThreads)
    add_totals_kernel(int64_t* starts, int64_t n, const int64_t* totals, int64_t blocks) {
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (at < n) starts[at] += totals[at / kScanned];
  if (at == n) starts[n] = totals[blocks];
}

inline uint32_t blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  require(blocks < (int64_t{1} << 31), "maskmm: ", items, " are too many for one launch");
  return static_cast<uint32_t>(blocks);
}

// starts [n + 1] of int64, of which the first n are counts: afterwards the sums of those before them.
inline void scan(const Tensor& starts, int64_t n) {
  int64_t* const data = static_cast<int64_t*>(starts.mutable_data_ptr());
  const int64_t blocks = blocks_for(n, kScanned);
  const Tensor totals = torch::stable::new_empty(starts, {blocks + 1});
  int64_t* const sums = static_cast<int64_t*>(totals.mutable_data_ptr());
  if (blocks > 0) launch(scan_blocks_kernel, static_cast<uint32_t>(blocks), kThreads, starts, data, n, sums);
  launch(scan_totals_kernel, 1, kThreads, starts, sums, blocks);
  launch(add_totals_kernel, blocks_for(n + 1, kThreads), kThreads, starts, data, n, static_cast<const int64_t*>(sums), blocks);
}

// ---- words of bits -------------------------------------------------------------------------------------------------------

// bits as 64-bit words; `holder` keeps a copy alive where they don't lie on words.
struct Words {
  Tensor holder;
  const uint64_t* data;
  int64_t rows, width;

  explicit Words(const Tensor& bits) : holder(bits), rows(1), width(bits.size(bits.dim() - 1) / 8) {
    for (int64_t d = 0; d + 1 < bits.dim(); ++d) rows *= bits.size(d);
    if (reinterpret_cast<uintptr_t>(bits.const_data_ptr()) % 8 != 0) holder = torch::stable::clone(bits);
    data = static_cast<const uint64_t*>(holder.const_data_ptr());
  }
  int64_t count() const { return rows * width; }
};

// Which row and which word of it: one division for all words that follow each other.
struct Place {
  int64_t row, w;

  __device__ __forceinline__ Place(int64_t word, int64_t width) : row(word / width), w(word - row * width) {}
  __device__ __forceinline__ void next(int64_t width) {
    if (++w == width) w = 0, ++row;
  }
};

// starts[p] = the ones in piece p: `piece` words of a row of `width`, or what is left of it. `together` threads, 1 or a warp,
// count one.
__global__ void __launch_bounds__(kThreads)
    count_pieces_kernel(const uint64_t* words, int64_t width, int64_t piece, int64_t pieces, int64_t count, uint32_t together,
                        int64_t* starts) {
  const int64_t p = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / together;
  const uint32_t part = threadIdx.x % together;
  int32_t ones = 0;
  if (p < count) {
    const int64_t row = p / pieces, first = (p - row * pieces) * piece;
    const int64_t end = min(first + piece, width);
    for (int64_t w = first + part; w < end; w += together) ones += __popcll(words[row * width + w]);
  }
  if (together > 1) ones = warp_sum(ones);
  if (p < count && part == 0) starts[p] = ones;
}

// Where the values of each piece begin, [rows * pieces + 1], a row cut into pieces of so many words.
inline Tensor starts_of(const Words& words, int64_t piece, int64_t pieces) {
  const int64_t count = words.rows * pieces;
  const Tensor starts = torch::stable::new_empty(words.holder, {count + 1}, ScalarType::Long);
  const uint32_t together = piece >= kWarp ? kWarp : 1;
  if (count > 0) {
    launch(count_pieces_kernel, blocks_for(count, kThreads / together), kThreads, starts, words.data, words.width, piece,
           pieces, count, together, static_cast<int64_t*>(starts.mutable_data_ptr()));
  }
  scan(starts, count);
  return starts;
}

// Where the values of each word begin.
inline Tensor word_starts(const Words& words) { return starts_of(words, 1, words.width); }

}  // namespace fourfold::maskmm
