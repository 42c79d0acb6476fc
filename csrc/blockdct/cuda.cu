// Block DCT on CUDA: each pixel and each coefficient crosses device memory once. A thread block takes a tile of
// consecutive image blocks, transforms columns in registers, turns the tile in shared memory and transforms rows (the
// inverse: rows first).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>

#include "blockdct/geometry.h"
#include "blockdct/transform.cuh"
#include "common/cuda.cuh"

namespace fourfold::blockdct {
namespace {

// ---- the work of a launch ----

// Beyond the image: read the nearest pixel or zero; drop, or add to the nearest pixel.
enum class Edge { replicate, zero, crop, fold };

// What lies side by side among the coefficients: blocks of one frequency, frequencies of one block, or rows of pixels.
enum class Order { planes, blocks, rows };

struct Place {
  bool live;  // the last tile may be partly empty
  int b, c, i, j;
};

// A kernel's arguments; by value, so that no table is copied to the device beforehand.
template <typename C, int N>
struct Plan {
  uint32_t blocks;  // B * C * rows * cols
  Divider channels, rows, cols;
  bool channels_inner;  // count blocks with the channel fastest, as in channels_last images
  int H, W;
  int64_t image_b, image_c, image_row, image_col;
  int64_t coef_b, coef_c, coef_i, coef_j, coef_u, coef_v;
  const C* scale;  // [C or 1, F] or null
  int64_t scale_c;
  bool divide;  // by scale
  C dc;         // added to coefficient (0, 0): the shift of a whole block
  Edge edge;
  Order order;
  bool image_vectors, coef_vectors;  // V neighbouring pixels or coefficients are aligned for one access
  bool whole;                        // every frequency, in order; otherwise frequency u * N + v is in slots, or -1
  int16_t slots[N * N];

  __device__ __forceinline__ Place place(uint32_t block) const {
    Place at{block < blocks};
    uint32_t c, i, j;
    if (channels_inner) {
      block = channels.split(block, c);
      block = cols.split(block, j);
      at.b = rows.split(block, i);
    } else {
      block = cols.split(block, j);
      block = rows.split(block, i);
      at.b = channels.split(block, c);
    }
    at.c = c, at.i = i, at.j = j;
    return at;
  }
  __device__ __forceinline__ int64_t coef_block(const Place& at) const {
    return at.b * coef_b + at.c * coef_c + at.i * coef_i + at.j * coef_j;
  }
  __device__ __forceinline__ int slot(int u, int v) const { return whole ? u * N + v : slots[u * N + v]; }
};

// The tile in shared memory: N rows u of kBlocks blocks t, each row N values in kChunks chunks q of V. One row too many
// per u, and the chunks of a row in turned order, spread over all banks whatever lanes access together: the chunks of a
// row, one chunk of consecutive blocks, or one of consecutive rows of a block.
template <typename T, int N>
struct Tile {
  using C = typename Compute<T>::type;
  static constexpr int smaller(int a, int b) { return a < b ? a : b; }
  static constexpr int V = smaller(smaller(N, 32 / N), 16 / sizeof(C));  // 32 values a thread, 16 bytes an access
  static constexpr int kChunks = N / V;
  static constexpr int kBlocks = smaller(256, (N <= 8 ? 16384 : 32768) / (N * N * sizeof(C)));
  static constexpr int kThreads = kBlocks * kChunks;
  static constexpr int kResident = (sizeof(C) == 8 ? 384 : 768) / kThreads;  // tiles a multiprocessor must hold
  static constexpr int kSize = N * (kBlocks + 1) * kChunks;
  using Chunk = Vec<C, V>;

