// Every op of fourfold: the table of contents. Implementations register per device in <family>/cpu.cpp and <family>/cuda.cu,
// or for Triton in python/fourfold/_load.py; fakes and gradients in python/fourfold/ops. Names starting with _ are internal.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fourfold, m) {
  // blockdct: scale is [C, F] or [1, F] in float32 (float64 for float64 inputs); freqs are row-major frequency indices.
  m.def("block_dct(Tensor x, int block_size, str layout, int[]? freqs, Tensor? scale, float shift) -> Tensor");
  m.def(
      "block_idct(Tensor y, int block_size, str layout, int[]? freqs, Tensor? scale, float shift, SymInt[]? size) -> "
      "Tensor");
  m.def(
      "_block_dct_backward(Tensor grad, int block_size, str layout, int[]? freqs, Tensor? scale, SymInt[] size) -> "
      "Tensor");
  m.def("_block_idct_backward(Tensor grad, int block_size, str layout, int[]? freqs, Tensor? scale) -> Tensor");
  m.def(
      "_block_dct_out(Tensor x, int block_size, str layout, int[]? freqs, Tensor? scale, float shift, Tensor(a!) out) -> "
      "()");
  m.def(
      "_block_idct_out(Tensor y, int block_size, str layout, int[]? freqs, Tensor? scale, float shift, SymInt[]? size, "
      "Tensor(a!) out) -> ()");
  m.def(
      "dct_normalize(Tensor coefs, Tensor qtable, Tensor? mean, Tensor? std, int[]? freqs, str layout, ScalarType dtype) "
      "-> Tensor");
}
