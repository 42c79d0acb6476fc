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
  // scale is [3, F], for Y, Cb and Cr; float64 if rgb or dtype is, else float32.
  m.def(
      "rgb_to_dct(Tensor rgb, str subsampling, str layout, int[]? freqs, Tensor? scale, ScalarType dtype) -> "
      "(Tensor, Tensor)");

  // coordconv: a convolution's plan is taps [k, out] and valid [classes, k] in the map's type, and classes [out] in int32, of
  // all spatial axes one after the other; out_size, kernel, class_count and channels (the axis's coordinate channel) go by
  // axis.
  m.def(
      "_coord_tables(Tensor coord_weight, Tensor taps, Tensor valid, int[] out_size, int[] class_count, int[] channels, "
      "bool channels_last) -> Tensor");
  m.def(
      "_coord_tables_backward(Tensor map_grad, Tensor taps, Tensor valid, Tensor classes, int[] kernel, int[] class_count, "
      "int[] channels, int coord_channels) -> (Tensor, Tensor)");
  m.def(
      "_add_map_(Tensor(a!) y, Tensor tables, Tensor classes, int[] class_count, Tensor? dense, str activation, "
      "Tensor(b!)? activated) -> ()");
  m.def("_batch_sum(Tensor grad, Tensor? relu_output) -> (Tensor, Tensor)");
}
