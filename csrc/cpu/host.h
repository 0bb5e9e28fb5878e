// What the operator files share on the host side: from torch's stable tensors to raw memory, and threads.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
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

// Asks for large pages where the system gives them on request: memory that a call writes for the first time costs a
// page fault for every page.
constexpr int64_t large_page = int64_t{2} << 20;
inline void use_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr auto page = static_cast<uintptr_t>(large_page);
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Uninitialised memory, aligned for every vector width.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    // Of many large pages only whole ones: what lies in others costs a fault every few thousand bytes.
    const int64_t needed = size * static_cast<int64_t>(sizeof(T)) + 64;
    const int64_t alignment = needed >= 4 * large_page ? large_page : 64, bytes = padded(needed, alignment);
    memory_.reset(static_cast<T*>(std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes))));
    if (!memory_) throw std::bad_alloc();
    use_large_pages(memory_.get(), bytes);
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

// Runs tasks of unequal length, [0, size): each thread has a range of them, and one that is done takes over what others
// have not begun. start() gives a thread its task(i).
template <typename Start>
void parallel_tasks(int64_t size, int64_t grain, const Start& start) {
  std::vector<std::atomic<bool>> taken(static_cast<size_t>(size));
  parallel(size, grain, [&](int64_t begin, int64_t end) {
    auto task = start();
    const auto take = [&](int64_t i) {
      if (!taken[static_cast<size_t>(i)].exchange(true, std::memory_order_relaxed)) task(i);
    };
    for (int64_t i = begin; i < end; ++i) take(i);
    for (int64_t i = size; i-- > 0;) take(i);  // of the others those first that they come to last
  });
}

}  // namespace dsc::cpu
