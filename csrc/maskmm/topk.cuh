// The largest scores, without a sort and without asking the device anything: digit by digit from the highest, histograms of the
// keys that begin with the digits found so far; then one pass that compares with the key found, ties going to the lowest index.
#pragma once

#include "maskmm/scan.cuh"

namespace fourfold::maskmm {

// Unsigned integers in the order of scores or their magnitudes; -0 and +0 have one key.
template <int kBytes>
struct KeyOf;
template <>
struct KeyOf<2> {
  using type = uint16_t;
};
template <>
struct KeyOf<4> {
  using type = uint32_t;
};
template <>
struct KeyOf<8> {
  using type = uint64_t;
};

template <typename K>
__device__ __forceinline__ K key_of(K raw, bool abs) {
  constexpr K top = K(K(1) << (8 * sizeof(K) - 1));
  if (abs) return raw & K(~top);
  if (raw == top) raw = 0;
  return (raw & top) != 0 ? K(~raw) : K(raw | top);
}

constexpr int kDigitBits = 11;
constexpr uint32_t kDigits = 1u << kDigitBits;

// What is known so far of the last key that is kept: its upper digits, how many that begin with them are kept, and how many
// there are.
struct Cut {
  uint64_t above;
  int64_t kept, there;
};

// The digit that is looked at: `bits` bits of the key above `shift` lower ones.
struct Digit {
  int shift, bits;
  bool highest;
};

constexpr int64_t kCounted = kThreads * 64;  // scores per block

template <typename K>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const K* scores, int64_t n, bool abs, Digit digit, const Cut* cut, unsigned long long* counts) {
  __shared__ uint32_t here[kDigits];
  for (uint32_t d = threadIdx.x; d < kDigits; d += kThreads) here[d] = 0;
  __syncthreads();
  const uint64_t above = digit.highest ? 0 : cut->above, mask = (uint64_t{1} << digit.bits) - 1;
  const int64_t first = blockIdx.x * kCounted, end = min(first + kCounted, n);
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    const uint64_t key = key_of(scores[i], abs) >> digit.shift;
    if (digit.highest || key >> digit.bits == above) atomicAdd(&here[key & mask], 1u);
  }
  __syncthreads();
  for (uint32_t d = threadIdx.x; d < kDigits; d += kThreads) {
    if (here[d] != 0) atomicAdd(&counts[d], static_cast<unsigned long long>(here[d]));
  }
}

// One block: finds the digit at which the count from above reaches what is kept, and clears counts for the next.
__global__ void __launch_bounds__(kThreads) pick_digit_kernel(Cut* cut, unsigned long long* counts, Digit digit, int64_t keep) {
  constexpr int kOwn = kDigits / kThreads;
  const int64_t kept = digit.highest ? keep : cut->kept;
  const uint64_t above = digit.highest ? 0 : cut->above;
  int64_t own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {  // from the highest digit down
    own[i] = static_cast<int64_t>(counts[kDigits - 1 - (threadIdx.x * kOwn + i)]);
    sum += own[i];
  }
  int64_t total;
  int64_t before = block_scan(sum, total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t d = kDigits - 1 - (threadIdx.x * kOwn + i);
    if (before < kept && kept <= before + own[i]) *cut = {above << digit.bits | d, kept - before, own[i]};
    before += own[i];
    counts[d] = 0;
  }
}

// Of the 64 scores of a word, the keys above the cut and those equal to it; lane l holds scores l and l + 32.
template <typename K>
__device__ __forceinline__ void compare_word(const K* scores, const Place& place, int64_t k, bool abs, uint64_t limit,
                                             uint64_t& above, uint64_t& equal) {
  const int64_t row = place.row, column = place.w * 64;
  above = equal = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t c = column + half * 32 + lane_of_thread();
    const uint64_t key = c < k ? key_of(scores[row * k + c], abs) : 0;
    above |= static_cast<uint64_t>(__ballot_sync(kAllLanes, c < k && key > limit)) << (32 * half);
    equal |= static_cast<uint64_t>(__ballot_sync(kAllLanes, c < k && key == limit)) << (32 * half);
  }
}

constexpr uint32_t kSelected = kThreads, kSelectedByWarp = kWarp;  // words per block, and per warp

