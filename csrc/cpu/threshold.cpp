// soft_threshold (with the bias and residual of the fused epilogue), shrink, and their backwards on the CPU.
#include "layout.h"

namespace dsc::cpu {
namespace {

// Tasks that one thread should have at least, so that starting it pays.
int64_t grain(const Layout& layout) {
  const int64_t task = layout.inner == 1 ? rows_per_run(layout) * layout.channels : layout.inner;
  return std::max<int64_t>(1, 2 * elementwise_run / std::max<int64_t>(1, std::min(task, elementwise_run)));
}

// Adds the tasks' sums up in their order: totals[which][channel].
std::vector<std::vector<double>> add_sums(const Layout& layout, const std::vector<double>& sums, int64_t kinds) {
  std::vector<std::vector<double>> totals(kinds, std::vector<double>(layout.channels, 0.0));
  const int64_t tasks = run_count(layout), width = layout.inner == 1 ? layout.channels : 1;
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t kind = 0; kind < kinds; ++kind)
      for (int64_t c = 0; c < width; ++c) {
        const int64_t channel = layout.inner == 1 ? c : run_at(layout, task).channel;
        totals[kind][channel] += sums[(task * kinds + kind) * width + c];
      }
  return totals;
}

template <typename T>
void store_all(const std::vector<double>& values, T* out) {
  for (size_t i = 0; i < values.size(); ++i) out[i] = store<T>(static_cast<accumulate_t<T>>(values[i]));
}

// The gradient of theta from those of its channels: as they are, or their sum when theta is 0-d.
template <typename T>
void store_theta(const std::vector<double>& channels, const Tensor& theta, T* out) {
  if (theta.dim() == 1) return store_all(channels, out);
  double sum = 0;
  for (double value : channels) sum += value;
  store_all(std::vector<double>{sum}, out);
}

Tensor soft_threshold_cpu(const Tensor& u, const Tensor& theta, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual, bool one_sided) {
  check_soft_threshold(u, theta, bias, residual);
  const Dense dense = dense_layout(u);
  const Tensor out = dense.empty(u);
  visit_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Tensor values = dense.values(u), thresholds = widened<T>(theta);
    const Tensor added = residual ? dense.values(*residual) : values;
    const Tensor shift = bias ? widened<T>(*bias) : thresholds;
    const SoftThreshold<T> problem = {dense.layout,
                                      data<const T>(values),
                                      residual ? data<const T>(added) : nullptr,
                                      bias ? data<const A>(shift) : nullptr,
                                      data<const A>(thresholds),
                                      theta.dim(),
                                      one_sided,
                                      data<T>(out)};
    parallel(run_count(dense.layout), grain(dense.layout),
             [&](int64_t begin, int64_t end) { kernels<T>().soft_threshold(problem, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> soft_threshold_backward_cpu(const Tensor& grad, const Tensor& codes,
                                                               const Tensor& theta, bool) {
  check_threshold_backward(grad, codes, theta);
  const Dense dense = dense_layout(codes);
  const Tensor grad_u = dense.empty(codes), grad_theta = contiguous_empty_like(theta);
  const Tensor grad_bias = torch::stable::new_empty(codes, {codes.dim() >= 2 ? codes.size(1) : 0});
  visit_dtype(codes, [&](auto zero) {
    using T = decltype(zero);
    const Tensor values = dense.values(codes), gradient = dense.values(grad);
    const int64_t width = dense.layout.inner == 1 ? dense.layout.channels : 1;
    std::vector<double> sums(run_count(dense.layout) * 2 * width);
    const SoftThresholdBackward<T> problem = {dense.layout, data<const T>(gradient), data<const T>(values),
                                              data<T>(grad_u), sums.data()};
    parallel(run_count(dense.layout), grain(dense.layout),
             [&](int64_t begin, int64_t end) { kernels<T>().soft_threshold_backward(problem, begin, end); });
    const auto totals = add_sums(dense.layout, sums, 2);
    store_theta(totals[0], theta, data<T>(grad_theta));
    if (codes.dim() >= 2) store_all(totals[1], data<T>(grad_bias));
  });
  return {grad_u, grad_theta, grad_bias};
}

Tensor shrink_cpu(const Tensor& u, const Tensor& theta, const std::string& activation, bool one_sided) {
  check_theta(u, theta, channels_of(u));
  const Dense dense = dense_layout(u);
  const Tensor out = dense.empty(u);
  visit_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Tensor values = dense.values(u), thresholds = widened<T>(theta);
    const Shrink<T> problem = {dense.layout, data<const T>(values),        data<const accumulate_t<T>>(thresholds),
                               theta.dim(),  parse_activation(activation), one_sided,
                               data<T>(out)};
    parallel(run_count(dense.layout), grain(dense.layout),
             [&](int64_t begin, int64_t end) { kernels<T>().shrink(problem, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> shrink_backward_cpu(const Tensor& grad, const Tensor& u, const Tensor& theta,
                                               const std::string& activation, bool one_sided) {
  check_threshold_backward(grad, u, theta);
  const Dense dense = dense_layout(u);
  const Tensor grad_u = dense.empty(u), grad_theta = contiguous_empty_like(theta);
  visit_dtype(u, [&](auto zero) {
    using T = decltype(zero);
    const Tensor values = dense.values(u), gradient = dense.values(grad), thresholds = widened<T>(theta);
    std::vector<double> sums(run_count(dense.layout) * (dense.layout.inner == 1 ? dense.layout.channels : 1));
    const ShrinkBackward<T> problem = {dense.layout,
                                       data<const T>(gradient),
                                       data<const T>(values),
                                       data<const accumulate_t<T>>(thresholds),
                                       theta.dim(),
                                       parse_activation(activation),
                                       one_sided,
                                       data<T>(grad_u),
                                       sums.data()};
    parallel(run_count(dense.layout), grain(dense.layout),
             [&](int64_t begin, int64_t end) { kernels<T>().shrink_backward(problem, begin, end); });
    store_theta(add_sums(dense.layout, sums, 1)[0], theta, data<T>(grad_theta));
  });
  return {grad_u, grad_theta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("soft_threshold", TORCH_BOX(&soft_threshold_cpu));
  library.impl("soft_threshold_backward", TORCH_BOX(&soft_threshold_backward_cpu));
  library.impl("shrink", TORCH_BOX(&shrink_cpu));
  library.impl("shrink_backward", TORCH_BOX(&shrink_backward_cpu));
}

}  // namespace dsc::cpu
