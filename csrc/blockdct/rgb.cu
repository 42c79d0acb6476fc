// RGB to DCT coefficients on CUDA in one pass: each pixel is read once, each coefficient written once, and nothing in
// between leaves the multiprocessor. A thread block takes a tile of consecutive MCUs (JPEG's smallest whole piece: the
// 8v x 8h pixels under one block of chroma); its threads convert two neighbouring columns each, transform them in
// registers, turn the tile in shared memory and transform rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "blockdct/rgb_geometry.h"
#include "blockdct/transform.cuh"
#include "common/cuda.cuh"

namespace fourfold::rgbdct {
namespace {

using blockdct::dct;

// Weights of red, green and blue in luma, BT.601.
constexpr double kRed = 0.299, kGreen = 0.587, kBlue = 0.114;

// How two neighbouring columns are read: by one access a channel, by three accesses across all channels, or one by one.
enum class Access { planes, triples, single };

struct Mcu {
  int b, i, j;
};

// The blocks of one result, and the strides of image, component, block down, block across and frequency.
struct Grid {
  int rows, cols;
  int64_t b, c, i, j, f;
};

// The kernel's arguments; by value, so that no table is copied to the device beforehand.
template <typename C>
struct Plan {
  uint32_t mcus;  // B * down * across
  Divider down, across;
  int H, W;
  int64_t image_b, image_c, image_row, image_col;
  Access access;
  Grid luma, chroma;
  const C* scale;  // [3, F] or null
  int F;
  bool planar;  // else blocks
  bool whole;   // every frequency, in order; otherwise frequency u * 8 + v is in slots, or -1
  int8_t slots[64];

  __device__ __forceinline__ Mcu mcu(uint32_t number) const {
    uint32_t i, j;
    number = across.split(number, j);
    number = down.split(number, i);
    return {static_cast<int>(number), static_cast<int>(i), static_cast<int>(j)};
  }
};

// The tile in shared memory: 8 rows u of kBlocks blocks t, each row 8 values in kChunks chunks q of 16 bytes. Luma comes
// first, the upper row of all MCUs before the lower one, then Cb, then Cr. Blocks of a row and chunks of a block stand in
// turned order, spread over all banks whatever lanes access together: pairs of columns, one chunk of consecutive blocks,
// or the chunks of one block. Turned by powers of two, so that u, where it is known when compiling, costs no arithmetic.
template <typename C, int v, int h>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(C), kChunks = 8 / kChunk;
  static constexpr int kThreads = 512 / sizeof(C);
  static constexpr int kPairs = 4 * h;  // of columns in an MCU
  static constexpr int kMcus = kThreads / kPairs;
  static constexpr int kLuma = v * h * kMcus, kBlocks = kLuma + 2 * kMcus;
  static constexpr int kResident = sizeof(C) == 8 ? 4 : 6;  // tiles a multiprocessor must hold
  static constexpr int kSize = 8 * kBlocks * kChunks;
  static_assert(kBlocks <= kThreads && kBlocks * 4 % kThreads == 0 && kBlocks % 4 == 0, "rows must go round evenly");
  using Chunk = Vec<C, kChunk>;

  static __device__ __forceinline__ int index(int u, int t, int q) {
    constexpr int banks = 128 / sizeof(Chunk);  // chunks that shared memory delivers at once
    const int turned = t ^ (u % 4);
    return (u * kBlocks + turned) * kChunks + (q ^ (turned * kChunks / banks % kChunks));
  }
  static __device__ __forceinline__ C* column(Chunk* tile, int u, int t, int x) {
    return tile[index(u, t, x / kChunk)].at + x % kChunk;
  }
  static __device__ __forceinline__ int component(int t) { return t < kLuma ? 0 : 1 + (t - kLuma) / kMcus; }