  static __device__ __forceinline__ int index(int u, int t, int q) {
    constexpr int banks = 128 / sizeof(Chunk);  // chunks that shared memory delivers at once
    const int row = u * (kBlocks + 1) + t;
    const int turn = kChunks < banks ? row * kChunks / banks : row;
    return row * kChunks + (q ^ (turn % kChunks));
  }
  static __device__ __forceinline__ void read(const Chunk* tile, int u, int t, C (&row)[N]) {
#pragma unroll
    for (int q = 0; q < kChunks; ++q) {
      const Chunk chunk = tile[index(u, t, q)];
#pragma unroll
      for (int e = 0; e < V; ++e) row[q * V + e] = chunk.at[e];
    }
  }
  static __device__ __forceinline__ void write(Chunk* tile, int u, int t, const C (&row)[N]) {
#pragma unroll
    for (int q = 0; q < kChunks; ++q) {
      Chunk chunk;
#pragma unroll
      for (int e = 0; e < V; ++e) chunk.at[e] = row[q * V + e];
      tile[index(u, t, q)] = chunk;
    }
  }
  // Chunk number `item` of the tile in the order in which the coefficients lie in memory.
  static __device__ __forceinline__ void chunk(int item, Order order, int& u, int& t, int& q) {
    q = item % kChunks;
    u = order == Order::blocks ? item / kChunks % N : item / kThreads;
    t = order == Order::blocks ? item / (kChunks * N) : item / kChunks % kBlocks;
  }
};

// Coefficients (u, v), ..., (u, v + K - 1) of one block, multiplied or divided by scale. Those not kept are left alone.
template <int K, typename C, int N>
__device__ __forceinline__ void rescale(const Plan<C, N>& plan, int c, int u, int v, C (&value)[K]) {
  if (plan.scale == nullptr) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int slot = plan.slot(u, v + k);
    if (slot < 0) continue;
    const C scale = plan.scale[c * plan.scale_c + slot];
    value[k] = plan.divide ? value[k] / scale : value[k] * scale;
  }
}

// The same coefficients from memory; those not kept read as 0.
template <int K, typename T, typename C, int N>
__device__ __forceinline__ void load_coefs(const T* block, const Plan<C, N>& plan, int c, int u, int v, C (&value)[K]) {
  const T* first = block + u * plan.coef_u + v * plan.coef_v;
  if (K == Tile<T, N>::V && plan.coef_vectors) {
    load_vector(first, value);
  } else if (plan.whole) {
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = static_cast<C>(first[k * plan.coef_v]);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int slot = plan.slot(u, v + k);
      value[k] = slot < 0 ? C(0) : static_cast<C>(block[slot * plan.coef_v]);
    }
  }
  rescale(plan, c, u, v, value);
}

template <int K, typename T, typename C, int N>
__device__ __forceinline__ void store_coefs(T* block, const Plan<C, N>& plan, int c, int u, int v, C (&value)[K]) {
  rescale(plan, c, u, v, value);
  T* first = block + u * plan.coef_u + v * plan.coef_v;
  if (K == Tile<T, N>::V && plan.coef_vectors) {
    store_vector(first, value);
  } else if (plan.whole) {
#pragma unroll
    for (int k = 0; k < K; ++k) first[k * plan.coef_v] = static_cast<T>(value[k]);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int slot = plan.slot(u, v + k);
      if (slot >= 0) block[slot * plan.coef_v] = static_cast<T>(value[k]);
    }
  }
}

