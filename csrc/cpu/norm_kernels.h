// Batch norm at one instruction set level, channel by channel: what is read again is still in the cache.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// out may be g, and u may be e: the same place is read before it is written.
#define DSC_SAME_PLACE _Pragma("GCC ivdep")

template <int count, typename A>
struct Terms {
  A value[count];
};

// totals += the sums over a plane of what f(i) returns; f may write what it has at i.
template <int count, typename A, typename F>
DSC_HOST_DEVICE void add_sums(int64_t size, double (&totals)[count], const F& f) {
  for (int64_t block = 0; block < size; block += piece_elements) {
    const int64_t stop = block + piece_elements < size ? block + piece_elements : size;
    A lanes[count][sum_lanes] = {};
    int64_t i = block;
    for (; i + sum_lanes <= stop; i += sum_lanes) {
      DSC_SAME_PLACE
      for (int64_t lane = 0; lane < sum_lanes; ++lane) {
        const Terms<count, A> terms = f(i + lane);
        for (int k = 0; k < count; ++k) lanes[k][lane] += terms.value[k];
      }
    }
    for (; i < stop; ++i) {
      const Terms<count, A> terms = f(i);
      for (int k = 0; k < count; ++k) lanes[k][i % sum_lanes] += terms.value[k];
    }
    for (int k = 0; k < count; ++k)
      for (int64_t lane = 0; lane < sum_lanes; ++lane) totals[k] += lanes[k][lane];
  }
}

template <typename T>
void norm_relu_channels(const NormRelu<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const double size = static_cast<double>(p.x.outer * p.x.inner), count = size > 1 ? size : 1;
  const A scale = p.g.values ? A(1) : p.scale;
  for (int64_t channel = begin; channel < end; ++channel) {
    double sum[1] = {}, squares[1] = {};
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      T* const u = p.u + sample * p.x.stride + channel * p.x.inner;
      if (p.g.values) {
        const T* const g = p.g.plane(sample, channel);
        const T* const e = channel < p.handed ? p.e.plane(sample, channel) : u;
        const A factor = p.scale;
        add_sums<1, A>(p.x.inner, sum, [=](int64_t i) {
          const T value = store<T>(load(g[i]) - factor * load(e[i]));
          u[i] = value;
          return Terms<1, A>{load(value)};
        });
      } else if (p.training) {
        add_sums<1, A>(p.x.inner, sum, [=](int64_t i) { return Terms<1, A>{load(u[i])}; });
      }
    }
    if (p.training) {  // in two passes
      const A mean = static_cast<A>(sum[0] / count);
      for (int64_t sample = 0; sample < p.x.outer; ++sample) {
        const T* const x = p.x.plane(sample, channel);
        add_sums<1, A>(p.x.inner, squares,
                       [=](int64_t i) { return Terms<1, A>{(load(x[i]) - mean) * (load(x[i]) - mean)}; });
      }
      p.mean[channel] = scale * mean + p.bias[channel];
      p.variance[channel] = scale * scale * static_cast<A>(squares[0] / count);
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
    double sums[2] = {}, dot[1] = {};
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T *const x = p.x.plane(sample, channel), *const grad = p.grad.plane(sample, channel);
      add_sums<2, A>(p.x.inner, sums, [=](int64_t i) {
        const A xhat = scale * load(x[i]) + shift;
        const A through = load(grad[i]);  // in any case: GCC 12 makes wrong sums of loads under a condition
        const A active = gamma * xhat + beta <= 0 ? A(0) : through;
        return Terms<2, A>{active, active * xhat};
      });
    }
    p.grad_beta[channel] = static_cast<A>(sums[0]);
    p.grad_gamma[channel] = static_cast<A>(sums[1]);
    // By way of mean and deviation all values of a batch get something of each.
    const A slope = gamma * p.inverse[channel];
    const A of_shift = p.training ? slope * p.grad_beta[channel] / count : 0;
    const A of_scale = p.training ? slope * p.grad_gamma[channel] / count : 0;
    const A factor = channel < p.handed ? p.factor : A(1);
    for (int64_t sample = 0; sample < p.x.outer; ++sample) {
      const T *const x = p.x.plane(sample, channel), *const grad = p.grad.plane(sample, channel);
      const T* const e = p.e.values && channel < p.handed ? p.e.plane(sample, channel) : x;
      T* const out = p.out + sample * p.grad.stride + channel * p.x.inner;
      const auto grad_u = [=](int64_t i, A through) {
        const A xhat = scale * load(x[i]) + shift;
        return slope * (gamma * xhat + beta <= 0 ? A(0) : through) - of_scale * xhat - of_shift;
      };
      if (p.share) {
        T* const share = p.share + sample * p.share_stride + channel * p.x.inner;
        const bool error = p.error;
        add_sums<1, A>(p.x.inner, dot, [=](int64_t i) {
          const A through = load(grad[i]), g = grad_u(i, through), product = g * load(e[i]);
          share[i] = store<T>(error ? g - through : g);
          out[i] = store<T>(factor * g);
          return Terms<1, A>{product};
        });
      } else {
        add_sums<1, A>(p.x.inner, dot, [=](int64_t i) {
          const A g = grad_u(i, load(grad[i])), product = g * load(e[i]);
          out[i] = store<T>(factor * g);
          return Terms<1, A>{product};
        });
      }
    }
    p.dot[channel] = channel < p.dotted ? static_cast<A>(dot[0]) : A(0);
  }
}

#undef DSC_SAME_PLACE

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
