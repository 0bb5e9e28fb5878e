// Sums in two stages without atomics, so that a result depends on nothing but its input:
//
//   partials[part][i] = what one block adds up of sum i            (block_sum, in the kernel that has the terms)
//   sums[i]           = sum over parts of partials[part][i]        (sum_partials_kernel)
//
// Within a block the order is that of a binary tree over the threads, each of which adds its own terms one by one.
#pragma once

#include <type_traits>

#include "../core/scalar.h"
#include "cuda_portable.h"

namespace dsc::cuda {

// Threads of a block of every kernel, a power of two. Kernels ask for no more than one such block at a time,
// __launch_bounds__(block_threads, 1): left to itself, ptxas spills registers to fit more.
constexpr int block_threads = 256;

DSC_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements that one access of 16 bytes has.
template <typename T>
constexpr int vector_elements = 16 / sizeof(T);

// n neighbours, in one access where n is more than one.
template <int n, typename T>
__device__ __forceinline__ void load_elements(const T* from, accumulate_t<T> (&to)[n]) {
  if constexpr (n == 1) {
    to[0] = load(from[0]);
  } else {
    static_assert(n == vector_elements<T>);
    const Vector16<T> vector = load16(from);
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = load(vector.values[i]);
  }
}

template <int n, typename T>
__device__ __forceinline__ void store_elements(T* to, const accumulate_t<T> (&from)[n]) {
  if constexpr (n == 1) {
    to[0] = store<T>(from[0]);
  } else {
    Vector16<T> vector;
#pragma unroll
    for (int i = 0; i < n; ++i) vector.values[i] = store<T>(from[i]);
    store16(to, vector);
  }
}

// Two sums that are taken together.
template <typename A, typename B>
struct Both {
  A first;
  B second;

  DSC_HOST_DEVICE void operator+=(const Both& other) {
    first += other.first;
    second += other.second;
  }
};

// Thread t < width gets the sum over the threads t, t + width, t + 2 width, ...; width is a power of two. The whole
// block has to call.
template <typename Value>
__device__ Value block_sum(Value value, int width) {
  DSC_SHARED(Value, sums, block_threads);
  const int thread = threadIdx.x;
  __syncthreads();  // a previous call may still be reading
  sums[thread] = value;
  for (int half = block_threads / 2; half >= width; half /= 2) {
    __syncthreads();
    if (thread < half) {
      value += sums[thread + half];
      sums[thread] = value;
    }
  }
  return value;
}

template <typename Out, typename A>
DSC_HOST_DEVICE Out round_to(A x) {
  if constexpr (std::is_same<Out, A>::value) {
    return x;
  } else {
    return store<Out>(x);
  }
}

// Sums that a block of sum_partials_kernel makes, a power of two: with few parts each, many at a time.
DSC_HOST_DEVICE int64_t sums_per_block(int64_t parts) {
  int64_t width = block_threads;
  while (width > 1 && block_threads / width < parts) width /= 2;
  return width;
}

template <typename A, typename Out>
__global__ void __launch_bounds__(block_threads, 1)
    sum_partials_kernel(const A* partials, int64_t parts, int64_t count, Out* sums) {
  const int width = static_cast<int>(sums_per_block(parts)), lanes = block_threads / width, thread = threadIdx.x;
  for (int64_t block = blockIdx.x; block * width < count; block += gridDim.x) {
    const int64_t i = block * width + thread % width;
    A sum = 0;
    for (int64_t part = thread / width; part < parts && i < count; part += lanes) sum += partials[part * count + i];
    sum = block_sum(sum, width);
    if (thread < width && i < count) sums[i] = round_to<Out>(sum);
  }
}

}  // namespace dsc::cuda
