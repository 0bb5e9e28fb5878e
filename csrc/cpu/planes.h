// Slices of channels (N, C, H, W) as kernels take them: pixels and channels contiguous, images any distance apart.
#pragma once

#include "host.h"

namespace dsc::cpu {

inline void check_planes(const Tensor& x, const char* name = "x") {
  STD_TORCH_CHECK(x.dim() == 4, "dsc_ops: ", name, " must be (N, C, H, W)");
}

inline bool has_planes(const Tensor& x) {
  return (x.size(3) <= 1 || x.stride(3) == 1) && (x.size(2) <= 1 || x.stride(2) == x.size(3)) &&
         (x.size(1) <= 1 || x.stride(1) == x.size(2) * x.size(3));
}

// What a kernel writes to.
inline void check_written(const Tensor& out, const char* name) {
  check_planes(out, name);
  STD_TORCH_CHECK(out.numel() == 0 || (has_planes(out) &&
                                       (out.size(0) == 1 || out.stride(0) >= out.size(1) * out.size(2) * out.size(3))),
                  "dsc_ops: ", name, " must have contiguous planes");
}

// x where its planes are contiguous, else a copy.
inline Tensor with_planes(const Tensor& x) { return has_planes(x) ? x : torch::stable::contiguous(x); }

template <typename T>
Channels<T> channels_of_planes(const Tensor& x) {
  return {data<const T>(x), x.stride(0), x.size(0), x.size(2) * x.size(3)};
}

inline ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace dsc::cpu
