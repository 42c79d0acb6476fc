// Calls of torch's own operators, with their types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

namespace fourfold::aten {

using torch::stable::Tensor;

template <typename... Arguments>
void call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  // What comes back is `out` again, owned by the stack.
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = a @ b
inline void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) { call("aten::mm", "out", a, b, out); }

// out = x @ weight.T + bias
inline void linear_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  call("aten::linear", "out", x, weight, bias, out);
}

}  // namespace fourfold::aten
