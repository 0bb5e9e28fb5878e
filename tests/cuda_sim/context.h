// A suspended computation on a stack of its own, and the switch from one to another.
//
// On x86-64 a switch saves what a called function has to keep, six registers, and takes a few nanoseconds; elsewhere,
// or with CUDA_SIM_UCONTEXT defined, ucontext.h does it, which asks the kernel to save a signal mask each time.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(CUDA_SIM_UCONTEXT)
#define CUDA_SIM_UCONTEXT
#endif

#if defined(CUDA_SIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_sim {

#if defined(CUDA_SIM_UCONTEXT)

class Context {
 public:
  // The next switch to this context calls entry, which must not return, on the stack given.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&registers_);
    registers_.uc_stack.ss_sp = stack;
    registers_.uc_stack.ss_size = bytes;
    makecontext(&registers_, entry, 0);
  }

  static void swap(Context& from, Context& to) { swapcontext(&from.registers_, &to.registers_); }

 private:
  ucontext_t registers_{};
};

#else

extern "C" void cuda_sim_swap(void** from_stack_pointer, void* to_stack_pointer) __attribute__((visibility("hidden")));

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // What cuda_sim_swap pops: six registers and entry's address. Above it a place for entry's own return address, such
    // that it is where a call would have put it, 8 below a multiple of 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
  }

  static void swap(Context& from, Context& to) { cuda_sim_swap(&from.stack_pointer_, to.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
};

#endif

}  // namespace cuda_sim
