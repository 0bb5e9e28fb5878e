// The l1 penalty at one instruction set level: sum |x| and the count of |x| > alpha in one pass; its gradient in
// another.
#pragma once

#include "threshold_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

template <typename T>
void l1_norm_tasks(const L1Norm<T>& p, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  const A alpha = static_cast<A>(p.alpha);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * elementwise_run;
    const int64_t last = first + elementwise_run < p.size ? first + elementwise_run : p.size;
    double sum = 0;
    int64_t count = 0;
    LaneSums<A> sums = {};
    LaneMask<A> counts[sum_lanes / Vector<A>::lanes] = {};  // of a block
    for_each_lane<A>(
        first, last,
        [&](int64_t i, int v) {
          const V x = load_vector(p.x + i), magnitude = x < A(0) ? -x : x;
          sums.v[v] += magnitude;
          counts[v] -= magnitude > alpha;
        },
        [&](int64_t i, int64_t lane) {
          const A x = load(p.x[i]), magnitude = x < A(0) ? -x : x;
          sums.lane[lane] += magnitude;
          count += magnitude > alpha;
        },
        [&] {
          for (int64_t lane = 0; lane < sum_lanes; ++lane) sum += sums.lane[lane];
          for (auto& each : counts)
            for (int i = 0; i < Vector<A>::lanes; ++i) count += each[i];
          sums = {};
          for (auto& each : counts) each = LaneMask<A>{};
        });
    p.sums[task] = sum;
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
