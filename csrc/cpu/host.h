// What the operator files share on the host side: from torch's stable tensors to raw memory, and threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"

namespace dsc::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct DType;
template <>
struct DType<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct DType<double> {
  static constexpr ScalarType value = ScalarType::Double;
};

// Calls f(T()) for the element type T of a tensor.
template <typename F>
auto visit_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(bfloat16());
    case ScalarType::Half:
      return f(float16());
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "dsc_ops: an operator takes float32, float64, bfloat16 or float16");
      return f(float());
  }
}

inline void check_dtype(const Tensor& model, const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type(), "dsc_ops: ", name,
                  " has another dtype than the first argument");
  STD_TORCH_CHECK(tensor.is_cpu(), "dsc_ops: ", name, " is not on the CPU");
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A tensor's values as contiguous accumulate_t<T>; the tensor itself where it is that already.
template <typename T>
Tensor widened(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, DType<accumulate_t<T>>::value));
}

inline std::vector<int64_t> sizes(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

inline Tensor contiguous_empty_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, sizes(tensor)); }

// Uninitialised memory, aligned for every vector width.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(padded(size * sizeof(T) + 64, 64))))) {
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Tasks that one thread should have at least, so that waking it pays: about 10 microseconds of multiplications.
inline int64_t grain_of(int64_t products_per_task) {
  constexpr int64_t least = 100000;
  return std::max<int64_t>(1, least / std::max<int64_t>(1, products_per_task));
}

// Runs body(begin, end) over [0, size) on torch's threads, at least `grain` each.
template <typename Body>
void parallel(int64_t size, int64_t grain, const Body& body) {
  if (size > 0) torch::stable::parallel_for(0, size, grain, body);
}

}  // namespace dsc::cpu
