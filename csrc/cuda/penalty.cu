// l1_norm and its backward, from tensors to kernels (penalty_kernels.cuh).
#include <tuple>

#include "launch.h"
#include "penalty_kernels.cuh"

namespace dsc::cuda {
namespace {

// Elements that accesses of 16 bytes can visit.
template <typename T>
int64_t whole_vectors(const Tensor& x, bool aligned) {
  return aligned ? x.numel() - x.numel() % vector_elements<T> : 0;
}

std::tuple<Tensor, Tensor> l1_norm(const Tensor& x, double alpha) {
  const DeviceGuard guard(x.get_device_index());
  const Tensor dense_x = torch::stable::contiguous(x, memory_format(x));
  const int64_t blocks = flat_blocks(x.numel());
  const Tensor norms = empty(x, {blocks}, accumulate_dtype(x)), counts = empty(x, {blocks}, ScalarType::Long);
  const Tensor norm = empty(x, {}, accumulate_dtype(x)), count = empty(x, {}, ScalarType::Long);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    if (blocks > 0)
      launch(x, dim3(unsigned(blocks)), 0, l1_norm_kernel<T>, data<T>(dense_x), whole_vectors<T>(x, aligned(dense_x)),
             x.numel(), alpha, mutable_data<A>(norms), mutable_data<int64_t>(counts));
    sum_partials<A, A>(norms, norm);
  });
  sum_partials<int64_t, int64_t>(counts, count);
  return {norm, count};
}

Tensor l1_norm_backward(const Tensor& grad, const Tensor& x) {
  check_l1_norm_backward(grad, x);
  const DeviceGuard guard(x.get_device_index());
  const MemoryFormat format = memory_format(x);
  const Tensor dense_x = torch::stable::contiguous(x, format);
  const Tensor grad_x = empty_like(x, format);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    launch(x, flat_blocks(x.numel()), l1_norm_backward_kernel<T>, data<accumulate_t<T>>(grad), data<T>(dense_x),
           whole_vectors<T>(x, aligned(dense_x) && aligned(grad_x)), x.numel(), mutable_data<T>(grad_x));
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("l1_norm", TORCH_BOX(&l1_norm));
  library.impl("l1_norm_backward", TORCH_BOX(&l1_norm_backward));
}

}  // namespace dsc::cuda
