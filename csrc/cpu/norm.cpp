// Batch norm with ReLU, the codes that it is made of, and its gradient, for slices of channels as they lie.
#include "planes.h"

namespace dsc::cpu {
namespace {

// Channels that are worth a thread's while.
int64_t grain_of_channels(const Tensor& x) { return grain_of(4 * x.numel() / std::max<int64_t>(1, x.size(1))); }

// One value in the type of sums for each channel, or one alone.
void check_values(const Tensor& x, const Tensor& values, bool each = true) {
  const std::vector<int64_t> shape = each ? std::vector<int64_t>{x.size(1)} : std::vector<int64_t>{};
  STD_TORCH_CHECK(sizes(values) == shape && values.scalar_type() == wide_type(x) && values.device() == x.device() &&
                      values.is_contiguous(),
                  "dsc_ops: batch norm takes one contiguous float32 (float64 for float64) for each channel, and one "
                  "scale");
}

template <typename T>
Channels<T> optional_planes(const std::optional<Tensor>& x) {
  return x ? channels_of_planes<T>(*x) : Channels<T>{nullptr, 0, 0, 0};
}

struct Norm {
  const Tensor &scale, &bias, &gamma, &beta, &mean, &variance;
  bool training;
  double eps;

  void check(const Tensor& x) const {
    check_values(x, scale, false);
    for (const Tensor* values : {&bias, &gamma, &beta, &mean, &variance}) check_values(x, *values);
  }
};

// g and e, both or none, have planes.
void norm_relu(const Tensor& x, const std::optional<Tensor>& g, const std::optional<Tensor>& e, const Norm& norm,
               const Tensor& out, bool error) {
  norm.check(x);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const NormRelu<T> problem = {channels_of_planes<T>(x),
                                 data<T>(x),
                                 optional_planes<T>(g),
                                 optional_planes<T>(e),
                                 e ? e->size(1) : 0,
                                 data<const A>(norm.scale)[0],
                                 data<const A>(norm.bias),
                                 data<const A>(norm.gamma),
                                 data<const A>(norm.beta),
                                 data<A>(norm.mean),
                                 data<A>(norm.variance),
                                 norm.training,
                                 static_cast<A>(norm.eps),
                                 data<T>(out),
                                 out.stride(0),
                                 error};
    parallel(x.size(1), grain_of_channels(x),
             [&](int64_t begin, int64_t end) { kernels<T>().norm_relu(problem, begin, end); });
  });
}

void norm_relu_cpu(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& gamma, const Tensor& beta,
                   const Tensor& mean, const Tensor& variance, bool training, double eps) {
  check_written(x, "x");
  norm_relu(x, std::nullopt, std::nullopt, {scale, bias, gamma, beta, mean, variance, training, eps}, x, false);
}

void unfold_norm_relu_cpu(const Tensor& u, const Tensor& g, const Tensor& e, const Tensor& scale, const Tensor& bias,
                          const Tensor& gamma, const Tensor& beta, const Tensor& mean, const Tensor& variance,
                          bool training, double eps, const Tensor& out, bool error) {
  check_written(u, "u");
  check_written(out, "out");
  check_shape(u, g, sizes(u), "g");
  check_shape(u, out, sizes(u), "out");
  check_planes(e, "e");
  STD_TORCH_CHECK(e.size(1) <= u.size(1), "dsc_ops: e has more channels than u");
  check_shape(u, e, {u.size(0), e.size(1), u.size(2), u.size(3)}, "e");
  norm_relu(u, with_planes(g), with_planes(e), {scale, bias, gamma, beta, mean, variance, training, eps}, out, error);
}

std::tuple<Tensor, Tensor, Tensor> norm_relu_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                          const Tensor& shift, const Tensor& gamma, const Tensor& beta,
                                                          const Tensor& inverse, bool training, const Tensor& factor,
                                                          int64_t handed, const std::optional<Tensor>& e,
                                                          const std::optional<Tensor>& share, bool error) {
  check_planes(x);
  check_shape(x, grad, sizes(x), "grad");
  check_written(grad, "grad");
  for (const Tensor* values : {&scale, &shift, &gamma, &beta, &inverse}) check_values(x, *values);
  check_values(x, factor, false);
  STD_TORCH_CHECK(handed >= 0 && handed <= x.size(1), "dsc_ops: x has fewer channels than ", handed);
  if (e) check_shape(x, *e, {x.size(0), handed, x.size(2), x.size(3)}, "e");
  if (share) check_shape(x, *share, sizes(x), "share");
  if (share) check_written(*share, "share");
  const Tensor x_planes = with_planes(x);
  const std::optional<Tensor> e_planes = e ? std::optional<Tensor>(with_planes(*e)) : std::nullopt;
  const Tensor grad_gamma = contiguous_empty_like(gamma), grad_beta = contiguous_empty_like(gamma);
  const Tensor dot = contiguous_empty_like(gamma);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const NormReluBackward<T> problem = {channels_of_planes<T>(x_planes),
                                         channels_of_planes<T>(grad),
                                         optional_planes<T>(e_planes),
                                         data<const A>(scale),
                                         data<const A>(shift),
                                         data<const A>(gamma),
                                         data<const A>(beta),
                                         data<const A>(inverse),
                                         training,
                                         data<const A>(factor)[0],
                                         handed,
                                         e ? handed : x.size(1),
                                         data<T>(grad),
                                         share ? data<T>(*share) : nullptr,
                                         share ? share->stride(0) : 0,
                                         error,
                                         data<A>(grad_gamma),
                                         data<A>(grad_beta),
                                         data<A>(dot)};
    parallel(x.size(1), grain_of_channels(x),
             [&](int64_t begin, int64_t end) { kernels<T>().norm_relu_backward(problem, begin, end); });
  });
  return {grad_gamma, grad_beta, dot};
}

void use_large_pages_cpu(const Tensor& memory) {
  use_large_pages(memory.data_ptr(), memory.numel() * static_cast<int64_t>(memory.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("use_large_pages", TORCH_BOX(&use_large_pages_cpu));
  library.impl("norm_relu_", TORCH_BOX(&norm_relu_cpu));
  library.impl("unfold_norm_relu_", TORCH_BOX(&unfold_norm_relu_cpu));
  library.impl("norm_relu_backward_", TORCH_BOX(&norm_relu_backward_cpu));
}

}  // namespace dsc::cpu
