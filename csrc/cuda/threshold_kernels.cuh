// Thresholds over a dense tensor, fused with the sum before them, and their gradients.
//
//   forward     out = T(u + bias + residual)        T: soft, one-sided or generalised (core/threshold.h)
//   backward    grad_u = dT/du grad,  grad_theta[m] = sum dT/dtheta grad,  grad_bias[m] = sum grad_u
//
// A tensor is (outer, channels, inner): (N, M, H W), or (N H W, M, 1) when it is channels_last. A task is a part of one
// channel's elements or, where channels are neighbours in memory, the same part of up to 32 channels. So neighbouring
// threads meet neighbouring addresses, a thread has one threshold and one bias, no element costs a division, and the
// sums over a channel end in one partial per task. Where planes are long, what stands for an element in all of this is
// as many neighbours as 16 bytes hold.
#pragma once

#include <algorithm>

#include "../core/threshold.h"
#include "reduction.cuh"

namespace dsc::cuda {

// How the elements of a tensor are cut into tasks. Where `together` is more than one, an element below, and in
// ChannelWalk, is that many neighbours of a plane.
struct ChannelPlan {
  int64_t outer, channels, inner;
  int64_t width;   // channels of a task, a power of two; more than one only where inner is 1
  int64_t part;    // elements that a task has of each channel
  int64_t splits;  // tasks that share a channel
  int together = 1;

  DSC_HOST_DEVICE int64_t channel_size() const { return outer * inner; }
  DSC_HOST_DEVICE int64_t tasks() const { return ceil_div(channels, width) * splits; }
};

// The plan with tasks of at least `part` elements a channel.
inline ChannelPlan channel_plan(int64_t outer, int64_t channels, int64_t inner, int64_t part) {
  if (channels == 1) {  // one run of memory
    inner *= outer;
    outer = 1;
  }
  ChannelPlan plan{outer, channels, inner, 1, 0, 0};
  while (inner == 1 && plan.width < channels && plan.width < 32) plan.width *= 2;
  const int64_t lanes = block_threads / plan.width;  // threads that share a channel
  plan.part = ceil_div(part, lanes) * lanes;
  plan.splits = ceil_div(plan.channel_size(), plan.part);
  return plan;
}

// Enough tasks to fill any device, of at least 8 elements a thread: fixed numbers, so that the order of a sum does not
// vary from device to device.
inline ChannelPlan channel_plan(int64_t outer, int64_t channels, int64_t inner) {
  constexpr int64_t thread_elements = 8, most_tasks = 2048;
  const ChannelPlan whole = channel_plan(outer, channels, inner, block_threads);
  const int64_t most_splits = std::max<int64_t>(1, most_tasks / std::max<int64_t>(1, ceil_div(channels, whole.width)));
  const int64_t least_part = block_threads / whole.width * thread_elements;
  return channel_plan(outer, channels, inner, std::max(least_part, ceil_div(whole.channel_size(), most_splits)));
}

// The elements that one thread visits in a task: of one channel, every lanes-th, by their offset in memory.
struct ChannelWalk {
  int64_t channel, offset;

  __device__ ChannelWalk(const ChannelPlan& plan, int64_t task) : inner(plan.inner) {
    const int width = static_cast<int>(plan.width), lanes = block_threads / width, thread = threadIdx.x;
    const int64_t first = task % plan.splits * plan.part + thread / width;
    const int64_t end = task % plan.splits * plan.part + plan.part;
    const int64_t last = end < plan.channel_size() ? end : plan.channel_size();
    channel = task / plan.splits * width + thread % width;
    left = channel < plan.channels && first < last ? ceil_div(last - first, lanes) : 0;
    position = first % inner;
    offset = (first / inner * plan.channels + channel) * inner + position;
    position_step = static_cast<int>(lanes % inner);
    offset_step = lanes / inner * plan.channels * inner + position_step;
    carry = (plan.channels - 1) * inner;
  }

  __device__ bool inside() const { return left > 0; }

  __device__ void next() {
    --left;
    position += position_step;
    offset += offset_step;
    if (position >= inner) {
      position -= inner;
      offset += carry;
    }
  }

