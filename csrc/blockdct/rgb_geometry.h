// What one call of rgb_to_dct works on, checked. Shared by rgb_cpu.cpp and rgb.cu.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "blockdct/geometry.h"

namespace fourfold::rgbdct {

using blockdct::Freqs;
using blockdct::Geometry;
using torch::stable::Tensor;

struct Call {
  const char* op = "rgb_to_dct";
  Tensor rgb;                 // planar or interleaved, in the type that is computed from
  int64_t v, h;               // pixels down and across that share a chroma sample
  Geometry luma, chroma;      // strides of coefficients as set_coefs leaves them once y and cbcr are there
  ScalarType work;            // accumulation type
  ScalarType dtype;           // of the results
  int64_t row, col, channel;  // strides of a sample
};

inline bool is_readable(const Tensor& rgb) {
  return rgb.stride(3) == 1 || rgb.size(3) == 1 || (rgb.stride(3) == 3 && rgb.stride(1) == 1);
}

inline Call describe_call(const Tensor& rgb, const std::string& subsampling, const std::string& layout, const Freqs& freqs,
                          const std::optional<Tensor>& scale, ScalarType dtype) {
  Call call{};
  call.rgb = rgb;
  const char* op = call.op;
  if (rgb.scalar_type() != ScalarType::Byte) require_floating(op, "rgb", rgb);
  require(rgb.dim() == 4 && rgb.size(1) == 3, op, ": rgb must be [B, 3, H, W], got ", shape_of(rgb));
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      op, ": dtype must be float16, bfloat16, float32 or float64");
  require(subsampling == "4:4:4" || subsampling == "4:2:2" || subsampling == "4:2:0", op,
          ": subsampling must be '4:4:4', '4:2:2' or '4:2:0', got '", subsampling, "'");
  require(layout != "interleaved", op, ": layout must be 'planar' or 'blocks', got 'interleaved'");
  call.v = subsampling == "4:2:0" ? 2 : 1;
  call.h = subsampling == "4:4:4" ? 1 : 2;
  call.dtype = dtype;
  const int64_t B = rgb.size(0), H = rgb.size(2), W = rgb.size(3);
  call.luma = blockdct::describe(op, 8, layout, freqs);
  call.chroma = call.luma;
  blockdct::set_image_size(call.luma, B, 1, H, W);
  blockdct::set_image_size(call.chroma, B, 2, (H + call.v - 1) / call.v, (W + call.h - 1) / call.h);
  const bool is_double = rgb.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
  call.work = is_double ? ScalarType::Double : ScalarType::Float;
  if (scale) {
    require_same_device(op, "scale", *scale, rgb);
    require(scale->scalar_type() == call.work && scale->is_contiguous() && scale->dim() == 2 && scale->size(0) == 3 &&
                scale->size(1) == call.luma.F,
            op, ": scale must be contiguous [3, ", call.luma.F, "] in float32 (float64 if rgb or dtype is), got ",
            shape_of(*scale));
  }
  if (!is_readable(call.rgb)) call.rgb = torch::stable::contiguous(call.rgb);
  if (is_double && rgb.scalar_type() != ScalarType::Double) call.rgb = torch::stable::to(call.rgb, ScalarType::Double);
  call.channel = call.rgb.stride(1), call.row = call.rgb.stride(2);
  call.col = call.rgb.size(3) == 1 ? 1 : call.rgb.stride(3);
  return call;
}

// Uninitialised results, contiguous whatever the format of rgb: their channels are frequencies. In the accumulation type where
// that is float64, since float64 buffers are stored as such.
inline std::tuple<Tensor, Tensor> new_results(Call& call) {
  const ScalarType stored = call.work == ScalarType::Double ? call.work : call.dtype;
  const auto make = [&](Geometry& g) {
    const Tensor coefs = blockdct::new_contiguous(call.rgb, blockdct::coef_sizes(g), stored, call.op);
    blockdct::set_coefs(g, coefs);
    return coefs;
  };
  const Tensor y = make(call.luma), cbcr = make(call.chroma);
  return {y, cbcr};
}

inline Tensor in_dtype(const Tensor& coefs, ScalarType dtype) {
  return coefs.scalar_type() == dtype ? coefs : torch::stable::to(coefs, dtype);
}

}  // namespace fourfold::rgbdct
