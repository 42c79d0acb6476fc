// Argument checks of the ops. Python checks first and raises the public errors; these keep every kernel inside its buffers when
// an op is called directly through torch.ops.fourfold.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/element.h"

namespace fourfold {

using torch::headeronly::ScalarType;

// Throws what reaches Python as a ValueError, with nothing but our own words in it (STD_TORCH_CHECK would add file and line).
template <typename... Words>
void require(bool ok, const Words&... words) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

inline std::string shape_of(const torch::stable::Tensor& x) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < x.dim(); ++d) text << (d ? ", " : "") << x.size(d);
  text << (x.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline void require_same_device(const char* op, const char* name, const torch::stable::Tensor& tensor,
                                const torch::stable::Tensor& x) {
  require(tensor.is_cuda() == x.is_cuda() && tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index(),
          op, ": ", name, " must be on the input's device; move it there with .to(x.device)");
}

inline void require_floating(const char* op, const char* name, const torch::stable::Tensor& x) {
  const ScalarType t = x.scalar_type();
  require(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16, op, ": ",
          name, " must be float16, bfloat16, float32 or float64");
}

inline ScalarType accumulate_type(const torch::stable::Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Element element_of(const torch::stable::Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Double:
      return kDouble;
    default:
      return kFloat;
  }
}

}  // namespace fourfold
