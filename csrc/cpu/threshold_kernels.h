// Thresholds, elementwise over a dense tensor in storage order, at one instruction set level.
//
// A run inside a plane has one threshold and one bias; rows of channels (channels_last) have one for each element of
// the row. Backward writes the gradient of the input and adds up those of threshold and bias in the same pass: in
// accumulate_t<T> over a block of 1024 elements, in double beyond.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

constexpr int64_t sum_block = 1024;
constexpr int64_t sum_lanes = 16;  // independent sums, so that the compiler may keep them in one vector

// out[i] = f(i, theta, bias) for the elements of the tasks. Thresholds and biases are read before the loop over a
// plane, or lie in rows of their own, and `out` shares no memory with what f reads: all loops vectorise.
template <typename T, typename F>
DSC_HOST_DEVICE void fill(const Layout& layout, int64_t begin, int64_t end, const accumulate_t<T>* __restrict theta,
                          int64_t theta_stride, const accumulate_t<T>* __restrict bias, T* __restrict out, const F& f) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const Run run = run_at(layout, task);
    if (layout.inner == 1) {
      for (int64_t row = run.begin; row < run.end; row += layout.channels)
        for (int64_t c = 0; c < layout.channels; ++c)
          out[row + c] = store<T>(f(row + c, theta[c * theta_stride], bias ? bias[c] : A(0)));
    } else {
      const A channel_theta = theta[run.channel * theta_stride], channel_bias = bias ? bias[run.channel] : A(0);
      for (int64_t i = run.begin; i < run.end; ++i) out[i] = store<T>(f(i, channel_theta, channel_bias));
    }
  }
}

template <bool one_sided, typename T>
DSC_HOST_DEVICE void soft_threshold_elements(const SoftThreshold<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* const u = p.u;
  const T* const residual = p.residual;
  if (residual)
    fill<T>(p.layout, begin, end, p.theta, p.theta_stride, p.bias, p.codes, [=](int64_t i, A theta, A bias) {
      return soft_threshold<one_sided>(load(u[i]) + bias + load(residual[i]), theta);
    });
  else
    fill<T>(p.layout, begin, end, p.theta, p.theta_stride, p.bias, p.codes,
            [=](int64_t i, A theta, A bias) { return soft_threshold<one_sided>(load(u[i]) + bias, theta); });
}

template <typename T>
void soft_threshold_tasks(const SoftThreshold<T>& p, int64_t begin, int64_t end) {
  p.one_sided ? soft_threshold_elements<true>(p, begin, end) : soft_threshold_elements<false>(p, begin, end);
}

// Writes element(i) for a run and returns the run's sum of term(i).
template <typename A, typename Term>
DSC_HOST_DEVICE double sum_over(int64_t begin, int64_t end, const Term& term) {
  double total = 0;
  for (int64_t block = begin; block < end; block += sum_block) {
    const int64_t stop = block + sum_block < end ? block + sum_block : end;
    A lanes[sum_lanes] = {};
    int64_t i = block;
    for (; i + sum_lanes <= stop; i += sum_lanes)
      for (int64_t lane = 0; lane < sum_lanes; ++lane) lanes[lane] += term(i + lane);
    for (; i < stop; ++i) lanes[i % sum_lanes] += term(i);
    for (int64_t lane = 0; lane < sum_lanes; ++lane) total += lanes[lane];
  }
  return total;
}

// Of elements [begin, end), in blocks: calls vector(i, v) for whole vectors of sum_lanes elements, of which v is the
// index, one(i, lane) for what is left, and block(), which adds up the lanes, after each block.
template <typename A, typename OfVector, typename OfOne, typename OfBlock>
DSC_HOST_DEVICE void for_each_lane(int64_t begin, int64_t end, const OfVector& vector, const OfOne& one,
                                   const OfBlock& block) {
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t i = begin; i < end; block()) {
    const int64_t stop = i + sum_block < end ? i + sum_block : end;
    for (; i + sum_lanes <= stop; i += sum_lanes)
#pragma GCC unroll 8
      for (int v = 0; v < sum_lanes / lanes; ++v) vector(i + v * lanes, v);
    for (; i < stop; ++i) one(i, i % sum_lanes);
  }
}

// sum_lanes sums.
template <typename A>
union LaneSums {
  Lanes<A> v[sum_lanes / Vector<A>::lanes];
  A lane[sum_lanes];
};

template <typename T>
DSC_HOST_DEVICE Lanes<accumulate_t<T>> load_vector(const T* in) {
  using A = accumulate_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) return *reinterpret_cast<const Lanes<A>*>(in);
  Lanes<A> v;
  for (int i = 0; i < Vector<A>::lanes; ++i) v[i] = load(in[i]);
  return v;
}
template <typename T>
DSC_HOST_DEVICE void store_vector(const Lanes<accumulate_t<T>>& v, T* out) {
  using A = accumulate_t<T>;
  if constexpr (sizeof(T) == sizeof(A))
    *reinterpret_cast<Lanes<A>*>(out) = v;
  else
    for (int i = 0; i < Vector<A>::lanes; ++i) out[i] = store<T>(v[i]);
}

