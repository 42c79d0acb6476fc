// Runs CUDA kernels on the CPU, so that their indexing, edges and barriers are tested where there is no GPU. Each
// thread of a block is a fibre that runs up to the next barrier, __syncthreads or an exchange within its warp; every second
// block runs its threads last to first, so that a missing barrier gives a wrong result in one order or the other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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

inline cuda_on_host::Index threadIdx, blockIdx, gridDim;
using std::min;

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

namespace cuda_on_host {

constexpr uint32_t kWarp = 32;

enum class Waits { no, for_warp, for_block };

struct Fibre {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on: a jump asks the kernel nothing, unlike swapcontext
  bool begun;
  std::unique_ptr<char[]> stack;
  bool done;
  Waits waits;
  uint64_t sent;  // to the other lanes
};

inline constexpr size_t kStack = 64 << 10;
inline std::vector<Fibre> fibres;
inline jmp_buf scheduler;
inline uint32_t running;
inline void (*body)(void*);
inline void* body_args;

inline void enter() {
  body(body_args);
  fibres[running].done = true;
  _longjmp(scheduler, 1);
}

inline void wait(Waits what) {
  Fibre& fibre = fibres[running];
  fibre.waits = what;
  if (_setjmp(fibre.place) == 0) _longjmp(scheduler, 1);
}

// Runs a fibre up to its next barrier, or its end.
__attribute__((noinline)) inline void resume(Fibre& fibre) {
  if (_setjmp(scheduler) != 0) return;
  if (fibre.begun) _longjmp(fibre.place, 1);
  fibre.begun = true;
  setcontext(&fibre.context);
}

// Lets threads [first, end) go on if all of them have come to that barrier.
inline bool released(uint32_t first, uint32_t end, Waits barrier) {
  uint32_t there = 0;
  for (uint32_t t = first; t < end; ++t) there += !fibres[t].done && fibres[t].waits == barrier;
  if (there != end - first) return false;
  for (uint32_t t = first; t < end; ++t) fibres[t].waits = Waits::no;
  return true;
}

inline void run_block(uint32_t threads, bool reversed) {
  fibres.resize(std::max<size_t>(fibres.size(), threads));
  for (uint32_t t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    if (!fibre.stack) fibre.stack.reset(new char[kStack]);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = nullptr;
    fibre.done = fibre.begun = false;
    fibre.waits = Waits::no;
    makecontext(&fibre.context, enter, 0);
  }
  const uint32_t warps = (threads + kWarp - 1) / kWarp;
  while (true) {  // one barrier of the block to the next
    uint32_t finished = 0;
    for (uint32_t w = 0; w < warps; ++w) {
      const uint32_t first = (reversed ? warps - 1 - w : w) * kWarp, end = std::min(first + kWarp, threads);
      do {  // a warp runs as far ahead as it can
        for (uint32_t i = 0; i < end - first; ++i) {
          running = reversed ? end - 1 - i : first + i;
          Fibre& fibre = fibres[running];
          threadIdx.x = running;
          if (!fibre.done && fibre.waits == Waits::no) resume(fibre);
        }
      } while (released(first, end, Waits::for_warp));
      for (uint32_t t = first; t < end; ++t) finished += fibres[t].done;
    }
    if (finished == threads) return;
    if (!released(0, threads, Waits::for_block)) throw std::logic_error("a barrier was reached by a part of its threads");
  }
}

// What lane `from` of this warp sends while this one sends `value`; all lanes take part.
template <typename T>
T exchange(T value, uint32_t from) {
  static_assert(sizeof(T) <= 8, "a lane sends at most 64 bits");
  const uint32_t me = running;
  std::memcpy(&fibres[me].sent, &value, sizeof(T));
  wait(Waits::for_warp);
  T received;
  std::memcpy(&received, &fibres[me / kWarp * kWarp + from % kWarp].sent, sizeof(T));
  wait(Waits::for_warp);  // before anyone sends again
  return received;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Waits::for_block); }

template <typename T>
T __shfl_sync(uint32_t, T value, uint32_t lane) {
  return cuda_on_host::exchange(value, lane);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, uint32_t lanes) {
  return cuda_on_host::exchange(value, cuda_on_host::running % cuda_on_host::kWarp ^ lanes);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, uint32_t by) {
  const uint32_t lane = cuda_on_host::running % cuda_on_host::kWarp;
  return cuda_on_host::exchange(value, lane < by ? lane : lane - by);
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  uint32_t votes = 0;
  const uint32_t me = cuda_on_host::running, first = me / cuda_on_host::kWarp * cuda_on_host::kWarp;
  cuda_on_host::fibres[me].sent = vote;
  cuda_on_host::wait(cuda_on_host::Waits::for_warp);
  for (uint32_t lane = 0; lane < cuda_on_host::kWarp; ++lane) {
    votes |= static_cast<uint32_t>(cuda_on_host::fibres[first + lane].sent & 1) << lane;
  }
  cuda_on_host::wait(cuda_on_host::Waits::for_warp);
  return votes;
}

namespace fourfold {

template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), uint32_t grid, uint32_t threads, const torch::stable::Tensor&, const Args&... args) {
  if (grid == 0) throw std::logic_error("a launch with an empty grid");
  auto call = [&] { kernel(args...); };
  cuda_on_host::body = [](void* body) { (*static_cast<decltype(call)*>(body))(); };
  cuda_on_host::body_args = &call;
  gridDim.x = grid;
  for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) cuda_on_host::run_block(threads, blockIdx.x % 2 == 1);
}

}  // namespace fourfold
