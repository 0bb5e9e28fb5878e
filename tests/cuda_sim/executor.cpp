// How a block runs. Every thread that has begun and not ended has a fiber, a stack of its own. A thread runs until it
// has to wait, at a barrier or for the other lanes of its mask, and then another one that is ready continues, drawn at
// random: one switch, from fiber to fiber. The last lane to arrive at an operation of its warp does it for all lanes. A
// fiber whose thread has ended takes the next thread that has not begun, so that kernels without barriers need one.
// When no thread is ready, the host's stack continues: all threads are at the barrier, or have ended, or the block is
// stuck.
//
// Nothing interrupts a thread between two such points, so that a race shows in results only when one of them lies
// between its accesses. race_checker.cpp finds the others.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "context.h"
#include "observer.h"
#include "symbols.h"
#include "tensor_core.h"

#if !defined(CUDA_SIM_UCONTEXT)
__asm__(R"(
.text
.globl cuda_sim_swap
.hidden cuda_sim_swap
.type cuda_sim_swap, @function
cuda_sim_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_sim_swap, . - cuda_sim_swap
)");
#endif

// The address sanitizer is there when what is linked with this was compiled with it.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* saved, const void** bottom, size_t* bytes);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* begin, size_t bytes);
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t bytes);
}

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace cuda_sim {

uint64_t current_block = 0;
Observer* observer = nullptr;
bool in_thread = false;

namespace {

constexpr unsigned most_threads = 1024, most_warps = most_threads / warp_threads;
constexpr size_t stack_bytes = 128 * 1024, guard_bytes = 16 * 1024, red_zone = 256, arena_bytes = 512 * 1024;
constexpr unsigned char unset = 0xff;  // all ones is NaN in every floating type

void poison(const void* begin, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
}

void unpoison(const void* begin, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(begin, bytes);
}

char* allocate_pages(size_t bytes) {
  void* const pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) std::abort();
  return static_cast<char*>(pages);
}

std::string text(const Place& place) {
  const std::string path = place.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// "0, 4-7" for a mask of lanes.
std::string list(unsigned mask) {
  std::string out;
  for (unsigned lane = 0; lane < warp_threads; ++lane) {
    if (!(mask >> lane & 1)) continue;
    unsigned last = lane;
    while (last + 1 < warp_threads && mask >> (last + 1) & 1) ++last;
    out += (out.empty() ? "" : ", ") + std::to_string(lane) + (last > lane ? "-" + std::to_string(last) : "");
    lane = last;
  }
  return out;
}

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::shuffle:
      return "a shuffle";
    case Operation::ballot:
      return "a ballot";
    case Operation::sync:
      return "__syncwarp";
    default:
      return "mma";
  }
}

class Random {
 public:
  void seed(uint64_t value) {
    state_ = value * 0x9e3779b97f4a7c15u + 0x853c49e6748fea9bu;
    for (int i = 0; i < 4; ++i) next();
  }

  uint32_t next() {  // xorshift*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
  }

  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[next() % i]);
  }

 private:
  uint64_t state_ = 0x853c49e6748fea9bu;
};

// One of the bits of a mask that is not 0.
unsigned pick_bit(unsigned mask, unsigned random) {
  const unsigned turn = random % 32, turned = turn == 0 ? mask : mask >> turn | mask << (32 - turn);
  return (static_cast<unsigned>(__builtin_ctz(turned)) + turn) % 32;
}

struct Fiber {
  Context context;
  char* stack = nullptr;
  size_t bytes = 0;
  void* sanitizer_stack = nullptr;
  bool prepared = false;
};

struct Copy {
  void* shared;
  const void* global;
  int group;
  Place place;
  const void* code;
};

struct Thread {
  Fiber* fiber = nullptr;  // none before it begins
  std::vector<Copy> copies;
  int group = 0;  // of the copies since its last commit
};

struct MmaOperands {
  float* d;
  const unsigned* a;
  const unsigned* b;
};

