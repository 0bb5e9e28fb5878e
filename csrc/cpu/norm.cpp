// Mean and variance of channels, and the gradient of batch norm with ReLU, for slices of channels as they lie.
#include "host.h"

namespace dsc::cpu {
namespace {

// x where its pixels are contiguous, else a copy.
Tensor with_planes(const Tensor& x) {
  const bool planes = (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(3)) &&
                      (x.size(1) <= 1 || x.stride(1) == x.size(2) * x.size(3));
  return planes ? x : torch::stable::contiguous(x);
}

template <typename T>
Channels<T> channels_of_planes(const Tensor& x) {
  return {data<const T>(x), x.stride(0), x.size(0), x.size(2) * x.size(3)};
}

void check_planes(const Tensor& x) { STD_TORCH_CHECK(x.dim() == 4, "dsc_ops: x must be (N, C, H, W)"); }

// Channels that are worth a thread's while.
int64_t grain_of_channels(const Tensor& x) { return grain_of(4 * x.numel() / std::max<int64_t>(1, x.size(1))); }

std::tuple<Tensor, Tensor> moments_cpu(const Tensor& x) {
  check_planes(x);
  const Tensor planes = with_planes(x);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor mean = torch::stable::new_empty(x, {x.size(1)}, wide);
  const Tensor variance = torch::stable::new_empty(x, {x.size(1)}, wide);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Moments<T> problem = {channels_of_planes<T>(planes), data<A>(mean), data<A>(variance)};
    parallel(x.size(1), grain_of_channels(x),
             [&](int64_t begin, int64_t end) { kernels<T>().moments(problem, begin, end); });
  });
  return {mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                          const Tensor& shift, const Tensor& gamma, const Tensor& beta,
                                                          const Tensor& inverse, bool training) {
  check_planes(x);
  check_shape(x, grad, sizes(x), "grad");
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* values : {&scale, &shift, &gamma, &beta, &inverse})
    STD_TORCH_CHECK(sizes(*values) == std::vector<int64_t>{x.size(1)} && values->scalar_type() == wide &&
                        values->device() == x.device(),
                    "dsc_ops: norm_relu_backward takes one float32 (float64 for float64) for each channel");
  const Tensor x_planes = with_planes(x), grad_planes = with_planes(grad);
  const Tensor grad_u = contiguous_empty_like(x);
  const Tensor grad_gamma = contiguous_empty_like(gamma), grad_beta = contiguous_empty_like(gamma);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Tensor values[] = {torch::stable::contiguous(scale), torch::stable::contiguous(shift),
                             torch::stable::contiguous(gamma), torch::stable::contiguous(beta),
                             torch::stable::contiguous(inverse)};
    const NormReluBackward<T> problem = {channels_of_planes<T>(x_planes),
                                         channels_of_planes<T>(grad_planes),
                                         data<const A>(values[0]),
                                         data<const A>(values[1]),
                                         data<const A>(values[2]),
                                         data<const A>(values[3]),
                                         data<const A>(values[4]),
                                         training,
                                         data<T>(grad_u),
                                         x.size(1) * x.size(2) * x.size(3),
                                         data<A>(grad_gamma),
                                         data<A>(grad_beta)};
    parallel(x.size(1), grain_of_channels(x),
             [&](int64_t begin, int64_t end) { kernels<T>().norm_relu_backward(problem, begin, end); });
  });
  return {grad_u, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("moments", TORCH_BOX(&moments_cpu));
  library.impl("norm_relu_backward", TORCH_BOX(&norm_relu_backward_cpu));
}

}  // namespace dsc::cpu