// Of a run inside a plane, in one pass.
template <typename T>
void soft_threshold_backward_run(const SoftThresholdBackward<T>& p, const Run& run, double* theta_sum,
                                 double* bias_sum) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  double of_theta = 0, of_bias = 0;
  LaneSums<A> theta = {}, bias = {};
  for_each_lane<A>(
      run.begin, run.end,
      [&](int64_t i, int v) {
        const V code = load_vector(p.codes + i), through = code == A(0) ? V{} : load_vector(p.grad + i);
        store_vector(through, p.grad_u + i);
        bias.v[v] += through;
        theta.v[v] += code < A(0) ? through : -through;
      },
      [&](int64_t i, int64_t lane) {
        const A code = load(p.codes[i]), grad = load(p.grad[i]), through = soft_threshold_grad_u(code, grad);
        p.grad_u[i] = store<T>(through);
        bias.lane[lane] += through;
        theta.lane[lane] += soft_threshold_grad_theta(code, grad);
      },
      [&] {
        for (int64_t lane = 0; lane < sum_lanes; ++lane) of_theta += theta.lane[lane], of_bias += bias.lane[lane];
        theta = bias = {};
      });
  *theta_sum = of_theta;
  *bias_sum = of_bias;
}

template <typename T>
void soft_threshold_backward_tasks(const SoftThresholdBackward<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const bool rows = p.layout.inner == 1;
  const int64_t width = rows ? p.layout.channels : 1;
  for (int64_t task = begin; task < end; ++task) {
    const Run run = run_at(p.layout, task);
    double* const theta_sum = p.sums + task * 2 * width;
    double* const bias_sum = theta_sum + width;
    if (!rows) {
      soft_threshold_backward_run(p, run, theta_sum, bias_sum);
      continue;
    }
    for (int64_t c = 0; c < width; ++c) theta_sum[c] = bias_sum[c] = 0;
    for (int64_t i = run.begin; i < run.end; ++i)
      p.grad_u[i] = store<T>(soft_threshold_grad_u<A>(load(p.codes[i]), load(p.grad[i])));
    for (int64_t row = run.begin; row < run.end; row += width)
      for (int64_t c = 0; c < width; ++c) {
        const A code = load(p.codes[row + c]), grad = load(p.grad[row + c]);
        theta_sum[c] += soft_threshold_grad_theta(code, grad);
        bias_sum[c] += soft_threshold_grad_u(code, grad);
      }
  }
}

template <Activation activation, bool one_sided, typename T>
void shrink_elements(const Shrink<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* const u = p.u;
  fill<T>(p.layout, begin, end, p.theta, p.theta_stride, static_cast<const A*>(nullptr), p.out,
          [=](int64_t i, A theta, A) { return shrink<activation, one_sided>(load(u[i]), theta); });
}

template <Activation activation, bool one_sided, typename T>
void shrink_backward_elements(const ShrinkBackward<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* const u = p.u;
  const T* const grad = p.grad;
  fill<T>(p.layout, begin, end, p.theta, p.theta_stride, static_cast<const A*>(nullptr), p.grad_u,
          [=](int64_t i, A theta, A) {
            return load(grad[i]) * shrink_derivative_u<activation, one_sided>(load(u[i]), theta);
          });
  const auto term = [=](int64_t i, A theta) {
    return load(grad[i]) * shrink_derivative_theta<activation, one_sided>(load(u[i]), theta);
  };
  const int64_t channels = p.layout.channels;
  for (int64_t task = begin; task < end; ++task) {
    const Run run = run_at(p.layout, task);
    if (p.layout.inner == 1) {
      double* const sums = p.sums + task * channels;
      for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
      for (int64_t row = run.begin; row < run.end; row += channels)
        for (int64_t c = 0; c < channels; ++c) sums[c] += term(row + c, p.theta[c * p.theta_stride]);
    } else {
      const A theta = p.theta[run.channel * p.theta_stride];
      p.sums[task] = sum_over<A>(run.begin, run.end, [=](int64_t i) { return term(i, theta); });
    }
  }
}

// Calls f.template run<activation, one_sided>() for the values that are known only at run time.
template <typename F>
DSC_HOST_DEVICE void visit_activation(Activation activation, bool one_sided, const F& f) {
#define DSC_VISIT(name)  \
  case Activation::name: \
    return one_sided ? f.template run<Activation::name, true>() : f.template run<Activation::name, false>();
  switch (activation) {
    DSC_VISIT(relu)
    DSC_VISIT(leaky_relu)
    DSC_VISIT(elu)
    DSC_VISIT(silu)
    DSC_VISIT(mish)
    DSC_VISIT(gelu)
  }
#undef DSC_VISIT
}

template <typename T>
struct ShrinkRange {
  const Shrink<T>& p;
  int64_t begin, end;
  template <Activation activation, bool one_sided>
  void run() const {
    shrink_elements<activation, one_sided>(p, begin, end);
  }
};

template <typename T>
void shrink_tasks(const Shrink<T>& p, int64_t begin, int64_t end) {
  visit_activation(p.activation, p.one_sided, ShrinkRange<T>{p, begin, end});
}

template <typename T>
struct ShrinkBackwardRange {
  const ShrinkBackward<T>& p;
  int64_t begin, end;
  template <Activation activation, bool one_sided>
  void run() const {
    shrink_backward_elements<activation, one_sided>(p, begin, end);
  }
};

template <typename T>
void shrink_backward_tasks(const ShrinkBackward<T>& p, int64_t begin, int64_t end) {
  visit_activation(p.activation, p.one_sided, ShrinkBackwardRange<T>{p, begin, end});
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
