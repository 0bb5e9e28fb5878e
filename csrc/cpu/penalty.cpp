// l1_norm and its backward on the CPU. The sum does not depend on the order of the elements in memory, so any dense
// tensor is read as it stands; partial sums are added in double, in a fixed order.
#include "layout.h"

namespace dsc::cpu {
namespace {

std::tuple<Tensor, Tensor> l1_norm_cpu(const Tensor& x, double alpha) {
  const Tensor values = dense_layout(x).values(x);
  const int64_t tasks = (x.numel() + elementwise_run - 1) / elementwise_run;
  std::vector<double> sums(tasks);
  std::vector<int64_t> counts(tasks);
  const bool wide = x.scalar_type() == ScalarType::Double;
  const Tensor norm = torch::stable::new_empty(x, {}, wide ? ScalarType::Double : ScalarType::Float);
  const Tensor count = torch::stable::new_empty(x, {}, ScalarType::Long);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const L1Norm<T> problem = {x.numel(), data<const T>(values), alpha, sums.data(), counts.data()};
    parallel(tasks, 2, [&](int64_t begin, int64_t end) { kernels<T>().l1_norm(problem, begin, end); });
    double total = 0;
    for (double sum : sums) total += sum;
    *data<accumulate_t<T>>(norm) = static_cast<accumulate_t<T>>(total);
  });
  *data<int64_t>(count) = 0;
  for (int64_t part : counts) *data<int64_t>(count) += part;
  return {norm, count};
}

Tensor l1_norm_backward_cpu(const Tensor& grad, const Tensor& x) {
  check_l1_norm_backward(grad, x);
  const Dense dense = dense_layout(x);
  const Tensor values = dense.values(x), out = dense.empty(x);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Tensor scale = widened<T>(grad);
    const L1NormBackward<T> problem = {data<const T>(values), *data<const accumulate_t<T>>(scale), data<T>(out)};
    parallel(x.numel(), 2 * elementwise_run,
             [&](int64_t begin, int64_t end) { kernels<T>().l1_norm_backward(problem, begin, end); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("l1_norm", TORCH_BOX(&l1_norm_cpu));
  library.impl("l1_norm_backward", TORCH_BOX(&l1_norm_backward_cpu));
}

}  // namespace dsc::cpu
