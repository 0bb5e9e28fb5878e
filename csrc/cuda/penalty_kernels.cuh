// The l1 penalty over a dense tensor, in whatever order it lies in memory, and its gradient.
//
//   forward     norm = sum |x|,  count = number of |x| > alpha       backward    grad_x = sign(x) grad
//
// Forward is one pass: a thread adds up every element of its grid-stride loop, a block one partial norm and count, and
// sum_partials_kernel the partials. Backward reads grad, a scalar, from device memory: the host never waits for it.
#pragma once

#include <algorithm>

#include "../core/threshold.h"
#include "reduction.cuh"

namespace dsc::cuda {

// Blocks for `size` elements: at least 8 a thread, and enough to fill any device. Fixed numbers, so that the order of a
// sum does not vary from device to device.
inline int64_t flat_blocks(int64_t size) {
  constexpr int64_t block_elements = 8 * block_threads, most_blocks = 2048;
  return std::min(ceil_div(size, block_elements), most_blocks);
}

// Elements [0, whole) are visited in accesses of 16 bytes, the others one by one: whole is a multiple of
// vector_elements, zero where the tensor does not begin at a multiple of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(block_threads, 1)
    l1_norm_kernel(const T* x, int64_t whole, int64_t size, accumulate_t<T> alpha, accumulate_t<T>* norms,
                   int64_t* counts) {
  using A = accumulate_t<T>;
  constexpr int together = vector_elements<T>;
  Both<A, int64_t> sum{0, 0};
  const auto add = [&](A value) {
    const A magnitude = std::fabs(value);
    sum += Both<A, int64_t>{magnitude, magnitude > alpha};
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * block_threads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
#pragma unroll 2
  for (int64_t i = first * together; i < whole; i += step * together) {
    A values[together];
    load_elements<together>(x + i, values);
#pragma unroll
    for (int j = 0; j < together; ++j) add(values[j]);
  }
  for (int64_t i = whole + first; i < size; i += step) add(load(x[i]));
  sum = block_sum(sum, 1);
  if (threadIdx.x == 0) {
    norms[blockIdx.x] = sum.first;
    counts[blockIdx.x] = sum.second;
  }
}

template <typename T>
__global__ void __launch_bounds__(block_threads, 1)
    l1_norm_backward_kernel(const accumulate_t<T>* grad, const T* x, int64_t whole, int64_t size, T* grad_x) {
  using A = accumulate_t<T>;
  constexpr int together = vector_elements<T>;
  const A factor = *grad;
  const int64_t step = static_cast<int64_t>(gridDim.x) * block_threads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
#pragma unroll 2
  for (int64_t i = first * together; i < whole; i += step * together) {
    A values[together];
    load_elements<together>(x + i, values);
#pragma unroll
    for (int j = 0; j < together; ++j) values[j] = sign_times<A>(values[j], factor);
    store_elements<together>(grad_x + i, values);
  }
  for (int64_t i = whole + first; i < size; i += step) {
    grad_x[i] = store<T>(sign_times<A>(load(x[i]), factor));
  }
}

}  // namespace dsc::cuda
