// Runs CUDA kernels on the CPU, so that their indexing, edges and barriers are tested where there is no GPU. Each
// thread of a block is a fibre that runs up to the next __syncthreads; every second block runs its threads last to
// first, so that a missing barrier gives a wrong result in one order or the other.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace cuda_on_host {
struct Index {
  uint32_t x = 0;
};
}  // namespace cuda_on_host

inline cuda_on_host::Index threadIdx, blockIdx;
using std::min;

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

namespace cuda_on_host {

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

inline constexpr size_t kStack = 64 << 10;
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline uint32_t running;
inline void (*body)(void*);
inline void* body_args;

inline void enter() {
  body(body_args);
  fibres[running].done = true;
}

inline void run_block(uint32_t threads, bool reversed) {
  fibres.resize(std::max<size_t>(fibres.size(), threads));
  for (uint32_t t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &scheduler;
    fibre.done = false;
    makecontext(&fibre.context, enter, 0);
  }
  for (uint32_t finished = 0; finished != threads;) {  // one barrier to the next
    finished = 0;
    for (uint32_t i = 0; i < threads; ++i) {
      running = reversed ? threads - 1 - i : i;
      threadIdx.x = running;
      swapcontext(&scheduler, &fibres[running].context);
      finished += fibres[running].done;
    }
    if (finished != 0 && finished != threads) throw std::logic_error("a barrier was reached by a part of the block");
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { swapcontext(&cuda_on_host::fibres[cuda_on_host::running].context, &cuda_on_host::scheduler); }

namespace fourfold {

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t threads, const torch::stable::Tensor&, const Args&... args) {
  if (grid == 0) throw std::logic_error("a launch with an empty grid");
  auto call = [&] { kernel(args...); };
  cuda_on_host::body = [](void* body) { (*static_cast<decltype(call)*>(body))(); };
  cuda_on_host::body_args = &call;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) cuda_on_host::run_block(threads, blockIdx.x % 2 == 1);
}

}  // namespace fourfold