// block_dct and _block_idct_backward.
template <typename T, typename C, int N>
__global__ void __launch_bounds__(Tile<T, N>::kThreads, Tile<T, N>::kResident)
    block_dct_kernel(const T* __restrict__ image, T* __restrict__ coefs, const __grid_constant__ Plan<C, N> plan) {
  using S = Tile<T, N>;
  constexpr int V = S::V;
  __shared__ typename S::Chunk tile[S::kSize];
  const uint32_t first = blockIdx.x * S::kBlocks;

  {  // V neighbouring columns of a block, top to bottom
    const int t = threadIdx.x / S::kChunks, q = threadIdx.x % S::kChunks;
    const Place at = plan.place(first + t);
    C x[V][N] = {};
    if (at.live) {
      const int left = at.j * N + q * V, width = plan.W - left;  // width <= 0: wholly beyond the edge
      const int height = plan.H - at.i * N;
      const T* corner = image + at.b * plan.image_b + at.c * plan.image_c + at.i * N * plan.image_row;
      if (plan.image_vectors && width >= V) {
        const T* row = corner + left;
#pragma unroll
        for (int y = 0; y < N; ++y) {
          C pixels[V];
          load_vector(row, pixels);
          row += y + 1 < height ? plan.image_row : 0;
#pragma unroll
          for (int e = 0; e < V; ++e) x[e][y] = pixels[e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const T* pixel = corner + (left + min(e, width - 1)) * plan.image_col;
#pragma unroll
          for (int y = 0; y < N; ++y) {
            x[e][y] = static_cast<C>(*pixel);
            pixel += y + 1 < height ? plan.image_row : 0;
          }
        }
      }
      if (plan.edge == Edge::zero) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
#pragma unroll
          for (int y = 0; y < N; ++y) x[e][y] = e < width && y < height ? x[e][y] : C(0);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < V; ++e) dct<N>(x[e]);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      typename S::Chunk chunk;
#pragma unroll
      for (int e = 0; e < V; ++e) chunk.at[e] = x[e][u];
      tile[S::index(u, t, q)] = chunk;
    }
  }
  __syncthreads();

  {  // rows; lanes hold neighbouring blocks, so planes are written straight from registers
    const int t = threadIdx.x % S::kBlocks;
    const Place at = plan.place(first + t);
#pragma unroll
    for (int m = 0; m < V; ++m) {
      const int u = threadIdx.x / S::kBlocks + m * S::kChunks;
      C row[N];
      S::read(tile, u, t, row);
      dct<N>(row);
      if (u == 0) row[0] += plan.dc;
      if (plan.order != Order::planes) {
        S::write(tile, u, t, row);
      } else if (at.live) {
        store_coefs(coefs + plan.coef_block(at), plan, at.c, u, 0, row);
      }
    }
  }
  if (plan.order == Order::planes) return;
  __syncthreads();

  for (int m = 0; m < N; ++m) {
    int u, t, q;
    S::chunk(threadIdx.x + m * S::kThreads, plan.order, u, t, q);
    const Place at = plan.place(first + t);
    typename S::Chunk chunk = tile[S::index(u, t, q)];
    if (at.live) store_coefs(coefs + plan.coef_block(at), plan, at.c, u, q * V, chunk.at);
  }
}

// block_idct and _block_dct_backward.
template <typename T, typename C, int N>
__global__ void __launch_bounds__(Tile<T, N>::kThreads, Tile<T, N>::kResident)
    block_idct_kernel(const T* __restrict__ coefs, T* __restrict__ image, const __grid_constant__ Plan<C, N> plan) {
  using S = Tile<T, N>;
  constexpr int V = S::V;
  __shared__ typename S::Chunk tile[S::kSize];
  const uint32_t first = blockIdx.x * S::kBlocks;

  if (plan.order != Order::planes) {
    for (int m = 0; m < N; ++m) {
      int u, t, q;
      S::chunk(threadIdx.x + m * S::kThreads, plan.order, u, t, q);
      const Place at = plan.place(first + t);
      typename S::Chunk chunk = {};
      if (at.live) load_coefs(coefs + plan.coef_block(at), plan, at.c, u, q * V, chunk.at);
      tile[S::index(u, t, q)] = chunk;
    }
    __syncthreads();
  }

  {  // rows; planes are read straight into registers
    const int t = threadIdx.x % S::kBlocks;
    const Place at = plan.place(first + t);
#pragma unroll
    for (int m = 0; m < V; ++m) {
      const int u = threadIdx.x / S::kBlocks + m * S::kChunks;
      C row[N] = {};
      if (plan.order != Order::planes) {
        S::read(tile, u, t, row);
      } else if (at.live) {
        load_coefs(coefs + plan.coef_block(at), plan, at.c, u, 0, row);
      }
      if (u == 0) row[0] += plan.dc;
      idct<N>(row);
      if (plan.edge == Edge::fold) fold(row, plan.W - at.j * N);
      S::write(tile, u, t, row);
    }
  }
  __syncthreads();

  {  // V neighbouring columns of a block
    const int t = threadIdx.x / S::kChunks, q = threadIdx.x % S::kChunks;
    const Place at = plan.place(first + t);
    C x[V][N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const typename S::Chunk chunk = tile[S::index(u, t, q)];
#pragma unroll
      for (int e = 0; e < V; ++e) x[e][u] = chunk.at[e];
    }
    const int left = at.j * N + q * V, width = plan.W - left;
    const int height = plan.H - at.i * N;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      idct<N>(x[e]);
      if (plan.edge == Edge::fold) fold(x[e], height);
    }
    if (!at.live) return;
    T* row = image + at.b * plan.image_b + at.c * plan.image_c + at.i * N * plan.image_row + left * plan.image_col;
#pragma unroll
    for (int y = 0; y < N; ++y, row += plan.image_row) {
      if (y >= height) break;
      C pixels[V];
#pragma unroll
      for (int e = 0; e < V; ++e) pixels[e] = x[e][y];
      if (plan.image_vectors && width >= V) {
        store_vector(row, pixels);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (e < width) row[e * plan.image_col] = static_cast<T>(pixels[e]);
        }
      }
    }
  }
}

