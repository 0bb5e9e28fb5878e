// Batch norm with ReLU and its gradient, for pixels whose channels come last and fill vectors.
//
// A task is a run of pixels that stays in the nearest cache; sums over a run are those of its channels' vectors.
#pragma once

#include "vectors.h"
#include "winograd_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// Calls body(task, c, from, to) for each vector c of channels: values from, from + channels, .. below to.
template <typename A, typename Body>
DSC_HOST_DEVICE void for_each_column(int64_t pixels, int64_t channels, int64_t begin, int64_t end, const Body& body) {
  const int64_t run = pixels_of_run(channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t last = (task + 1) * run < pixels ? (task + 1) * run : pixels;
    for (int64_t c = 0; c < channels; c += Vector<A>::lanes) body(task, c, task * run * channels + c, last * channels);
  }
}

template <typename A>
void moments_of_rows(const MomentsOfRows<A>& p, int64_t begin, int64_t end) {
  for_each_column<A>(p.pixels, p.channels, begin, end, [&](int64_t task, int64_t c, int64_t from, int64_t to) {
    Lanes<A> sum = {}, squares = {};
    for (int64_t i = from; i < to; i += p.channels) sum += vector_of(p.x + i);
    const Lanes<A> mean = sum / static_cast<A>((to - from + p.channels - 1) / p.channels);
    for (int64_t i = from; i < to; i += p.channels) {
      const Lanes<A> deviation = vector_of(p.x + i) - mean;
      squares += deviation * deviation;
    }
    vector_of(p.sums + 2 * task * p.channels + c) = mean;
    vector_of(p.sums + (2 * task + 1) * p.channels + c) = squares;
  });
}

template <typename A>
DSC_HOST_DEVICE Lanes<A> normalized(const NormRows<A>& p, int64_t i, const Lanes<A>& slope, const Lanes<A>& shift) {
  const Lanes<A> z = slope * vector_of(p.x + i) + shift;
  return p.base ? z + vector_of(p.base + i) : z;
}

template <typename A>
void norm_rows(const NormRows<A>& p, int64_t begin, int64_t end) {
  for_each_column<A>(p.pixels, p.channels, begin, end, [&](int64_t, int64_t c, int64_t from, int64_t to) {
    const Lanes<A> slope = vector_of(p.slope + c), shift = vector_of(p.shift + c);
    for (int64_t i = from; i < to; i += p.channels) {
      const Lanes<A> z = normalized(p, i, slope, shift);
      vector_of(p.out + i) = z <= Lanes<A>{} ? Lanes<A>{} : z;
    }
  });
}

// What the ReLU let pass of the gradient.
template <typename A>
DSC_HOST_DEVICE Lanes<A> passed(const NormRowsBackward<A>& p, int64_t i, const Lanes<A>& slope, const Lanes<A>& shift) {
  return normalized(p.forward, i, slope, shift) <= Lanes<A>{} ? Lanes<A>{} : vector_of(p.grad + i);
}

template <typename A>
void norm_rows_sums(const NormRowsBackward<A>& p, int64_t begin, int64_t end) {
  const NormRows<A>& f = p.forward;
  for_each_column<A>(f.pixels, f.channels, begin, end, [&](int64_t task, int64_t c, int64_t from, int64_t to) {
    const Lanes<A> slope = vector_of(f.slope + c), shift = vector_of(f.shift + c), mean = vector_of(p.mean + c);
    Lanes<A> sum = {}, product = {};
    for (int64_t i = from; i < to; i += f.channels) {
      const Lanes<A> through = passed(p, i, slope, shift);
      sum += through;
      product += through * (vector_of(f.x + i) - mean);
    }
    vector_of(p.sums + 2 * task * f.channels + c) = sum;
    vector_of(p.sums + (2 * task + 1) * f.channels + c) = product;
  });
}

template <typename A>
void norm_rows_backward(const NormRowsBackward<A>& p, int64_t begin, int64_t end) {
  const NormRows<A>& f = p.forward;
  for_each_column<A>(f.pixels, f.channels, begin, end, [&](int64_t, int64_t c, int64_t from, int64_t to) {
    const Lanes<A> slope = vector_of(f.slope + c), shift = vector_of(f.shift + c), mean = vector_of(p.mean + c);
    const Lanes<A> of_shift = vector_of(p.of_shift + c), of_scale = vector_of(p.of_scale + c);
    for (int64_t i = from; i < to; i += f.channels) {
      const Lanes<A> through = passed(p, i, slope, shift), deviation = vector_of(f.x + i) - mean;
      if (p.through) vector_of(p.through + i) = through;
      vector_of(p.grad_x + i) = slope * through - of_shift - of_scale * deviation;
    }
  });
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
