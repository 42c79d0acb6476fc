// What the CUDA files of all families share: vectors of elements, division by a number known at launch, and the launch
// itself.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#else
#include "cuda_on_host.h"  // tests/gpu: runs the same kernels on the CPU
#endif

namespace fourfold {

// V elements loaded or stored by one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vec {
  T at[V];
};

// The type that elements are computed in.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// V neighbouring elements, converted; `from` or `to` is aligned to all of them.
template <typename T, typename C, int V>
__device__ __forceinline__ void load_vector(const T* from, C (&to)[V]) {
  const Vec<T, V> vector = *reinterpret_cast<const Vec<T, V>*>(from);
#pragma unroll
  for (int e = 0; e < V; ++e) to[e] = static_cast<C>(vector.at[e]);
}

template <typename T, typename C, int V>
__device__ __forceinline__ void store_vector(T* to, const C (&from)[V]) {
  Vec<T, V> vector;
#pragma unroll
  for (int e = 0; e < V; ++e) vector.at[e] = static_cast<T>(from[e]);
  *reinterpret_cast<Vec<T, V>*>(to) = vector;
}

// Quotient and remainder of 31-bit numbers by multiplication: a division takes some 20 instructions on a GPU, this
// takes 3.
struct Divider {
  uint32_t divisor = 1, magic = 0, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ uint32_t split(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(n, magic) + n) >> shift;
    remainder = n - quotient * divisor;
    return quotient;
  }
};

#ifdef __CUDACC__
// Enqueues kernel on the current stream of the device that holds `like`. args are those of the kernel.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t threads, const torch::stable::Tensor& like,
            const Args&... args) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

}  // namespace fourfold