  // Where block t's coefficients begin in its result, or -1: the last MCUs across and down have room for more luma than
  // there is.
  static __device__ __forceinline__ int64_t offset(const Plan<C>& plan, uint32_t first, int t) {
    const bool luma = t < kLuma;
    const int k = luma ? t / h % kMcus : (t - kLuma) % kMcus;
    if (first + k >= plan.mcus) return -1;
    const Mcu at = plan.mcu(first + k);
    const Grid& grid = luma ? plan.luma : plan.chroma;
    const int i = luma ? at.i * v + t / (h * kMcus) : at.i, j = luma ? at.j * h + t % h : at.j;
    if (i >= grid.rows || j >= grid.cols) return -1;
    return at.b * grid.b + (luma ? 0 : component(t) - 1) * grid.c + i * grid.i + j * grid.j;
  }
};

// 8 rows of two neighbouring columns, the last row and column of the image repeated: channel c of both in raw[y][c].
template <typename T, typename C>
__device__ __forceinline__ void load_columns(const T* image, const Plan<C>& plan, int top, int left, Vec<T, 2> (&raw)[8][3]) {
  const auto pair = [](const T* from) { return *reinterpret_cast<const Vec<T, 2>*>(from); };
  if (plan.access == Access::single || left + 2 > plan.W || top + 8 > plan.H) {
    const T* row = image + min(top, plan.H - 1) * plan.image_row + min(left, plan.W - 1) * plan.image_col;
    const int64_t next = left + 1 < plan.W ? plan.image_col : 0;
#pragma unroll
    for (int y = 0; y < 8; ++y) {
#pragma unroll
      for (int c = 0; c < 3; ++c) raw[y][c] = {row[c * plan.image_c], row[c * plan.image_c + next]};
      row += top + y + 1 < plan.H ? plan.image_row : 0;
    }
    return;
  }
  const T* row = image + top * plan.image_row + left * plan.image_col;
  if (plan.access == Access::planes) {
#pragma unroll
    for (int y = 0; y < 8; ++y, row += plan.image_row) {
#pragma unroll
      for (int c = 0; c < 3; ++c) raw[y][c] = pair(row + c * plan.image_c);
    }
  } else {
#pragma unroll
    for (int y = 0; y < 8; ++y, row += plan.image_row) {
      const Vec<T, 2> rg = pair(row), br = pair(row + 2), gb = pair(row + 4);
      raw[y][0] = {rg.at[0], br.at[1]}, raw[y][1] = {rg.at[1], gb.at[0]}, raw[y][2] = {br.at[0], gb.at[1]};
    }
  }
}

// Frequencies (u, x), ..., (u, x + K - 1) of one block; `step` from one frequency to the next.
template <int K, typename O, typename C>
__device__ __forceinline__ void store_coefs(O* block, int64_t step, const Plan<C>& plan, int component, int u, int x,
                                            C (&value)[K]) {
  const C* scale = plan.scale == nullptr ? nullptr : plan.scale + component * plan.F;
  if (plan.whole) {
    const int f = u * 8 + x;
    if (scale != nullptr) {
#pragma unroll
      for (int k = 0; k < K; ++k) value[k] *= scale[f + k];
    }
    if (K < 8) return store_vector(block + f, value);  // blocks: a chunk of neighbours
    O* to = block + f * step;
#pragma unroll
    for (int k = 0; k < K; ++k, to += step) *to = static_cast<O>(value[k]);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int slot = plan.slots[u * 8 + x + k];
    if (slot >= 0) block[slot * step] = static_cast<O>(scale == nullptr ? value[k] : value[k] * scale[slot]);
  }
}

template <typename T, typename O, typename C, int v, int h>
__global__ void __launch_bounds__(Tile<C, v, h>::kThreads, Tile<C, v, h>::kResident)
    rgb_to_dct_kernel(const T* __restrict__ rgb, O* __restrict__ y, O* __restrict__ cbcr,
                      const __grid_constant__ Plan<C> plan) {
  using S = Tile<C, v, h>;
  __shared__ typename S::Chunk tile[S::kSize];
  __shared__ int64_t offsets[S::kBlocks];
  const uint32_t first = blockIdx.x * S::kMcus;
  if (threadIdx.x < S::kBlocks) offsets[threadIdx.x] = S::offset(plan, first, threadIdx.x);

  {  // two neighbouring columns of an MCU, top to bottom
    const int k = threadIdx.x / S::kPairs, left = threadIdx.x % S::kPairs * 2;
    const Mcu at = plan.mcu(min(first + k, plan.mcus - 1));
    const T* image = rgb + at.b * plan.image_b;
    C chroma[2][2 / h][8];  // Cb and Cr
#pragma unroll
    for (int lower = 0; lower < v; ++lower) {
      Vec<T, 2> raw[8][3];
      load_columns(image, plan, (at.i * v + lower) * 8, at.j * 8 * h + left, raw);
      C luma[2][8];
#pragma unroll
      for (int cell = 0; cell < 8 / v; ++cell) {
        C sum[3][2 / h] = {};  // of R, G, B over the pixels that share a chroma sample
#pragma unroll
        for (int row = cell * v; row < (cell + 1) * v; ++row) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            C pixel[3];
#pragma unroll
            for (int c = 0; c < 3; ++c) {
              pixel[c] = static_cast<C>(raw[row][c].at[e]);
              sum[c][e / h] += pixel[c];
            }
            luma[e][row] = C(kRed) * pixel[0] + (C(kGreen) * pixel[1] + (C(kBlue) * pixel[2] - C(128)));
          }
        }
#pragma unroll
        for (int x = 0; x < 2 / h; ++x) {  // Cb = (B - Y) / (2 - 2 kBlue), Cr = (R - Y) / (2 - 2 kRed), averaged
          constexpr double share = 0.5 / (v * h), cb = share / (1 - kBlue), cr = share / (1 - kRed);
          const int at_row = lower * (8 / v) + cell;
          chroma[0][x][at_row] = C(share) * sum[2][x] - (C(cb * kRed) * sum[0][x] + C(cb * kGreen) * sum[1][x]);
          chroma[1][x][at_row] = C(share) * sum[0][x] - (C(cr * kGreen) * sum[1][x] + C(cr * kBlue) * sum[2][x]);
        }
      }
      const int t = (lower * S::kMcus + k) * h + left / 8;
      dct<8>(luma[0]);
      dct<8>(luma[1]);
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const C pair[2] = {luma[0][u], luma[1][u]};
        store_vector(S::column(tile, u, t, left % 8), pair);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int t = S::kLuma + c * S::kMcus + k;
#pragma unroll
      for (int x = 0; x < 2 / h; ++x) dct<8>(chroma[c][x]);
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        C columns[2 / h];
#pragma unroll
        for (int x = 0; x < 2 / h; ++x) columns[x] = chroma[c][x][u];
        store_vector(S::column(tile, u, t, left / h), columns);
      }
    }
  }
  __syncthreads();

  // Rows u and u + 4 of a block; lanes hold neighbouring blocks, so planes are written straight from registers.
