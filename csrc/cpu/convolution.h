// The shape of a convolution on the CPU, checked.
#pragma once

#include "host.h"

namespace dsc::cpu {

// Checks what memory safety needs and completes the shape of the convolution between a signal (N, C, *) and a weight
// (M, C/groups, *), each with one or two spatial axes.
Geometry make_geometry(const std::vector<int64_t>& signal, const std::vector<int64_t>& weight,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups);

// Shape of the code tensor, with as many axes as the weight.
std::vector<int64_t> code_shape(const Geometry& geometry, int64_t dim);

// Accumulated values (of T's accumulate_t) as a tensor of the model's dtype; the same tensor where it is that already.
template <typename T>
Tensor rounded(const Tensor& model, const Tensor& values);

}  // namespace dsc::cpu
