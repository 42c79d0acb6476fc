// The CUDA implementations, host code included, as CPU ops torch.ops.fourfold_on_host.*. See cuda_on_host.h.
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(fourfold_on_host, m, C10_UID)
#define STABLE_TORCH_LIBRARY_IMPL(ns, device, m) _STABLE_TORCH_LIBRARY_IMPL(fourfold_on_host, CPU, m, C10_UID)

#include "blockdct/cuda.cu"
#include "blockdct/rgb.cu"
#include "maskmm/cuda.cu"
#include "ops.cpp"

extern "C" uint32_t quotient(uint32_t n, uint32_t divisor) {
  uint32_t remainder;
  const uint32_t q = fourfold::Divider(divisor).split(n, remainder);
  return remainder == n - q * divisor ? q : ~0u;
}
