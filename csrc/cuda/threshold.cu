// soft_threshold and shrink with their backwards, from tensors to kernels (threshold_kernels.cuh).
//
// A tensor is brought to one of two memory formats, its own where it has one of them, and every other tensor to the
// same.
#include <optional>
#include <string>
#include <tuple>

#include "launch.h"
#include "threshold_kernels.cuh"

namespace dsc::cuda {
namespace {

// Without channels a tensor is one run of memory. `aligned`: all tensors of its size begin at multiples of 16 bytes.
template <typename T>
ChannelPlan plan_of(const Tensor& u, MemoryFormat format, bool has_channels, bool aligned) {
  int64_t outer = 1, channels = 1, inner = u.numel();
  if (has_channels && format == MemoryFormat::ChannelsLast) {
    channels = u.size(1);
    outer = inner / channels;
    inner = 1;
  } else if (has_channels) {
    outer = u.size(0);
    channels = u.size(1);
    inner = 1;
    for (int64_t d = 2; d < u.dim(); ++d) inner *= u.size(d);
  }
  if (!aligned || inner % vector_elements<T> != 0) return channel_plan(outer, channels, inner);
  ChannelPlan plan = channel_plan(outer, channels, inner / vector_elements<T>);
  plan.together = vector_elements<T>;
  return plan;
}

int64_t theta_stride(const Tensor& theta) { return theta.dim() == 0 ? 0 : 1; }

template <typename T, typename Rule>
Tensor forward(Rule rule, const Tensor& u, const Tensor& theta, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual) {
  const DeviceGuard guard(u.get_device_index());
  const MemoryFormat format = memory_format(u);
  const Tensor dense_u = torch::stable::contiguous(u, format), dense_theta = torch::stable::contiguous(theta);
  const std::optional<Tensor> dense_bias = contiguous(bias, MemoryFormat::Contiguous);
  const std::optional<Tensor> dense_residual = contiguous(residual, format);
  const Tensor out = empty_like(u, format);

  const ChannelPlan plan = plan_of<T>(u, format, theta.dim() == 1 || bias.has_value(),
                                      aligned(dense_u) && aligned(dense_residual) && aligned(out));
  launch(u, plan.tasks(), threshold_kernel<T, Rule>, rule, plan,
         ThresholdForward<T>{data<T>(dense_u), data<T>(dense_theta), theta_stride(theta), data<T>(dense_bias),
                             data<T>(dense_residual), mutable_data<T>(out)});
  return out;
}

struct Gradients {
  Tensor u, theta, bias;
};

// x: the codes of a soft threshold, the input of a generalised one.
template <typename T, typename Rule>
Gradients backward(Rule rule, const Tensor& grad, const Tensor& x, const Tensor& theta, bool has_bias) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = memory_format(x);
  const Tensor dense_grad = torch::stable::contiguous(grad, format), dense_x = torch::stable::contiguous(x, format);
  const Tensor dense_theta = torch::stable::contiguous(theta);

  const Tensor grad_u = empty_like(x, format);
  const ChannelPlan plan =
      plan_of<T>(x, format, theta.dim() == 1 || has_bias, aligned(dense_grad) && aligned(dense_x) && aligned(grad_u));
  const int64_t bias_size = has_bias ? plan.channels : 0;
  const Tensor theta_partials = empty(x, {plan.channels * plan.splits}, accumulate_dtype(x));
  const Tensor bias_partials = empty(x, {bias_size * plan.splits}, accumulate_dtype(x));
  const Gradients gradients{grad_u, empty_like(theta, MemoryFormat::Contiguous),
                            empty(x, {bias_size}, x.scalar_type())};

  launch(x, plan.tasks(), threshold_backward_kernel<T, Rule>, rule, plan,
         ThresholdBackward<T>{data<T>(dense_grad), data<T>(dense_x), data<T>(dense_theta), theta_stride(theta),
                              mutable_data<T>(gradients.u), mutable_data<A>(theta_partials),
                              has_bias ? mutable_data<A>(bias_partials) : nullptr});
  sum_partials<A, T>(theta_partials, gradients.theta);
  sum_partials<A, T>(bias_partials, gradients.bias);
  return gradients;
}

// visit(rule) for the rule of a generalised threshold.
template <typename Visit>
auto visit_shrink(const std::string& activation, bool one_sided, const Visit& visit) {
  switch (parse_activation(activation)) {
    case Activation::relu:
      return visit(ShrinkRule<Activation::relu>{one_sided});
    case Activation::leaky_relu:
      return visit(ShrinkRule<Activation::leaky_relu>{one_sided});
    case Activation::elu:
      return visit(ShrinkRule<Activation::elu>{one_sided});
    case Activation::silu:
      return visit(ShrinkRule<Activation::silu>{one_sided});
    case Activation::mish:
      return visit(ShrinkRule<Activation::mish>{one_sided});
    default:
      return visit(ShrinkRule<Activation::gelu>{one_sided});
  }
}

Tensor soft_threshold(const Tensor& u, const Tensor& theta, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, bool one_sided) {
  check_soft_threshold(u, theta, bias, residual);
  return visit_dtype(u,
                     [&](auto zero) { return forward<decltype(zero)>(SoftRule{one_sided}, u, theta, bias, residual); });
}

std::tuple<Tensor, Tensor, Tensor> soft_threshold_backward(const Tensor& grad, const Tensor& codes, const Tensor& theta,
                                                           bool one_sided) {
  check_threshold_backward(grad, codes, theta);
  const Gradients gradients = visit_dtype(codes, [&](auto zero) {
    return backward<decltype(zero)>(SoftRule{one_sided}, grad, codes, theta, codes.dim() >= 2);
  });
  return {gradients.u, gradients.theta, gradients.bias};
}

Tensor shrink(const Tensor& u, const Tensor& theta, const std::string& activation, bool one_sided) {
  check_theta(u, theta, channels_of(u));
  return visit_dtype(u, [&](auto zero) {
    return visit_shrink(activation, one_sided,
                        [&](auto rule) { return forward<decltype(zero)>(rule, u, theta, std::nullopt, std::nullopt); });
  });
}

std::tuple<Tensor, Tensor> shrink_backward(const Tensor& grad, const Tensor& u, const Tensor& theta,
                                           const std::string& activation, bool one_sided) {
  check_threshold_backward(grad, u, theta);
  const Gradients gradients = visit_dtype(u, [&](auto zero) {
    return visit_shrink(activation, one_sided,
                        [&](auto rule) { return backward<decltype(zero)>(rule, grad, u, theta, false); });
  });
  return {gradients.u, gradients.theta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("soft_threshold", TORCH_BOX(&soft_threshold));
  library.impl("soft_threshold_backward", TORCH_BOX(&soft_threshold_backward));
  library.impl("shrink", TORCH_BOX(&shrink));
  library.impl("shrink_backward", TORCH_BOX(&shrink_backward));
}

}  // namespace dsc::cuda