// before[b] = how many scores of block b's words are equal to the cut; 0 where all of these are kept and nobody will ask.
template <typename K>
__global__ void __launch_bounds__(kThreads)
    count_equal_kernel(const K* scores, int64_t width, int64_t k, int64_t count, bool abs, const Cut* cut, int64_t* before) {
  __shared__ int64_t warps[kThreads / kWarp];
  const uint32_t warp = threadIdx.x / kWarp;
  int64_t sum = 0;
  if (cut->kept < cut->there) {
    const int64_t first = blockIdx.x * int64_t{kSelected} + warp * kSelectedByWarp;
    Place place(first, width);
    for (int64_t word = first; word < min(first + kSelectedByWarp, count); ++word, place.next(width)) {
      uint64_t above, equal;
      compare_word(scores, place, k, abs, cut->above, above, equal);
      sum += __popcll(equal);
    }
  }
  if (lane_of_thread() == 0) warps[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (uint32_t w = 0; w < kThreads / kWarp; ++w) sum += warps[w];
  before[blockIdx.x] = sum;
}

template <typename K>
__global__ void __launch_bounds__(kThreads, 4) select_kernel(const K* scores, int64_t width, int64_t k, int64_t count, bool abs,
                                                             const Cut* cut, const int64_t* before, uint64_t* bits) {
  __shared__ uint64_t aboves[kSelected], equals[kSelected];
  const int64_t first = blockIdx.x * int64_t{kSelected};
  const uint32_t own = threadIdx.x / kWarp * kSelectedByWarp;
  Place place(first + own, width);
  for (uint32_t i = own; i < own + kSelectedByWarp; ++i, place.next(width)) {
    uint64_t above = 0, equal = 0;
    if (first + i < count) compare_word(scores, place, k, abs, cut->above, above, equal);
    if (lane_of_thread() == 0) aboves[i] = above, equals[i] = equal;
  }
  __syncthreads();
  uint64_t equal = equals[threadIdx.x], kept = aboves[threadIdx.x];
  if (cut->kept < cut->there) {
    int64_t total;
    int64_t left = cut->kept - before[blockIdx.x] - block_scan(__popcll(equal), total);
    for (; equal != 0 && left > 0; --left, equal &= equal - 1) kept |= equal & (~equal + 1);
  } else {
    kept |= equal;
  }
  if (first + threadIdx.x < count) bits[first + threadIdx.x] = kept;
}

template <typename K>
void select_largest(const Tensor& scores, const Rows& rows, int64_t keep, bool abs, const Tensor& bits) {
  const K* const from = static_cast<const K*>(scores.const_data_ptr());
  const int64_t n = rows.count(), width = row_words(rows.k), words = rows.n * width;
  Tensor counts = torch::stable::new_zeros(scores, {int64_t{kDigits}}, ScalarType::Long);
  const Tensor state = torch::stable::new_empty(scores, {int64_t{sizeof(Cut)} / 8}, ScalarType::Long);
  auto* const histogram = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  Cut* const cut = static_cast<Cut*>(state.mutable_data_ptr());
  Digit digit{8 * sizeof(K), 0, true};
  while (digit.shift > 0) {
    digit.bits = std::min(kDigitBits, digit.shift);
    digit.shift -= digit.bits;
    launch(histogram_kernel<K>, blocks_for(n, kCounted), kThreads, scores, from, n, abs, digit, static_cast<const Cut*>(cut),
           histogram);
    launch(pick_digit_kernel, 1, kThreads, scores, cut, histogram, digit, keep);
    digit.highest = false;
  }
  const uint32_t blocks = blocks_for(words, kSelected);
  const Tensor before = torch::stable::new_empty(scores, {int64_t{blocks} + 1}, ScalarType::Long);
  int64_t* const ties = static_cast<int64_t*>(before.mutable_data_ptr());
  launch(count_equal_kernel<K>, blocks, kThreads, scores, from, width, rows.k, words, abs, static_cast<const Cut*>(cut), ties);
  scan(before, blocks);
  launch(select_kernel<K>, blocks, kThreads, scores, from, width, rows.k, words, abs, static_cast<const Cut*>(cut),
         static_cast<const int64_t*>(ties), static_cast<uint64_t*>(bits.mutable_data_ptr()));
}

}  // namespace fourfold::maskmm
