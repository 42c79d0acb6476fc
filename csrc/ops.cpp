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
  // dct_normalize of images whose planes lie apart, image by image; those numbered in mirrored are mirrored left to right.
  m.def(
      "_normalize_grids(Tensor[] grids, Tensor qtable, Tensor? mean, Tensor? std, int planes, int[] mirrored, int[]? freqs, "
      "ScalarType dtype) -> Tensor");
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

  // maskmm: bits are uint8 [N, 8 * ceil(K / 64)], row-major, bit k of a row in bit k % 8 of byte k / 8, pad bits zero; masks
  // are such bits [T, ..]. A weight, scores or mask [N, ...] counts as N rows of K. seed: int64, one element, all 64 bits of
  // it; offset is 64 bits too.
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor bits, SymInt k) -> Tensor");
  m.def("bernoulli_mask(Tensor scores, Tensor seed, int offset) -> Tensor");
  m.def("topk_mask(Tensor scores, float density, bool abs) -> Tensor");
  m.def("threshold_mask(Tensor scores, float threshold) -> Tensor");
  // The effective weight is weight where the bit is set, else 0, times the sign of scores where signed, times n / ones where
  // rescale is "dwr" or "dwr_grad". slope is the factor of the straight-through gradient: "sigmoid", "sign" or "one".
  m.def("_apply_mask(Tensor weight, Tensor bits, Tensor? scores, bool signed, str rescale, ScalarType dtype) -> Tensor");
  // From the gradient of the effective weight those of weight and scores, as wanted; the others are empty.
  m.def(
      "_mask_gradients(Tensor grad, Tensor weight, Tensor bits, Tensor? scores, str slope, bool signed, str rescale, "
      "bool[2] wanted) -> (Tensor, Tensor)");
  m.def(
      "_masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor? scores, str slope, bool signed, str "
      "rescale) -> Tensor");
  // The gradients of x, weight and scores, as wanted; the others are empty.
  m.def(
      "_masked_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor? scores, str slope, bool signed, "
      "str rescale, bool[3] wanted) -> (Tensor, Tensor, Tensor)");
  // A sparse weight is values [nnz], row-major, with bits; starts [N * S + 1] in int64 is where each piece of `slab` columns
  // of each row begins in values, S = ceil(K / slab); columns [nnz] holds the low 16 bits of each value's column.
  m.def("_mask_starts(Tensor bits, SymInt k, SymInt slab) -> Tensor");
  m.def("_mask_columns(Tensor bits, SymInt nnz) -> Tensor");
  m.def("_gather_mask(Tensor weight, Tensor bits, SymInt nnz) -> Tensor");
  m.def("_scatter_mask(Tensor values, Tensor bits, SymInt k) -> Tensor");
  m.def(
      "_sparse_linear(Tensor x, Tensor values, Tensor bits, Tensor starts, Tensor? columns, Tensor? bias, str format) -> "
      "Tensor");
  m.def(
      "_sparse_linear_transposed(Tensor grad, Tensor values, Tensor bits, Tensor starts, Tensor? columns, SymInt k, str "
      "format) -> Tensor");
  m.def("sddmm(Tensor a, Tensor b, Tensor bits, SymInt nnz) -> Tensor");
  // Superposed masks: sums over t of alpha[t] * mask t, and the gradients of that and of each sample's own mask.
  m.def("_superpose(Tensor weight, Tensor masks, Tensor alpha) -> Tensor");
  m.def("_masked_dots(Tensor a, Tensor b, Tensor masks) -> Tensor");
  m.def("task_linear(Tensor x, Tensor weight, Tensor masks, Tensor task, Tensor? bias) -> Tensor");
  m.def("_task_linear_transposed(Tensor grad, Tensor weight, Tensor masks, Tensor task) -> Tensor");
  m.def("_task_outer(Tensor grad, Tensor x, Tensor masks, Tensor task) -> Tensor");

  // cca: x [N, C, S] with any strides is N * S samples of C features; sample n * S + s. Statistics are float64.
  m.def("_pack_samples(Tensor x, Tensor pivot, int first, Tensor(a!) panel, Tensor(b!) sums, Tensor(c!) norms) -> ()");
  m.def("_add_wide_(Tensor(a!) total, Tensor part) -> ()");
  m.def("_count_nonfinite(Tensor x) -> Tensor");
  m.def("_gram_(Tensor x, Tensor y, Tensor(a!) total) -> ()");
  m.def("_image_spectra(Tensor x, Tensor pivot, Tensor(a!) spectra) -> ()");
  m.def("_spectra_gram_(Tensor a, Tensor b, Tensor(a!) total, Tensor(b!)? sums) -> ()");
}
