// What the operator files share on the host side: from torch's stable tensors to raw memory, and threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../core/tensors.h"
#include "dispatch.h"

namespace dsc::cpu {

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

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A tensor's values as contiguous accumulate_t<T>; the tensor itself where it is that already.
template <typename T>
Tensor widened(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, DType<accumulate_t<T>>::value));
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
