// The l1 penalty at one instruction set level: sum |x| and the count of |x| > alpha in one pass; its gradient in
// another.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// Adds to the sum and the count.
template <typename A>
__attribute__((noinline)) void l1_norm_piece(const A* x, int64_t size, A alpha, double* sum, int64_t* count) {
  using V = Lanes<A>;
  LaneSums<A> sums = {};
  LaneMask<A> counts[sum_lanes / Vector<A>::lanes] = {};
  for_each_lane<A>(
      size,
      [&](int64_t i, int v) {
        const V value = lanes_at(x + i), magnitude = value < A(0) ? -value : value;
        sums.v[v] += magnitude;
        counts[v] -= magnitude > alpha;
      },
      [&](int64_t i, int64_t lane) {
        const A magnitude = x[i] < A(0) ? -x[i] : x[i];
        sums.lane[lane] += magnitude;
        *count += magnitude > alpha;
      });
  *sum += sums.total();
  for (const auto& each : counts)
    for (int i = 0; i < Vector<A>::lanes; ++i) *count += each[i];
}

// Calls f(piece) for elements [begin, end), whose channels do not matter.
template <typename F>
DSC_HOST_DEVICE void for_each_piece(int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin; at < end; at += piece_elements)
    f(Piece{at, end - at < piece_elements ? end - at : piece_elements, 0, 0});
}

template <typename T>
void l1_norm_tasks(const L1Norm<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * elementwise_run;
    const int64_t last = first + elementwise_run < p.size ? first + elementwise_run : p.size;
    double sum = 0;
    int64_t count = 0;
    for_each_piece(first, last, [&](const Piece& piece) {
      const Widened<T> x(p.x, piece);
      l1_norm_piece(x.get(), piece.size, static_cast<A>(p.alpha), &sum, &count);
    });
    p.sums[task] = sum;
    p.counts[task] = count;
  }
}

template <typename A>
__attribute__((noinline)) void l1_norm_backward_piece(const A* x, int64_t size, A grad, A* __restrict grad_x) {
  for (int64_t i = 0; i < size; ++i) grad_x[i] = sign_times(x[i], grad);
}

template <typename T>
void l1_norm_backward_range(const L1NormBackward<T>& p, int64_t begin, int64_t end) {
  for_each_piece(begin, end, [&](const Piece& piece) {
    const Widened<T> x(p.x, piece);
    Rounded<T> grad_x(p.grad_x, piece);
    l1_norm_backward_piece(x.get(), piece.size, p.grad, grad_x.get());
    grad_x.finish();
  });
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
