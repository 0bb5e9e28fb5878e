// The backward of the soft threshold, which the backwards of conv_soft_threshold and lista begin with.
#pragma once

#include <tuple>

#include "host.h"

namespace dsc::cpu {

// (grad_u, grad_theta, grad_bias), as the operator soft_threshold_backward in ops.cpp.
std::tuple<Tensor, Tensor, Tensor> soft_threshold_backward_cpu(const Tensor& grad, const Tensor& codes,
                                                               const Tensor& theta, bool one_sided);

}  // namespace dsc::cpu
