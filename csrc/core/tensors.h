// What the operators of every device do with their tensors before a kernel sees them: dtype, memory format, and the
// checks that keep a wrong call from reading foreign memory. dsc_ops/functional.py checks with better messages; these
// are for whoever calls torch.ops.dsc_ops directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "scalar.h"
#include "threshold.h"

namespace dsc {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls f(T()) for the element type T of a tensor.
template <typename F>
auto visit_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(bfloat16());
    case ScalarType::Half:
      return f(float16());
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "dsc_ops: an operator takes float32, float64, bfloat16 or float16");
      return f(float());
  }
}

inline std::vector<int64_t> sizes(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

// channels_last for a 4-D tensor that is exactly that and not contiguous too: the one other order in which elementwise
// work is done as it stands. Contiguous for every other tensor.
inline MemoryFormat memory_format(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) == 1) continue;
    if (tensor.stride(axis) != expected) return MemoryFormat::Contiguous;
    expected *= tensor.size(axis);
  }
  return MemoryFormat::ChannelsLast;
}

inline void check_like(const Tensor& model, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type(), "dsc_ops: ", name,
                  " has another dtype than the first argument");
  STD_TORCH_CHECK(tensor.device() == model.device(), "dsc_ops: ", name,
                  " is on another device than the first argument");
}

inline void check_shape(const Tensor& model, const Tensor& tensor, const std::vector<int64_t>& shape,
                        const char* name) {
  check_like(model, tensor, name);
  STD_TORCH_CHECK(sizes(tensor) == shape, "dsc_ops: ", name, " has the wrong shape");
}

// theta 0-d, or one value for each of `channels`; channels below 0 stand for a tensor without any.
inline void check_theta(const Tensor& model, const Tensor& theta, int64_t channels) {
  check_like(model, theta, "theta");
  STD_TORCH_CHECK(theta.dim() == 0 || (channels >= 0 && theta.dim() == 1 && theta.size(0) == channels),
                  "dsc_ops: theta must be 0-d or have one value per channel");
}

inline int64_t channels_of(const Tensor& u) { return u.dim() >= 2 ? u.size(1) : -1; }

inline void check_soft_threshold(const Tensor& u, const Tensor& theta, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& residual) {
  check_theta(u, theta, channels_of(u));
  if (bias) check_shape(u, *bias, {channels_of(u)}, "bias");
  if (residual) check_shape(u, *residual, sizes(u), "residual");
}

inline void check_threshold_backward(const Tensor& grad, const Tensor& x, const Tensor& theta) {
  check_theta(x, theta, channels_of(x));
  check_shape(x, grad, sizes(x), "grad");
}

inline void check_l1_norm_backward(const Tensor& grad, const Tensor& x) {
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad.dim() == 0 && grad.device() == x.device() && grad.scalar_type() == wide,
                  "dsc_ops: the gradient of l1_norm must be 0-d, on x's device, and float32 (float64 for float64)");
}

inline Activation parse_activation(const std::string& name) {
  const char* names[] = {"relu", "leaky_relu", "elu", "silu", "mish", "gelu"};
  for (int i = 0; i < 6; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "dsc_ops: activation must be relu, leaky_relu, elu, silu, mish or gelu, not ", name);
}

}  // namespace dsc
