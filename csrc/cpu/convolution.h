// Convolutions over raw memory on the CPU: packs the weights as the kernels read them and spreads the tasks over
// threads. Used by the convolution operators and by lista.
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

// A weight as the analysis kernel reads it, and as the synthesis kernel does.
template <typename T>
Buffer<accumulate_t<T>> pack_for_analysis(const Geometry& geometry, const T* weight);
template <typename T>
Buffer<accumulate_t<T>> pack_for_synthesis(const Geometry& geometry, const T* weight);

// problem.geometry, .signal, .weight (packed) and the epilogue's fields are the caller's.
template <typename T>
void run_analysis(const Analysis<T>& problem);

// signal += alpha S_W(codes)
template <typename T>
void run_synthesis(const Geometry& geometry, const T* codes, const accumulate_t<T>* packed_weight,
                   accumulate_t<T> alpha, accumulate_t<T>* signal);

// grad_weight += alpha corr(signal, codes), unpacked: (M, C/groups, *kernel)
template <typename T>
void run_correlation(const Geometry& geometry, const accumulate_t<T>* signal, const T* codes, accumulate_t<T> alpha,
                     accumulate_t<T>* grad_weight);

// Rounds accumulated values to a tensor of T.
template <typename T>
void round_to(const accumulate_t<T>* values, const Tensor& out);

}  // namespace dsc::cpu