struct Warp {
  unsigned threads, ready, waiting, at_barrier, ended;  // bits by lane
  // What a waiting lane brings.
  unsigned mask[warp_threads];
  Operation operation[warp_threads];
  Place place[warp_threads];
  uint64_t value[warp_threads];
  unsigned source[warp_threads];
  MmaOperands operands[warp_threads];
  // What it gets.
  uint64_t result[warp_threads];
};

class Executor {
 public:
  Random random;
  uint64_t switches = 0;
  std::string complaint;
  std::vector<SharedRange> shared;
  std::mutex mutex;

  bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, const Body& body) {
    complaint.clear();
    body_ = body;
    dynamic_bytes_ = dynamic_bytes;
    gridDim = grid;
    blockDim = block;
    if (stacks_ == nullptr) {
      stacks_ = allocate_pages(most_threads * stack_bytes);
      arena_ = allocate_pages(arena_bytes);
      poison(arena_, arena_bytes);
    }
    if (observer) observer->begin_launch();
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    random.shuffle(order);
    for (const uint64_t i : order) {
      blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                  static_cast<unsigned>(i / grid.x / grid.y)};
      run_block();
      if (!complaint.empty()) break;
    }
    if (observer) observer->end_launch();
    if (!complaint.empty()) discard_fibers();
    return complaint.empty();
  }

  // --- called by threads ---------------------------------------------------------------------------------------------

  void fail(const std::string& message) {
    if (complaint.empty()) {
      complaint = message + " (kernel " + function_of(body_.kernel) + ", block (" + std::to_string(blockIdx.x) + ", " +
                  std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
      complaint += (in_thread ? ", thread " + std::to_string(threadIdx.x) : "") + ")";
    }
    if (in_thread) switch_to(host_);  // for good
  }

  void barrier(const Place& place) {
    if (at_barrier_ == 0) barrier_place_ = place;
    if (place.line() != barrier_place_.line())
      fail("threads of a block wait at different barriers, " + text(barrier_place_) + " and " + text(place));
    ++at_barrier_;
    warp().at_barrier |= lane_bit();
    leave();
  }

  uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const Place& place) {
    if (mask & lane_bit() && !(mask >> source & 1))
      fail("a shuffle in " + text(place) + " reads lane " + std::to_string(source) + ", which its mask " +
           hexadecimal(mask) + " leaves out");
    Warp& mine = warp();
    const unsigned me = lane();
    mine.value[me] = value;
    mine.source[me] = source;
    meet(mask, Operation::shuffle, place);
    return mine.result[me];
  }

  unsigned ballot(unsigned mask, bool predicate, const Place& place) {
    Warp& mine = warp();
    const unsigned me = lane();
    mine.value[me] = predicate;
    meet(mask, Operation::ballot, place);
    return static_cast<unsigned>(mine.result[me]);
  }

  void mma(Operation kind, const MmaOperands& operands, const Place& place) {
    warp().operands[lane()] = operands;
    meet(all_lanes, kind, place);
  }

  // All lanes of the mask wait for each other in one operation; the last one performs it.
  void meet(unsigned mask, Operation operation, const Place& place) {
    Warp& mine = warp();
    const unsigned me = lane(), bit = lane_bit();
    if (!(mask & bit) || mask & (~mine.threads | mine.ended)) refuse_mask(mine, mask, operation, place);
    mine.mask[me] = mask;
    mine.operation[me] = operation;
    mine.place[me] = place;
    mine.waiting |= bit;
    if ((mine.waiting & mask) != mask || !agree(mine, mask, me)) {
      leave();
      return;
    }
    perform(mine, mask, operation);
    mine.waiting &= ~mask;
    wake(warp_, mask & ~bit);
    if (random.next() % 8 == 0) {  // the last one is not always the first to go on
      wake(warp_, bit);
      leave();
    }
  }

  void copy_async(void* to, const void* from, const Place& place, const void* code) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
      fail("misaligned copy_async16 in " + text(place));
    if (!inside_shared(to, 16)) fail("copy_async16 in " + text(place) + " writes outside of shared memory");
    if (in_arena(from)) fail("copy_async16 in " + text(place) + " reads shared memory, not global");
    check_addressable(from, 16, place);
    if (observer) observer->copy_issued(to, from, code);
    std::memset(to, unset, 16);  // what a GPU leaves there until the copy lands nobody knows
    Thread& mine = thread();
    mine.copies.push_back({to, from, mine.group, place, code});
  }

  void copy_async_commit() { ++thread().group; }

  void copy_async_wait(int pending) {
    Thread& mine = thread();
    auto copy = mine.copies.begin();
    for (; copy != mine.copies.end() && copy->group < mine.group - pending; ++copy) {
      if (observer) observer->copy_landed(copy->shared, copy->global, copy->code);
      std::memcpy(copy->shared, copy->global, 16);
    }
    mine.copies.erase(mine.copies.begin(), copy);
  }

  void access(const void* address, size_t bytes, Access kind, const Place& place, const void* code) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
      fail("misaligned access of " + std::to_string(bytes) + " bytes in " + text(place));
    if (in_arena(address) && !inside_shared(address, bytes))
      fail("access of " + std::to_string(bytes) + " bytes beyond shared memory in " + text(place));
    check_addressable(address, bytes, place);
    if (observer) observer->access(address, bytes, kind, code);
  }

  void place_shared(SharedSlot& slot, size_t bytes, size_t alignment, const char* name, const Place& place) {
    static_bytes_ = (static_bytes_ + alignment - 1) / alignment * alignment + bytes;
    if (static_bytes_ > default_shared_bytes)
      fail("more than 48 KB of shared memory declared, at last in " + text(place));
    if (static_bytes_ + dynamic_bytes_ > most_shared_bytes)
      fail("more than 227 KB of shared memory in one block, at last in " + text(place));
    slot.address = carve(bytes, alignment, name, place);
    slot.block = current_block;
  }

  void* dynamic_shared() const { return dynamic_; }

  char* arena() const { return arena_; }
  bool in_arena(const void* address) const { return address >= arena_ && address < arena_ + arena_bytes; }
  bool on_a_fiber(const void* address) const {
    return address >= stacks_ && address < stacks_ + most_threads * stack_bytes;
  }

 private:
  // --- one block -----------------------------------------------------------------------------------------------------

  void run_block() {
    ++current_block;
    const unsigned count = blockDim.x;
    warps_in_block_ = (count + warp_threads - 1) / warp_threads;
    ready_warps_ = 0;
    at_barrier_ = ended_ = 0;
    for (unsigned w = 0; w < warps_in_block_; ++w) {
      const unsigned lanes = std::min(warp_threads, count - w * warp_threads);
      Warp& warp = warps_[w];
      warp.threads = lanes == warp_threads ? all_lanes : (1u << lanes) - 1;
      warp.ready = warp.waiting = warp.at_barrier = warp.ended = 0;
      wake(w, warp.threads);
    }
    for (unsigned t = 0; t < count; ++t) {
      threads_[t].fiber = nullptr;
      threads_[t].copies.clear();
      threads_[t].group = 0;
    }
    shared.clear();
    used_ = static_bytes_ = 0;
    if (observer) observer->begin_block();
    dynamic_ = carve(dynamic_bytes_, 16, "of dynamic size", Place());
    while (complaint.empty() && ended_ < count) {
      if (Thread* const next = choose()) {
        if (!next->fiber) next->fiber = take_fiber();
        switch_to(*next->fiber);
      } else if (at_barrier_ == count) {
        pass_barrier();
      } else {
        fail(describe_stall());
      }
    }
    if (complaint.empty()) check_red_zones();
  }

  void pass_barrier() {
    if (observer) observer->barrier();
    at_barrier_ = 0;
    for (unsigned w = 0; w < warps_in_block_; ++w) {
      warps_[w].at_barrier = 0;
      wake(w, warps_[w].threads);
    }
  }

  std::string describe_stall() const {
    for (unsigned w = 0; w < warps_in_block_; ++w) {
      const Warp& warp = warps_[w];
      if (!warp.waiting) continue;
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(warp.waiting)), mask = warp.mask[lane];
      std::string out = "warp " + std::to_string(w) + " is stuck: lane " + std::to_string(lane) + " waits in " +
                        name_of(warp.operation[lane]) + " in " + text(warp.place[lane]) +
                        " for the lanes of its mask " + hexadecimal(mask);
      if (mask & warp.ended) out += "; ended: " + list(mask & warp.ended);
      if (mask & warp.at_barrier) out += "; at __syncthreads: " + list(mask & warp.at_barrier);
      for (unsigned other = 0; other < warp_threads; ++other) {
        if (!(warp.waiting & mask) || !(warp.waiting >> other & 1) || same(warp, lane, other)) continue;
        return out + "; lane " + std::to_string(other) + " waits in " + name_of(warp.operation[other]) + " in " +
               text(warp.place[other]) + " with mask " + hexadecimal(warp.mask[other]);
      }
      return out;
    }
    return "only " + std::to_string(at_barrier_) + " of " + std::to_string(blockDim.x) +
           " threads reach __syncthreads in " + text(barrier_place_);
  }

  // --- the operations of a warp --------------------------------------------------------------------------------------

  static bool same(const Warp& warp, unsigned a, unsigned b) {
    return warp.mask[a] == warp.mask[b] && warp.operation[a] == warp.operation[b] &&
           warp.place[a].line() == warp.place[b].line();
  }

  static bool agree(const Warp& warp, unsigned mask, unsigned lane) {
    for (; mask; mask &= mask - 1)
      if (!same(warp, static_cast<unsigned>(__builtin_ctz(mask)), lane)) return false;
    return true;
  }

  void perform(Warp& warp, unsigned mask, Operation operation) {
    switch (operation) {
      case Operation::shuffle:
        for (unsigned left = mask; left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          warp.result[lane] = warp.value[warp.source[lane]];
        }
        return;
      case Operation::ballot: {
        uint64_t bits = 0;
        for (unsigned left = mask; left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          bits |= warp.value[lane] << lane;
        }
        for (unsigned left = mask; left; left &= left - 1) warp.result[__builtin_ctz(left)] = bits;
        return;
      }
      case Operation::sync:
        if (observer) observer->sync_warp(warp_, mask);
        return;
      default:
        multiply(warp, operation);
    }
  }

  static void multiply(const Warp& warp, Operation operation) {
    float* d[warp_threads];
    const unsigned *a[warp_threads], *b[warp_threads];
    for (unsigned lane = 0; lane < warp_threads; ++lane) {
      d[lane] = warp.operands[lane].d;
      a[lane] = warp.operands[lane].a;
      b[lane] = warp.operands[lane].b;
    }
    if (operation == Operation::mma_tf32) multiply_tf32(d, a, b);
    if (operation == Operation::mma_bf16) multiply_bf16(d, a, b);
    if (operation == Operation::mma_f16) multiply_f16(d, a, b);
  }

  void refuse_mask(const Warp& warp, unsigned mask, Operation operation, const Place& place) {
    const std::string what = std::string(name_of(operation)) + " in " + text(place) + ": its mask " + hexadecimal(mask);
    if (!(mask & lane_bit())) fail(what + " leaves out the thread that calls, lane " + std::to_string(lane()));
    if (mask & ~warp.threads) fail(what + " names lanes beyond the block, " + list(mask & ~warp.threads));
    fail(what + " names lanes that have ended, " + list(mask & warp.ended));
  }

  // --- who runs ------------------------------------------------------------------------------------------------------

  Warp& warp() { return warps_[warp_]; }
  Thread& thread() { return threads_[threadIdx.x]; }
  static unsigned lane_bit() { return 1u << lane(); }

  void wake(unsigned warp, unsigned lanes) {
    if (!lanes) return;
    warps_[warp].ready |= lanes;
    ready_warps_ |= 1u << warp;
  }

  // The thread that runs next, or none. It is mostly of the same warp: its stacks are in the cache.
  Thread* choose() {
    if (!ready_warps_) return nullptr;
    const uint32_t bits = random.next();
    if (!(ready_warps_ >> warp_ & 1) || bits % 8 == 0) warp_ = pick_bit(ready_warps_, bits >> 8);
    const unsigned lane = pick_bit(warps_[warp_].ready, bits >> 16);
    warps_[warp_].ready &= ~(1u << lane);
    if (!warps_[warp_].ready) ready_warps_ &= ~(1u << warp_);
    threadIdx.x = warp_ * warp_threads + lane;
    return &threads_[threadIdx.x];
  }

  // The thread that runs waits until it is chosen again.
  void leave() {
    Thread* const next = choose();
    if (!next) return switch_to(host_);
    if (!next->fiber) next->fiber = take_fiber();
    if (next->fiber != fiber_) switch_to(*next->fiber);
  }

  void end_thread() {
    if (!thread().copies.empty())
      fail("the thread ends with a copy_async16 in flight, issued in " + text(thread().copies.front().place));
    warp().ended |= lane_bit();
    ++ended_;
    Thread* const next = choose();
    if (next && !next->fiber) {
      next->fiber = fiber_;
      return;
    }
    free_.push_back(fiber_);
    switch_to(next ? *next->fiber : host_);
  }

  static void run_threads();

  Fiber* take_fiber() {
    if (free_.empty()) {
      auto fiber = std::make_unique<Fiber>();
      char* const stack = stacks_ + fibers_.size() * stack_bytes;
      mprotect(stack, guard_bytes, PROT_NONE);  // below it ends the stack of another
      fiber->stack = stack + guard_bytes;
      // Their tops differ in the low bits of the address, or they would fight for the same lines of the cache.
      fiber->bytes = stack_bytes - guard_bytes - fibers_.size() * 5 % 64 * 128;
      free_.push_back(fiber.get());
      fibers_.push_back(std::move(fiber));
    }
    Fiber* const fiber = free_.back();
    free_.pop_back();
    if (!fiber->prepared) fiber->context.prepare(fiber->stack, fiber->bytes, &Executor::run_threads);
    fiber->prepared = true;
    return fiber;
  }

  // After a complaint: no thread of the block continues.
  void discard_fibers() {
    free_.clear();
    for (const auto& fiber : fibers_) {
      fiber->prepared = false;
      unpoison(fiber->stack, fiber->bytes);
      free_.push_back(fiber.get());
    }
  }

  void switch_to(Fiber& to) {
    Fiber& from = *fiber_;
    fiber_ = &to;
    in_thread = &to != &host_;
    ++switches;
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.sanitizer_stack, to.stack, to.bytes);
    from_ = &from;
    Context::swap(from.context, to.context);
    arrive(from.sanitizer_stack);
  }

  // The sanitizer says where the stack lies that was left: of the host's nobody else knows.
  void arrive(void* sanitizer_stack) {
    if (!__sanitizer_finish_switch_fiber) return;
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(sanitizer_stack, &bottom, &bytes);
    if (from_ != &host_) return;
    host_.stack = static_cast<char*>(const_cast<void*>(bottom));
    host_.bytes = bytes;
  }

  // --- shared memory -------------------------------------------------------------------------------------------------

  // An array between red zones, aligned to `alignment` and to no more.
  char* carve(size_t bytes, size_t alignment, const char* name, const Place& place) {
    const size_t coarse = 2 * alignment;
    const size_t begin = (used_ + red_zone + coarse - 1) / coarse * coarse + alignment, end = begin + bytes;
    if (end + red_zone > arena_bytes) fail("too much shared memory, at last in " + text(place));
    char* const array = arena_ + begin;
    unpoison(arena_ + used_, end + red_zone - used_);
    std::memset(arena_ + used_, unset, end + red_zone - used_);
    poison(arena_ + used_, end + red_zone - used_);
    unpoison(array, bytes);
    if (bytes > 0) shared.push_back({array, array + bytes, name, place});
    used_ = end + red_zone;
    return array;
  }

  bool inside_shared(const void* address, size_t bytes) const {
    const char* const begin = static_cast<const char*>(address);
    for (const SharedRange& range : shared)
      if (begin >= range.begin && begin + bytes <= range.end) return true;
    return false;
  }

  void check_red_zones() {
    for (const SharedRange& range : shared) {
      for (size_t i = 1; i <= red_zone; ++i) {
        const volatile char *before = range.begin - i, *behind = range.end - 1 + i;
        const bool below = *before != static_cast<char>(unset), above = *behind != static_cast<char>(unset);
        if (!below && !above) continue;
        fail("a thread wrote " + std::to_string(i) + (below ? " bytes before " : " bytes behind the end of ") +
             "the shared array " + range.name + (range.place.line() ? ", declared in " + text(range.place) : ""));
        return;
      }
    }
  }

  void check_addressable(const void* address, size_t bytes, const Place& place) {
    if (!__asan_region_is_poisoned || !__asan_region_is_poisoned(const_cast<void*>(address), bytes)) return;
    fail("access of " + std::to_string(bytes) + " bytes outside of any array in " + text(place));
  }

  Body body_{};
  size_t dynamic_bytes_ = 0, static_bytes_ = 0, used_ = 0;
  char* dynamic_ = nullptr;
  char* arena_ = nullptr;
  char* stacks_ = nullptr;

  Warp warps_[most_warps];
  Thread threads_[most_threads];
  unsigned warps_in_block_ = 0, warp_ = 0, ready_warps_ = 0;
  unsigned at_barrier_ = 0, ended_ = 0;
  Place barrier_place_;

  Fiber host_;
  Fiber* fiber_ = &host_;
  Fiber* from_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> free_;
};