// ---- from tensors to launches ----

struct Request {
  Geometry geometry;
  const std::optional<Tensor>& scale;
  bool forward, divide;
  Edge edge;
  double shift;  // added to every pixel of a block
};

template <typename T, int N>
void run_kernel(const Request& request, const Tensor& image, const Tensor& coefs) {
  using S = Tile<T, N>;
  using C = typename S::C;
  const Geometry& g = request.geometry;
  const int64_t per_image = g.C * g.rows * g.cols, most = int64_t{1} << 31;
  if (g.B * per_image == 0) return;
  require(per_image < most && g.H < most && g.W < most, g.op, ": one image must hold fewer than 2**31 blocks, got ", per_image,
          "; split it along its channels");

  Plan<C, N> plan{};
  plan.channels = Divider(g.C), plan.rows = Divider(g.rows), plan.cols = Divider(g.cols);
  plan.channels_inner = g.image_c < g.image_col;
  plan.H = g.H, plan.W = g.W;
  plan.image_b = g.image_b, plan.image_c = g.image_c, plan.image_row = g.image_row, plan.image_col = g.image_col;
  plan.coef_b = g.coef_b, plan.coef_c = g.coef_c, plan.coef_i = g.coef_i, plan.coef_j = g.coef_j;
  const bool interleaved = g.layout == Layout::interleaved;
  plan.coef_u = interleaved ? g.coef_u : N * g.coef_f;
  plan.coef_v = interleaved ? g.coef_v : g.coef_f;
  if (request.scale) plan.scale = static_cast<const C*>(request.scale->data_ptr());
  plan.scale_c = request.scale && request.scale->size(0) > 1 ? g.F : 0;
  plan.divide = request.divide;
  plan.dc = static_cast<C>(N * request.shift);
  plan.edge = request.edge;
  plan.order = interleaved ? Order::rows : g.coef_f <= g.coef_j ? Order::blocks : Order::planes;
  plan.whole = true;
  for (int f = 0; f < N * N; ++f) {
    plan.slots[f] = g.slots[f];
    plan.whole = plan.whole && g.slots[f] == f;
  }
  const auto aligned = [](const Tensor& x, std::initializer_list<int64_t> strides) {
    bool ok = reinterpret_cast<uintptr_t>(x.data_ptr()) % sizeof(Vec<T, S::V>) == 0;
    for (int64_t stride : strides) ok = ok && stride % S::V == 0;
    return ok;
  };
  plan.image_vectors = g.image_col == 1 && aligned(image, {g.image_b, g.image_c, g.image_row});
  plan.coef_vectors = plan.order != Order::planes && plan.whole && plan.coef_v == 1 &&
                      aligned(coefs, {g.coef_b, g.coef_c, g.coef_i, g.coef_j, plan.coef_u});

  // Blocks are counted in 31 bits, so a batch beyond that goes in several launches.
  const int64_t at_once = (most - 1) / per_image;
  for (int64_t b = 0; b < g.B; b += at_once) {
    plan.blocks = static_cast<uint32_t>(per_image * std::min(at_once, g.B - b));
    const uint32_t grid = (plan.blocks + S::kBlocks - 1) / S::kBlocks;
    T* pixels = static_cast<T*>(image.data_ptr()) + b * g.image_b;
    T* block = static_cast<T*>(coefs.data_ptr()) + b * g.coef_b;
    if (request.forward) {
      launch(block_dct_kernel<T, C, N>, grid, S::kThreads, image, pixels, block, plan);
    } else {
      launch(block_idct_kernel<T, C, N>, grid, S::kThreads, image, block, pixels, plan);
    }
  }
}

