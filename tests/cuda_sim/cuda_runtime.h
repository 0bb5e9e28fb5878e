// CUDA on a CPU: what kernels find under the name cuda_runtime.h when a host compiler compiles them.
//
// A launch runs its blocks one after another in random order. In a block every CUDA thread is a coroutine (a fiber)
// that runs until it meets __syncthreads or ends; the order of the threads is drawn anew between any two barriers. So a
// result that depends on an order differs from seed to seed. What a GPU leaves undefined is an error here: a barrier
// that not every thread reaches, and, in shared memory, an access out of bounds, a read of what nobody wrote, and two
// accesses between the same barriers, by different threads and at least one a write (the barrier being the only
// synchronisation). Out of bounds in global memory is the affair of -fsanitize=address, which is told of the fibers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __syncthreads() ::cuda_sim::executor.barrier(__LINE__)
#define DSC_SHARED(type, name, length)                       \
  static ::cuda_sim::SharedArray<type, length> name##_cells; \
  auto& name = name##_cells.in_this_block()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_sim {

constexpr size_t stack_bytes = 64 * 1024;

// Runs threads to their ends, one after another, until one of them has to wait: it then sleeps on this fiber's stack.
struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* sanitizer_stack = nullptr;
  unsigned thread = 0;
  int line = 0;  // of the barrier it waits at
};

class Executor {
 public:
  std::mt19937_64 random;
  std::string error;      // the first one of the last launch, empty if none
  uint64_t block = 0;     // serial number of the block that runs
  uint64_t barriers = 0;  // passed so far, in all blocks

  template <typename Body>
  cudaError_t launch(dim3 grid, dim3 threads, const Body& kernel) {
    error.clear();
    gridDim = grid;
    blockDim = threads;
    body_ = [](const void* k) { (*static_cast<const Body*>(k))(); };
    kernel_ = &kernel;
    for (const unsigned index : shuffled(grid.x)) {
      blockIdx = dim3(index, 0, 0);
      run_block();
    }
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
  }

  void barrier(int line) {
    current_->line = line;
    waiting_.push_back(current_);
    leave_fiber(&current_->sanitizer_stack);
  }

  void fail(const std::string& message) {
    if (error.empty())
      error = message + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread()) + ")";
  }

  unsigned thread() const { return current_->thread; }

 private:
  std::vector<unsigned> shuffled(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
    return order;
  }

  void run_block() {
    ++block;
    ++barriers;
    waiting_.clear();
    used_ = 0;
    unstarted_ = shuffled(blockDim.x);
    while (!unstarted_.empty()) start(fresh_fiber());
    while (!waiting_.empty() && all_at_one_barrier()) {
      ++barriers;
      std::shuffle(waiting_.begin(), waiting_.end(), random);
      for (Fiber* fiber : std::exchange(waiting_, {})) enter(*fiber);
    }
  }

  bool all_at_one_barrier() {
    current_ = waiting_.front();
    if (waiting_.size() != blockDim.x) {
      fail("only " + std::to_string(waiting_.size()) + " threads reach __syncthreads in line " +
           std::to_string(current_->line));
      return false;
    }
    for (const Fiber* fiber : waiting_) {
      if (fiber->line == current_->line) continue;
      fail("threads wait in lines " + std::to_string(current_->line) + " and " + std::to_string(fiber->line));
      return false;
    }
    return true;
  }

  Fiber& fresh_fiber() {
    if (used_ == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
    return *fibers_[used_++];
  }

  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, &Executor::run_threads, 0);
    enter(fiber);
  }

  static void run_threads();

  void enter(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = dim3(fiber.thread, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), stack_bytes);
#endif
    swapcontext(&scheduler_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  // Back to the scheduler; sanitizer_stack is null when the fiber is not to be entered again.
  void leave_fiber([[maybe_unused]] void** sanitizer_stack) {
    Fiber& fiber = *current_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(sanitizer_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  void (*body_)(const void*) = nullptr;
  const void* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t used_ = 0;
  Fiber* current_ = nullptr;
  std::vector<unsigned> unstarted_;
  std::vector<Fiber*> waiting_;
  ucontext_t scheduler_{};
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

inline Executor executor;

inline void Executor::run_threads() {
  Executor& self = executor;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
#endif
  while (!self.unstarted_.empty()) {
    self.current_->thread = self.unstarted_.back();
    self.unstarted_.pop_back();
    threadIdx = dim3(self.current_->thread, 0, 0);
    self.body_(self.kernel_);
  }
  self.leave_fiber(nullptr);
}

// An element of shared memory with what is needed to tell whether an access is ordered after the others.
template <typename T>
class Cell {
 public:
  void forget() {
    std::memset(&value_, 0xff, sizeof(T));  // NaN
    written_ = read_ = 0;
  }

  operator T() const {
    const unsigned thread = executor.thread();
    if (written_ == 0) executor.fail("read of shared memory that no thread wrote");
    if (written_ == executor.barriers && writer_ != thread) executor.fail("race: read of what another thread wrote");
    reader_ = read_ == executor.barriers && reader_ != thread ? several : thread;
    read_ = executor.barriers;
    return value_;
  }

  Cell& operator=(T value) {
    const unsigned thread = executor.thread();
    if (written_ == executor.barriers && writer_ != thread) executor.fail("race: write over what another thread wrote");
    if (read_ == executor.barriers && reader_ != thread) executor.fail("race: write over what another thread read");
    writer_ = thread;
    written_ = executor.barriers;
    value_ = value;
    return *this;
  }

  Cell& operator=(const Cell& other) { return *this = static_cast<T>(other); }
  Cell& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

 private:
  static constexpr unsigned several = ~0u;
  T value_;
  unsigned writer_ = 0;
  uint64_t written_ = 0;  // the value of executor.barriers then, 0 for never in this block
  mutable unsigned reader_ = 0;
  mutable uint64_t read_ = 0;
};

template <typename T, int64_t length>
class SharedArray {
 public:
  SharedArray& in_this_block() {
    if (block_ != executor.block) {
      for (Cell<T>& cell : cells_) cell.forget();
      block_ = executor.block;
    }
    return *this;
  }

  Cell<T>& operator[](int64_t i) {
    if (i >= 0 && i < length) return cells_[i];
    executor.fail("shared memory index " + std::to_string(i) + " of " + std::to_string(length));
    return cells_[0];
  }

 private:
  uint64_t block_ = 0;
  Cell<T> cells_[length];
};

}  // namespace cuda_sim

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  return cuda_sim::executor.launch(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}