#pragma unroll
  for (int m = 0; m < S::kBlocks * 4 / S::kThreads; ++m) {
    const int item = threadIdx.x + m * S::kThreads, t = item % S::kBlocks;
    const bool luma = t < S::kLuma;
    const int64_t step = luma ? plan.luma.f : plan.chroma.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int u = item / S::kBlocks + half * 4;
      C row[8];
#pragma unroll
      for (int q = 0; q < S::kChunks; ++q) {
        const typename S::Chunk chunk = tile[S::index(u, t, q)];
#pragma unroll
        for (int e = 0; e < S::kChunk; ++e) row[q * S::kChunk + e] = chunk.at[e];
      }
      dct<8>(row);
      if (plan.planar) {
        if (offsets[t] >= 0) store_coefs((luma ? y : cbcr) + offsets[t], step, plan, S::component(t), u, 0, row);
      } else {
#pragma unroll
        for (int q = 0; q < S::kChunks; ++q) {
          typename S::Chunk chunk;
#pragma unroll
          for (int e = 0; e < S::kChunk; ++e) chunk.at[e] = row[q * S::kChunk + e];
          tile[S::index(u, t, q)] = chunk;
        }
      }
    }
  }
  if (plan.planar) return;
  __syncthreads();

  for (int m = 0; m < S::kBlocks * 8 * S::kChunks / S::kThreads; ++m) {  // chunks in the order of memory
    const int item = threadIdx.x + m * S::kThreads;
    const int q = item % S::kChunks, u = item / S::kChunks % 8, t = item / (S::kChunks * 8);
    typename S::Chunk chunk = tile[S::index(u, t, q)];
    if (offsets[t] < 0) continue;
    store_coefs((t < S::kLuma ? y : cbcr) + offsets[t], 1, plan, S::component(t), u, q * S::kChunk, chunk.at);
  }
}

// ---- from tensors to launches ----

using Scale = std::optional<Tensor>;

Grid grid_of(const Geometry& g) {
  return {static_cast<int>(g.rows), static_cast<int>(g.cols), g.coef_b, g.coef_c, g.coef_i, g.coef_j, g.coef_f};
}

