// The l1 penalty at one instruction set level: sum |x| and the count of |x| > alpha in one pass; its gradient in
// another.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

template <typename T>
void l1_norm_tasks(const L1Norm<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const A alpha = static_cast<A>(p.alpha);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * elementwise_run;
    const int64_t last = first + elementwise_run < p.size ? first + elementwise_run : p.size;
    int64_t count = 0;
    p.sums[task] = sum_over<A>(first, last, [&](int64_t i) {
      const A x = load(p.x[i]), magnitude = x < A(0) ? -x : x;
      count += magnitude > alpha;
      return magnitude;
    });
    p.counts[task] = count;
  }
}

template <typename T>
void l1_norm_backward_range(const L1NormBackward<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    p.grad_x[i] = store<T>(sign_times<A>(load(p.x[i]), p.grad));
  }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