 private:
  int64_t inner, left, position, offset_step, carry;
  int position_step;
};

// A rule is T of the forward kernel and its derivatives times grad, taken at what backward keeps of the forward pass:
// the code of a soft threshold, the input of a generalised one. The side is the same for all threads and known only at
// run time: as a template parameter it would double the number of kernels.
struct SoftRule {
  bool one_sided;
  template <typename A>
  DSC_HOST_DEVICE A value(A u, A theta) const {
    return one_sided ? soft_threshold<true>(u, theta) : soft_threshold<false>(u, theta);
  }
  template <typename A>
  DSC_HOST_DEVICE A grad_u(A code, A, A grad) const {
    return soft_threshold_grad_u(code, grad);
  }
  template <typename A>
  DSC_HOST_DEVICE A grad_theta(A code, A, A grad) const {
    return soft_threshold_grad_theta(code, grad);
  }
};

template <Activation activation>
struct ShrinkRule {
  bool one_sided;
  template <typename A>
  DSC_HOST_DEVICE A value(A u, A theta) const {
    return one_sided ? shrink<activation, true>(u, theta) : shrink<activation, false>(u, theta);
  }
  template <typename A>
  DSC_HOST_DEVICE A grad_u(A u, A theta, A grad) const {
    return grad * (one_sided ? shrink_derivative_u<activation, true>(u, theta)
                             : shrink_derivative_u<activation, false>(u, theta));
  }
  template <typename A>
  DSC_HOST_DEVICE A grad_theta(A u, A theta, A grad) const {
    return grad * (one_sided ? shrink_derivative_theta<activation, true>(u, theta)
                             : shrink_derivative_theta<activation, false>(u, theta));
  }
};

// `together` is what a plan has under this name, 1 or vector_elements. The loops over elements are not unrolled: no
// load may move before a store that might change it, so that the kernels would grow without getting faster.

template <typename T>
struct ThresholdForward {
  const T* u;
  const T* theta;
  int64_t theta_stride;  // 1, or 0 when all channels share one threshold
  const T* bias;         // (channels), or null
  const T* residual;     // as u, or null
  T* out;
};

template <int together, typename T, typename Rule, typename A>
__device__ __forceinline__ void threshold_elements(const Rule& rule, ChannelWalk walk,
                                                   const ThresholdForward<T>& tensors, A theta, A bias) {
#pragma unroll 1
  for (; walk.inside(); walk.next()) {
    const int64_t at = walk.offset * together;
    A u[together];
    load_elements<together>(tensors.u + at, u);
#pragma unroll
    for (int i = 0; i < together; ++i) u[i] += bias;
    if (tensors.residual) {
      A residual[together];
      load_elements<together>(tensors.residual + at, residual);
#pragma unroll
      for (int i = 0; i < together; ++i) u[i] += residual[i];
    }
#pragma unroll
    for (int i = 0; i < together; ++i) u[i] = rule.value(u[i], theta);
    store_elements<together>(tensors.out + at, u);
  }
}

template <typename T, typename Rule>
__global__ void __launch_bounds__(block_threads, 1)
    threshold_kernel(Rule rule, ChannelPlan plan, ThresholdForward<T> tensors) {
  using A = accumulate_t<T>;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const ChannelWalk walk(plan, task);
    if (!walk.inside()) continue;
    const A theta = load(tensors.theta[walk.channel * tensors.theta_stride]);
    const A bias = tensors.bias ? load(tensors.bias[walk.channel]) : A(0);
    if (plan.together == 1) {
      threshold_elements<1>(rule, walk, tensors, theta, bias);
    } else {
      threshold_elements<vector_elements<T>>(rule, walk, tensors, theta, bias);
    }
  }
}

template <typename T>
struct ThresholdBackward {
  const T* grad;
  const T* x;  // the codes (soft) or the input (generalised)
  const T* theta;
  int64_t theta_stride;
  T* grad_u;
  accumulate_t<T>* theta_partials;  // (splits, channels)
  accumulate_t<T>* bias_partials;   // likewise, or null
};

// The sums of the gradients of theta and bias over the elements of a walk.
template <int together, typename T, typename Rule, typename A>
__device__ __forceinline__ Both<A, A> threshold_backward_elements(const Rule& rule, ChannelWalk walk,
                                                                  const ThresholdBackward<T>& tensors, A theta) {
  Both<A, A> sum{0, 0};
#pragma unroll 1
  for (; walk.inside(); walk.next()) {
    const int64_t at = walk.offset * together;
    A x[together], grad[together];
    load_elements<together>(tensors.x + at, x);
    load_elements<together>(tensors.grad + at, grad);
#pragma unroll
    for (int i = 0; i < together; ++i) {
      const A grad_u = rule.grad_u(x[i], theta, grad[i]);
      sum += Both<A, A>{rule.grad_theta(x[i], theta, grad[i]), grad_u};
      grad[i] = grad_u;
    }
    store_elements<together>(tensors.grad_u + at, grad);
  }
  return sum;
}

template <typename T, typename Rule>
__global__ void __launch_bounds__(block_threads, 1)
    threshold_backward_kernel(Rule rule, ChannelPlan plan, ThresholdBackward<T> tensors) {
  using A = accumulate_t<T>;
  const int width = static_cast<int>(plan.width), thread = threadIdx.x;
  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const ChannelWalk walk(plan, task);
    const A theta = walk.inside() ? load(tensors.theta[walk.channel * tensors.theta_stride]) : A(0);
    Both<A, A> sum = plan.together == 1 ? threshold_backward_elements<1>(rule, walk, tensors, theta)
                                        : threshold_backward_elements<vector_elements<T>>(rule, walk, tensors, theta);
    sum = block_sum(sum, width);
    if (thread < width && walk.channel < plan.channels) {
      const int64_t partial = task % plan.splits * plan.channels + walk.channel;
      tensors.theta_partials[partial] = sum.first;
      if (tensors.bias_partials) tensors.bias_partials[partial] = sum.second;
    }
  }
}

}  // namespace dsc::cuda
