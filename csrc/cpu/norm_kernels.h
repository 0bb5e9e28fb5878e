// Batch norm at one instruction set level, channel by channel: what is read again is still in the cache.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// out may be g, and u may be e: the same place is read before it is written.
#define DSC_SAME_PLACE _Pragma("GCC ivdep")

// Mean and (biased) variance of a channel, in two passes.
template <typename T>
DSC_HOST_DEVICE void moments_of_channel(const Channels<T>& x, int64_t channel, accumulate_t<T>& mean,
                                        accumulate_t<T>& variance) {
  using A = accumulate_t<T>;
  const double size = static_cast<double>(x.outer * x.inner), count = size > 1 ? size : 1;
  double sum = 0, squares = 0;
  for (int64_t sample = 0; sample < x.outer; ++sample) {
    const T* const values = x.plane(sample, channel);
    sum += sum_over<A>(0, x.inner, [=](int64_t i) { return load(values[i]); });
  }
  const A middle = static_cast<A>(sum / count);
  for (int64_t sample = 0; sample < x.outer; ++sample) {
    const T* const values = x.plane(sample, channel);
    squares +=
        sum_over<A>(0, x.inner, [=](int64_t i) { return (load(values[i]) - middle) * (load(values[i]) - middle); });
  }
  mean = middle;
  variance = static_cast<A>(squares / count);
}

template <typename T>
void norm_relu_channels(const NormRelu<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A scale = p.g.values ? A(1) : p.scale;
  for (int64_t channel = begin; channel < end; ++channel) {
    if (p.g.values)
      for (int64_t sample = 0; sample < p.x.outer; ++sample) {
        T* const u = p.u + sample * p.x.stride + channel * p.x.inner;
        const T* const g = p.g.plane(sample, channel);
        const T* const e = channel < p.handed ? p.e.plane(sample, channel) : u;
        const A factor = p.scale;
        DSC_SAME_PLACE
        for (int64_t i = 0; i < p.x.inner; ++i) u[i] = store<T>(load(g[i]) - factor * load(e[i]));
      }
    if (p.training) {
      A mean, variance;
      moments_of_channel(p.x, channel, mean, variance);
      p.mean[channel] = scale * mean + p.bias[channel];
      p.variance[channel] = scale * scale * variance;
    }
    const A inverse = 1 / static_cast<A>(__builtin_sqrt(p.variance[channel] + p.eps));
    const A slope = p.gamma[channel] * scale * inverse;
    const A shift = p.gamma[channel] * (p.bias[channel] - p.mean[channel]) * inverse + p.beta[channel];
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T* const x = p.x.plane(sample, channel);
      T* const out = p.out + sample * p.out_stride + channel * p.x.inner;
      const auto result = [=](int64_t i) {
        const A z = slope * load(x[i]) + shift;
        return z <= 0 ? A(0) : z;
      };
      if (p.error) {
        const T* const g = p.g.plane(sample, channel);
        DSC_SAME_PLACE
        for (int64_t i = 0; i < p.x.inner; ++i) out[i] = store<T>(load(g[i]) - result(i));
      } else {
        DSC_SAME_PLACE
        for (int64_t i = 0; i < p.x.inner; ++i) out[i] = store<T>(result(i));
      }
    }
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
    const A factor = channel < p.handed ? p.factor : A(1);
    double dot = 0;
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T *const x = p.x.plane(sample, channel), *const grad = p.grad.plane(sample, channel);
      const auto grad_u = [=](int64_t i) {
        const A xhat = scale * load(x[i]) + shift, g = load(grad[i]);
        return slope * (gamma * xhat + beta <= 0 ? A(0) : g) - of_scale * xhat - of_shift;
      };
      if (!p.e.values || channel < p.handed) {
        const T* const e = p.e.values ? p.e.plane(sample, channel) : x;
        dot += sum_over<A>(0, p.x.inner, [=](int64_t i) { return grad_u(i) * load(e[i]); });
      }
      T* const out = p.out + sample * p.grad.stride + channel * p.x.inner;
      T* const share = p.share + sample * p.share_stride + channel * p.x.inner;
      const bool error = p.error;
      if (p.share) {
        DSC_SAME_PLACE
        for (int64_t i = 0; i < p.x.inner; ++i) {
          const A g = grad_u(i), through = load(grad[i]);
          share[i] = store<T>(error ? g - through : g);
          out[i] = store<T>(factor * g);
        }
      } else {
        DSC_SAME_PLACE
        for (int64_t i = 0; i < p.x.inner; ++i) out[i] = store<T>(factor * grad_u(i));
      }
    }
    p.dot[channel] = static_cast<A>(dot);
  }
}

#undef DSC_SAME_PLACE

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
