// Batch norm at one instruction set level, channel by channel: what is read twice is still in the cache the second
// time.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// Mean and (biased) variance, in two passes.
template <typename T>
void moments_of_channels(const Moments<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const double size = static_cast<double>(p.x.outer * p.x.inner), count = size > 1 ? size : 1;
  for (int64_t channel = begin; channel < end; ++channel) {
    double sum = 0, squares = 0;
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T* const x = p.x.plane(sample, channel);
      sum += sum_over<A>(0, p.x.inner, [=](int64_t i) { return load(x[i]); });
    }
    const A mean = static_cast<A>(sum / count);
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T* const x = p.x.plane(sample, channel);
      squares += sum_over<A>(0, p.x.inner, [=](int64_t i) { return (load(x[i]) - mean) * (load(x[i]) - mean); });
    }
    p.mean[channel] = mean;
    p.variance[channel] = static_cast<A>(squares / count);
  }
}

template <typename T>
void norm_relu_backward_channels(const NormReluBackward<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A size = static_cast<A>(p.x.outer * p.x.inner), count = size > 1 ? size : 1;
  for (int64_t channel = begin; channel < end; ++channel) {
    const A scale = p.scale[channel], shift = p.shift[channel], gamma = p.gamma[channel], beta = p.beta[channel];
    double grad_beta = 0, grad_gamma = 0;
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T *const x = p.x.plane(sample, channel), *const grad = p.grad.plane(sample, channel);
      const auto active = [=](int64_t i) {
        const A through = load(grad[i]);  // in any case: GCC 12 makes wrong sums of loads under a condition
        return gamma * (scale * load(x[i]) + shift) + beta <= 0 ? A(0) : through;
      };
      grad_beta += sum_over<A>(0, p.x.inner, active);
      grad_gamma += sum_over<A>(0, p.x.inner, [=](int64_t i) { return active(i) * (scale * load(x[i]) + shift); });
    }
    p.grad_beta[channel] = static_cast<A>(grad_beta);
    p.grad_gamma[channel] = static_cast<A>(grad_gamma);
    // By way of mean and deviation all values of a batch get something of each.
    const A slope = gamma * p.inverse[channel];
    const A of_shift = p.training ? slope * p.grad_beta[channel] / count : 0;
    const A of_scale = p.training ? slope * p.grad_gamma[channel] / count : 0;
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T *const x = p.x.plane(sample, channel), *const grad = p.grad.plane(sample, channel);
      T* __restrict const out = p.grad_u + sample * p.grad_u_stride + channel * p.x.inner;
      for (int64_t i = 0; i < p.x.inner; ++i) {
        const A xhat = scale * load(x[i]) + shift, g = load(grad[i]);
        out[i] = store<T>(slope * (gamma * xhat + beta <= 0 ? A(0) : g) - of_scale * xhat - of_shift);
      }
    }
  }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