template <typename T, typename O, int v, int h>
void run_kernel(const Call& call, const Scale& scale, const Tensor& y, const Tensor& cbcr) {
  using C = typename Compute<T>::type;
  using S = Tile<C, v, h>;
  const Geometry &luma = call.luma, &chroma = call.chroma;
  // Places up to a whole MCU and a row beyond the image are counted in 31 bits, too.
  const int64_t per_image = chroma.rows * chroma.cols, most = (int64_t{1} << 31) - 32;
  require(per_image < most && luma.H < most && luma.W < most, call.op,
          ": H, W and the number of blocks of an image must be below 2**31 - 32, got ", luma.H, " x ", luma.W,
          "; split it into strips");

  Plan<C> plan{};
  plan.down = Divider(chroma.rows), plan.across = Divider(chroma.cols);
  plan.H = luma.H, plan.W = luma.W;
  plan.image_b = call.rgb.stride(0), plan.image_c = call.channel, plan.image_row = call.row, plan.image_col = call.col;
  const T* pixels = static_cast<const T*>(call.rgb.const_data_ptr());
  bool aligned = reinterpret_cast<uintptr_t>(pixels) % sizeof(Vec<T, 2>) == 0;
  for (int64_t length : {luma.W, plan.image_b, plan.image_row}) aligned = aligned && length % 2 == 0;
  plan.access = Access::single;
  if (aligned && call.col == 1 && call.channel % 2 == 0) plan.access = Access::planes;
  if (aligned && call.col == 3) plan.access = Access::triples;
  plan.luma = grid_of(luma), plan.chroma = grid_of(chroma);
  if (scale) plan.scale = static_cast<const C*>(scale->const_data_ptr());
  plan.F = luma.F;
  plan.planar = luma.layout == blockdct::Layout::planar;
  plan.whole = true;
  for (int f = 0; f < 64; ++f) {
    plan.slots[f] = luma.slots[f];
    plan.whole = plan.whole && luma.slots[f] == f;
  }

  // MCUs are counted in 31 bits, so a batch beyond that goes in several launches.
  const int64_t at_once = (most - 1) / per_image;
  for (int64_t b = 0; b < luma.B; b += at_once) {
    plan.mcus = static_cast<uint32_t>(per_image * std::min(at_once, luma.B - b));
    const uint32_t grid = (plan.mcus + S::kMcus - 1) / S::kMcus;
    launch(rgb_to_dct_kernel<T, O, C, v, h>, grid, S::kThreads, call.rgb, pixels + b * plan.image_b,
           static_cast<O*>(y.mutable_data_ptr()) + b * plan.luma.b,
           static_cast<O*>(cbcr.mutable_data_ptr()) + b * plan.chroma.b, plan);
  }
}

template <typename T, typename O>
void run_to(const Call& call, const Scale& scale, const Tensor& y, const Tensor& cbcr) {
  if (call.h == 1) return run_kernel<T, O, 1, 1>(call, scale, y, cbcr);
  if (call.v == 1) return run_kernel<T, O, 1, 2>(call, scale, y, cbcr);
  run_kernel<T, O, 2, 2>(call, scale, y, cbcr);
}

template <typename T>
void run_from(const Call& call, const Scale& scale, const Tensor& y, const Tensor& cbcr) {
  switch (y.scalar_type()) {
    case ScalarType::Half:
      return run_to<T, torch::headeronly::Half>(call, scale, y, cbcr);
    case ScalarType::BFloat16:
      return run_to<T, torch::headeronly::BFloat16>(call, scale, y, cbcr);
    default:
      return run_to<T, float>(call, scale, y, cbcr);
  }
}

// ---- the op; schema in ops.cpp ----

std::tuple<Tensor, Tensor> rgb_to_dct(const Tensor& rgb, std::string subsampling, std::string layout, Freqs freqs, Scale scale,
                                      ScalarType dtype) {
  Call call = describe_call(rgb, subsampling, layout, freqs, scale, dtype);
  const auto [y, cbcr] = new_results(call);
  if (!call.luma.empty()) {
    switch (call.rgb.scalar_type()) {
      case ScalarType::Byte:
        run_from<uint8_t>(call, scale, y, cbcr);
        break;
      case ScalarType::Half:
        run_from<torch::headeronly::Half>(call, scale, y, cbcr);
        break;
      case ScalarType::BFloat16:
        run_from<torch::headeronly::BFloat16>(call, scale, y, cbcr);
        break;
      case ScalarType::Double:
        run_to<double, double>(call, scale, y, cbcr);
        break;
      default:
        run_from<float>(call, scale, y, cbcr);
    }
  }
  return {in_dtype(y, dtype), in_dtype(cbcr, dtype)};
}

}  // namespace
}  // namespace fourfold::rgbdct

STABLE_TORCH_LIBRARY_IMPL(fourfold, CUDA, m) { m.impl("rgb_to_dct", TORCH_BOX(&fourfold::rgbdct::rgb_to_dct)); }