template <typename T>
void run_typed(const Request& request, const Tensor& image, const Tensor& coefs) {
  switch (request.geometry.N) {
    case 2:
      return run_kernel<T, 2>(request, image, coefs);
    case 4:
      return run_kernel<T, 4>(request, image, coefs);
    case 8:
      return run_kernel<T, 8>(request, image, coefs);
    case 16:
      return run_kernel<T, 16>(request, image, coefs);
    default:
      return run_kernel<T, 32>(request, image, coefs);
  }
}

void run(Request request, const Tensor& image, const Tensor& coefs) {
  set_image(request.geometry, image);
  set_coefs(request.geometry, coefs);
  require_scale(request.geometry, request.scale, image);
  switch (image.scalar_type()) {
    case ScalarType::Half:
      return run_typed<torch::headeronly::Half>(request, image, coefs);
    case ScalarType::BFloat16:
      return run_typed<torch::headeronly::BFloat16>(request, image, coefs);
    case ScalarType::Double:
      return run_typed<double>(request, image, coefs);
    default:
      return run_typed<float>(request, image, coefs);
  }
}

// ---- the ops; schemas in ops.cpp ----

using Size = std::optional<std::vector<int64_t>>;
using Scale = std::optional<Tensor>;

Tensor block_dct(const Tensor& x, int64_t block_size, std::string layout, Freqs freqs, Scale scale, double shift) {
  const Geometry g = from_image("block_dct", "x", x, block_size, layout, freqs);
  Tensor y = new_result(x, coef_sizes(g), g.op);
  run({g, scale, true, false, Edge::replicate, shift}, x, y);
  return y;
}

void block_dct_out(const Tensor& x, int64_t block_size, std::string layout, Freqs freqs, Scale scale, double shift,
                   Tensor out) {
  const Geometry g = from_image("block_dct", "x", x, block_size, layout, freqs);
  require_out(g, out, x, coef_sizes(g));
  run({g, scale, true, false, Edge::replicate, shift}, x, out);
}

Tensor block_idct(const Tensor& y, int64_t block_size, std::string layout, Freqs freqs, Scale scale, double shift, Size size) {
  const Geometry g = from_coefs("block_idct", "y", y, block_size, layout, freqs, size);
  Tensor x = new_result(y, image_sizes(g), g.op);
  run({g, scale, false, true, Edge::crop, -shift}, x, y);
  return x;
}

void block_idct_out(const Tensor& y, int64_t block_size, std::string layout, Freqs freqs, Scale scale, double shift, Size size,
                    Tensor out) {
  const Geometry g = from_coefs("block_idct", "y", y, block_size, layout, freqs, size);
  require_out(g, out, y, image_sizes(g));
  run({g, scale, false, true, Edge::crop, -shift}, out, y);
}

Tensor block_dct_backward(const Tensor& grad, int64_t block_size, std::string layout, Freqs freqs, Scale scale,
                          std::vector<int64_t> size) {
  const Geometry g = from_coefs("_block_dct_backward", "grad", grad, block_size, layout, freqs, size);
  Tensor x = new_result(grad, image_sizes(g), g.op);
  run({g, scale, false, false, Edge::fold, 0}, x, grad);
  return x;
}

Tensor block_idct_backward(const Tensor& grad, int64_t block_size, std::string layout, Freqs freqs, Scale scale) {
  const Geometry g = from_image("_block_idct_backward", "grad", grad, block_size, layout, freqs);
  Tensor y = new_result(grad, coef_sizes(g), g.op);
  run({g, scale, true, true, Edge::zero, 0}, grad, y);
  return y;
}

}  // namespace
}  // namespace fourfold::blockdct

STABLE_TORCH_LIBRARY_IMPL(fourfold, CUDA, m) {
  using namespace fourfold::blockdct;
  m.impl("block_dct", TORCH_BOX(&block_dct));
  m.impl("block_idct", TORCH_BOX(&block_idct));
  m.impl("_block_dct_backward", TORCH_BOX(&block_dct_backward));
  m.impl("_block_idct_backward", TORCH_BOX(&block_idct_backward));
  m.impl("_block_dct_out", TORCH_BOX(&block_dct_out));
  m.impl("_block_idct_out", TORCH_BOX(&block_idct_out));
}