Executor executor;

void Executor::run_threads() {
  executor.arrive(nullptr);
  for (;;) {
    executor.body_.run(executor.body_.closure);
    executor.end_thread();
  }
}

}  // namespace

void seed(uint64_t value) { executor.random.seed(value); }

bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, const Body& body) {
  const std::lock_guard<std::mutex> lock(executor.mutex);
  return executor.run_grid(grid, block, dynamic_bytes, body);
}

const std::string& complaint() { return executor.complaint; }
void set_complaint(const std::string& text) { executor.complaint = text; }
uint64_t switches() { return executor.switches; }

void fail(const std::string& message, const Place& place) { executor.fail(message + " in " + text(place)); }
void fail_at(const std::string& message, const void* code) { executor.fail(message + " in " + line_of(code)); }

void barrier(const Place& place) { executor.barrier(place); }

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const Place& place) {
  return executor.shuffle(mask, value, source_lane, place);
}

unsigned ballot(unsigned mask, bool predicate, const Place& place) { return executor.ballot(mask, predicate, place); }
void sync_warp(unsigned mask, const Place& place) { executor.meet(mask, Operation::sync, place); }

void mma(Operation kind, float* d, const unsigned* a, const unsigned* b, const Place& place) {
  executor.mma(kind, {d, a, b}, place);
}

void place_shared(SharedSlot& slot, size_t bytes, size_t alignment, const char* name, const Place& place) {
  executor.place_shared(slot, bytes, alignment, name, place);
}

void* dynamic_shared() { return executor.dynamic_shared(); }

void access(const void* address, size_t bytes, Access kind, const Place& place) {
  executor.access(address, bytes, kind, place, __builtin_return_address(0));
}

void access_at(const void* address, size_t bytes, Access kind, const Place& place, const void* code) {
  executor.access(address, bytes, kind, place, code);
}

void copy_async(void* shared, const void* global, const Place& place) {
  executor.copy_async(shared, global, place, __builtin_return_address(0));
}

void copy_async_commit() { executor.copy_async_commit(); }
void copy_async_wait(int pending) { executor.copy_async_wait(pending); }

void fence() {
  if (observer) observer->fence();
}

const std::vector<SharedRange>& shared_ranges() { return executor.shared; }
char* shared_arena() { return executor.arena(); }
size_t shared_arena_bytes() { return arena_bytes; }
bool on_a_fiber(const void* address) { return executor.on_a_fiber(address); }

}  // namespace cuda_sim
