// Finds accesses of two threads to the same memory, one of them at least a write, that nothing orders.
//
// Kernels are compiled with -fsanitize=thread, which calls the functions at the end of this file before every access;
// the library that usually has them is not linked. What orders two accesses of a launch (happens-before):
//
//   - one thread makes both;
//   - the block's threads meet in __syncthreads between them;
//   - lanes of a warp meet in __syncwarp between them (a shuffle or a ballot orders nothing in memory);
//   - one thread makes the first, then __threadfence, then an atomic; another makes an atomic at the same address
//   later,
//     then __threadfence, then the second access. What the first thread knew to be before it counts too.
//
// Two atomics never race with each other. Blocks run one after another here, but nothing orders them.
//
// Time in a block is counted in intervals, from barrier to barrier, numbered through all launches. An access is kept as
// its interval, its warp, the lanes of the warp that made it, and their clock: the number of times that a lane has met
// others in this interval. A lane knows of every other one's clock what it has learned at their meetings.
//
// A word of four bytes has one record, until an access covers a part of it; then each byte has one.
#include <link.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "executor.h"
#include "observer.h"
#include "symbols.h"

namespace cuda_sim {
namespace {

struct Event {
  uint32_t interval = 0;  // 0: there was none
  uint32_t code = 0;      // address of the instruction behind it, in this library
  uint32_t lanes = 0;
  uint32_t warp : 5 = 0;
  uint32_t in_flight : 1 = 0;  // a copy that may land at any time
  uint32_t clock : 26 = 0;
};

// Accesses none of which is known to be before another: two are enough to find an unordered one for any third.
struct Events {
  Event first, second;
};

// What is kept of a byte, or of a word.
struct Record {
  Event write;
  Events reads, atomics;
};

struct Word {
  Record record;
  std::unique_ptr<std::array<Record, 4>> bytes;  // once its bytes have been accessed one by one
};

constexpr size_t word_bytes = sizeof(uint32_t), page_words = 1024;

struct Page {
  Word words[page_words];
};

// The clocks of a warp's lanes in the interval that runs: known[a][b] is what lane a knows of b's.
struct Clocks {
  uint32_t interval = 0;
  uint32_t known[warp_threads][warp_threads];
};

// What is known to be before: of each block, by its first interval, all up to an interval, and of some threads more.
struct Past {
  uint32_t interval = 0;
  std::map<uint32_t, std::pair<uint32_t, uint32_t>> threads;  // interval and clock
};
using Knowledge = std::map<uint32_t, Past>;

void merge(Knowledge& into, const Knowledge& from) {
  for (const auto& [block, past] : from) {
    Past& mine = into[block];
    mine.interval = std::max(mine.interval, past.interval);
    for (const auto& [thread, time] : past.threads) mine.threads[thread] = std::max(mine.threads[thread], time);
  }
}

const char* name_of(Access kind) { return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic"; }

bool busy = false;  // the checker is not to watch itself

class RaceChecker final : public Observer {
 public:
  RaceChecker() {
    observer = this;
    dl_iterate_phdr(&RaceChecker::find_library, this);
  }

  void begin_launch() override {
    busy = false;  // a complaint ends a launch within the checker
    launch_start_ = interval_ + 1;
    if (pages_.size() > 512) pages_.clear();
    last_page_ = nullptr;
    published_.clear();
    block_starts_.clear();
    arena_ = shared_arena();
    if (shared_words_.empty()) shared_words_.resize(shared_arena_bytes() / word_bytes);
  }

  void end_launch() override {}

  void begin_block() override {
    block_start_ = ++interval_;
    block_starts_.push_back(block_start_);
    block_knows_.clear();
    forget_threads();
  }

  void barrier() override {
    ++interval_;
    if (!fences_used_) return;
    for (const ThreadState& thread : threads_) merge(block_knows_, thread.knows);
    forget_threads();
  }

  void sync_warp(unsigned warp, unsigned mask) override {
    Clocks& clocks = clocks_of(warp);
    ThreadState* const threads = threads_ + warp * warp_threads;
    uint32_t joined[warp_threads] = {};
    Knowledge knowledge;
    for (unsigned lane = 0; lane < warp_threads; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (unsigned other = 0; other < warp_threads; ++other)
        joined[other] = std::max(joined[other], clocks.known[lane][other]);
      if (fences_used_) merge(knowledge, threads[lane].knows);
    }
    for (unsigned lane = 0; lane < warp_threads; ++lane) {
      if (!(mask >> lane & 1)) continue;
      std::copy(joined, joined + warp_threads, clocks.known[lane]);
      ++clocks.known[lane][lane];
      if (fences_used_) threads[lane].knows = knowledge;
    }
  }

  // What is before it the thread's next atomics publish; what others have published at its last ones it now knows.
  void fence() override {
    fences_used_ = true;
    ThreadState& thread = threads_[threadIdx.x];
    merge(thread.knows, thread.heard);
    thread.heard.clear();
    thread.publishes = block_knows_;
    merge(thread.publishes, thread.knows);
    Past& mine = thread.publishes[block_start_];
    mine.interval = std::max(mine.interval, interval_ - 1);
    uint32_t& clock = clocks_of(threadIdx.x / warp_threads).known[lane()][lane()];
    mine.threads[threadIdx.x] = {interval_, clock};
    ++clock;  // what follows is not published
  }

  void access(const void* address, size_t bytes, Access kind, const void* code) override {
    if (on_a_fiber(address) || (address >= library_begin_ && address < library_end_)) return;
    const bool shared = in_arena(address);
    if (shared) check_bounds(address, bytes, kind, code);
    touch(address, bytes, kind, event(code), shared);
    if (kind == Access::atomic && !shared) exchange(address);
  }

  void copy_issued(void* shared, const void* global, const void* code) override {
    touch(global, 16, Access::read, event(code), false);
    Event copy = event(code);
    copy.in_flight = 1;
    touch(shared, 16, Access::write, copy, true);
  }

  void copy_landed(void* shared, const void* global, const void* code) override {
    touch(global, 16, Access::read, event(code), false);
    forget_flight(shared);
    touch(shared, 16, Access::write, event(code), true);
  }

 private:
  struct ThreadState {
    Knowledge knows;      // besides what its block knows
    Knowledge heard;      // what it will know at its next fence
    Knowledge publishes;  // as of its last fence
  };

  void forget_threads() {
    if (!fences_used_) return;
    for (ThreadState& thread : threads_) thread = {};
    fences_used_ = false;
  }

  // --- one access ----------------------------------------------------------------------------------------------------

  Event event(const void* code) {
    Event now;
    now.interval = interval_;
    now.code = static_cast<uint32_t>(static_cast<const char*>(code) - static_cast<const char*>(library_begin_));
    now.warp = threadIdx.x / warp_threads;
    now.lanes = 1u << lane();
    const Clocks& clocks = clocks_of(now.warp);
    now.clock = clocks.known[lane()][lane()];
    return now;
  }

  void touch(const void* address, size_t bytes, Access kind, const Event& now, bool shared) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    const uintptr_t end = begin + bytes;
    while (begin < end) {
      const size_t offset = begin % word_bytes, part = std::min(word_bytes - offset, static_cast<size_t>(end - begin));
      Word& word = word_of(begin, shared);
      if (part < word_bytes && !word.bytes) {
        word.bytes = std::make_unique<std::array<Record, 4>>();
        word.bytes->fill(word.record);
      }
      if (word.bytes) {
        for (size_t i = offset; i < offset + part; ++i) touch((*word.bytes)[i], kind, now, shared);
      } else {
        touch(word.record, kind, now, shared);
      }
      begin += part;
    }
  }

  void touch(Record& record, Access kind, const Event& now, bool shared) {
    if (shared && kind != Access::write && !current(record.write, true) && !current(record.atomics.first, true))
      return fail_at("read of shared memory that no thread wrote,", code_of(now));
    check(record.write, Access::write, kind, now, shared);
    if (kind != Access::atomic) check(record.atomics, Access::atomic, kind, now, shared);
    if (kind != Access::read) check(record.reads, Access::read, kind, now, shared);
    if (kind == Access::read) add(record.reads, now, shared);
    if (kind == Access::atomic) add(record.atomics, now, shared);
    if (kind == Access::write) {
      record.write = now;
      record.reads = record.atomics = {};
    }
  }

  void check(const Events& before, Access then, Access kind, const Event& now, bool shared) {
    check(before.first, then, kind, now, shared);
    check(before.second, then, kind, now, shared);
  }

  void check(const Event& before, Access then, Access kind, const Event& now, bool shared) {
    if (ordered(before, now, shared)) return;
    const std::string there = line_of(code_of(before)), memory = shared ? "shared" : "global";
    if (before.in_flight)
      return fail_at(std::string(name_of(kind)) + " of " + memory +
                         " memory to which a copy_async16 is in flight, issued in " + there + ",",
                     code_of(now));
    fail_at("race in " + memory + " memory: after the " + name_of(then) + " in " + there + " by " + who(before) +
                " nothing orders the " + (now.in_flight ? "copy_async16" : name_of(kind)),
            code_of(now));
  }

  std::string who(const Event& event) const {
    if (event.interval < block_start_) return "another block";
    const unsigned others = event.lanes;
    return "thread " + std::to_string(event.warp * warp_threads + static_cast<unsigned>(__builtin_ctz(others)));
  }

  // Whether an event is one of this launch, or of this block.
  bool current(const Event& event, bool shared) const {
    return event.interval >= (shared ? block_start_ : launch_start_);
  }

  bool ordered(const Event& before, const Event& now, bool shared) {
    if (!current(before, shared)) return true;
    if (before.in_flight) return false;
    if (before.interval < block_start_) return known(before);
    if (before.interval < interval_) return true;
    if (before.warp != now.warp) return known(before);
    const Clocks& clocks = clocks_of(now.warp);
    const uint32_t* const own = clocks.known[__builtin_ctz(now.lanes)];
    for (unsigned others = before.lanes & ~now.lanes; others; others &= others - 1)
      if (before.clock > own[__builtin_ctz(others)]) return known(before);
    return true;
  }

  void add(Events& events, const Event& now, bool shared) {
    for (Event* const event : {&events.first, &events.second}) {
      if (ordered(*event, now, shared)) {
        *event = now;
        return;
      }
      if (event->interval == now.interval && event->warp == now.warp && event->clock == now.clock) {
        event->lanes |= now.lanes;
        return;
      }
    }
    // Rather of two warps than twice of one.
    if (events.first.interval == events.second.interval && events.first.warp == events.second.warp) events.second = now;
  }

  // --- fences and atomics --------------------------------------------------------------------------------------------

  bool known(const Event& before) const {
    const auto next = std::upper_bound(block_starts_.begin(), block_starts_.end(), before.interval);
    const uint32_t block = *(next - 1);
    return known(block_knows_, block, before) || known(threads_[threadIdx.x].knows, block, before);
  }

  static bool known(const Knowledge& knowledge, uint32_t block, const Event& before) {
    const auto found = knowledge.find(block);
    if (found == knowledge.end()) return false;
    const Past& past = found->second;
    if (before.interval <= past.interval) return true;
    for (unsigned lanes = before.lanes; lanes; lanes &= lanes - 1) {
      const auto thread = past.threads.find(before.warp * warp_threads + static_cast<unsigned>(__builtin_ctz(lanes)));
      if (thread == past.threads.end()) return false;
      const std::pair<uint32_t, uint32_t> time{before.interval, before.clock};
      if (thread->second < time) return false;
    }
    return true;
  }

  // An atomic hears what was published at its address, and publishes what was before its thread's last fence.
  void exchange(const void* address) {
    ThreadState& thread = threads_[threadIdx.x];
    const auto published = published_.find(address);
    if (published != published_.end()) merge(thread.heard, published->second);
    if (!thread.publishes.empty()) merge(published_[address], thread.publishes);
    if (!thread.heard.empty()) fences_used_ = true;
  }

  // --- records -------------------------------------------------------------------------------------------------------

  bool in_arena(const void* address) const { return address >= arena_ && address < arena_ + shared_arena_bytes(); }

  void check_bounds(const void* address, size_t bytes, Access kind, const void* code) {
    const char* const begin = static_cast<const char*>(address);
    const SharedRange* nearest = nullptr;
    const auto distance = [&](const SharedRange& range) {
      return begin < range.begin ? range.begin - begin : begin - range.end;
    };
    for (const SharedRange& range : shared_ranges()) {
      if (begin >= range.begin && begin + bytes <= range.end) return;
      if (!nearest || distance(range) < distance(*nearest)) nearest = &range;
    }
    const std::string what = std::string(name_of(kind)) + " of " + std::to_string(bytes) + " bytes ";
    if (!nearest) return fail_at(what + "in shared memory, of which the block has none,", code);
    fail_at(what + "at byte " + std::to_string(begin - nearest->begin) + " of the " +
                std::to_string(nearest->end - nearest->begin) + " bytes of the shared array " + nearest->name,
            code);
  }

  Word& word_of(uintptr_t address, bool shared) {
    if (shared) return shared_words_[(address - reinterpret_cast<uintptr_t>(arena_)) / word_bytes];
    const uintptr_t number = address / word_bytes / page_words;
    if (!last_page_ || number != last_number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page) page = std::make_unique<Page>();
      last_page_ = page.get();
      last_number_ = number;
    }
    return last_page_->words[address / word_bytes % page_words];
  }

  void forget_flight(void* shared) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared);
    for (size_t i = 0; i < 16; i += word_bytes) {
      Word& word = word_of(begin + i, true);
      word.record.write.in_flight = 0;
      if (!word.bytes) continue;
      for (Record& record : *word.bytes) record.write.in_flight = 0;
    }
  }

  Clocks& clocks_of(unsigned warp) {
    Clocks& clocks = clocks_[warp];
    if (clocks.interval != interval_) {
      clocks.interval = interval_;
      for (unsigned lane = 0; lane < warp_threads; ++lane)
        for (unsigned other = 0; other < warp_threads; ++other) clocks.known[lane][other] = lane == other;
    }
    return clocks;
  }

  const void* code_of(const Event& event) const { return static_cast<const char*>(library_begin_) + event.code; }

  static int find_library(dl_phdr_info* info, size_t, void* self) {
    RaceChecker& checker = *static_cast<RaceChecker*>(self);
    const char *begin = nullptr, *end = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      const char* const segment = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
      begin = begin ? std::min(begin, segment) : segment;
      end = std::max(end, segment + info->dlpi_phdr[i].p_memsz);
    }
    const char* const here = reinterpret_cast<const char*>(&current_block);
    if (here < begin || here >= end) return 0;
    checker.library_begin_ = begin;
    checker.library_end_ = end;
    return 1;
  }

  bool fences_used_ = false;  // by a thread in this interval
  uint32_t interval_ = 0, launch_start_ = 0, block_start_ = 0;
  std::vector<uint32_t> block_starts_;  // of this launch; the first interval is the block's name
  Clocks clocks_[32];
  ThreadState threads_[1024];
  Knowledge block_knows_;
  std::unordered_map<const void*, Knowledge> published_;
  char* arena_ = nullptr;
  std::vector<Word> shared_words_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
  const void* library_begin_ = nullptr;
  const void* library_end_ = nullptr;
};

RaceChecker checker;

void watch(const void* address, size_t bytes, Access kind, const void* code) {
  if (!in_thread || busy) return;
  busy = true;
  checker.access(address, bytes, kind, code);
  busy = false;
}

}  // namespace
}  // namespace cuda_sim

// What -fsanitize=thread calls.

#define DSC_HOOK extern "C" __attribute__((visibility("hidden")))
#define DSC_WATCH(address, bytes, kind) \
  cuda_sim::watch(address, bytes, cuda_sim::Access::kind, __builtin_return_address(0))

#define DSC_HOOKS(bytes)                                                                           \
  DSC_HOOK void __tsan_read##bytes(void* address) { DSC_WATCH(address, bytes, read); }             \
  DSC_HOOK void __tsan_write##bytes(void* address) { DSC_WATCH(address, bytes, write); }           \
  DSC_HOOK void __tsan_unaligned_read##bytes(void* address) { DSC_WATCH(address, bytes, read); }   \
  DSC_HOOK void __tsan_unaligned_write##bytes(void* address) { DSC_WATCH(address, bytes, write); } \
  DSC_HOOK void __tsan_volatile_read##bytes(void* address) { DSC_WATCH(address, bytes, read); }    \
  DSC_HOOK void __tsan_volatile_write##bytes(void* address) { DSC_WATCH(address, bytes, write); }
DSC_HOOKS(1)
DSC_HOOKS(2)
DSC_HOOKS(4)
DSC_HOOKS(8)
DSC_HOOKS(16)

DSC_HOOK void __tsan_read_range(void* address, size_t bytes) { DSC_WATCH(address, bytes, read); }
DSC_HOOK void __tsan_write_range(void* address, size_t bytes) { DSC_WATCH(address, bytes, write); }
DSC_HOOK void __tsan_init() {}
DSC_HOOK void __tsan_func_entry(void*) {}
DSC_HOOK void __tsan_func_exit() {}
DSC_HOOK void __tsan_vptr_update(void**, void*) {}
DSC_HOOK void __tsan_vptr_read(void**) {}

// Atomics of the host code; kernels have only CUDA's.
#define DSC_HOST_ATOMICS(bits)                                                                                 \
  using atomic##bits = uint##bits##_t;                                                                         \
  DSC_HOOK atomic##bits __tsan_atomic##bits##_load(const volatile atomic##bits* a, int) {                      \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                            \
  DSC_HOOK void __tsan_atomic##bits##_store(volatile atomic##bits* a, atomic##bits v, int) {                   \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                                  \
  }                                                                                                            \
  DSC_HOOK atomic##bits __tsan_atomic##bits##_exchange(volatile atomic##bits* a, atomic##bits v, int) {        \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                            \
  DSC_HOOK atomic##bits __tsan_atomic##bits##_fetch_add(volatile atomic##bits* a, atomic##bits v, int) {       \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                            \
  DSC_HOOK atomic##bits __tsan_atomic##bits##_fetch_sub(volatile atomic##bits* a, atomic##bits v, int) {       \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                            \
  DSC_HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile atomic##bits* a, atomic##bits* expected, \
                                                             atomic##bits v, int, int) {                       \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }                                                                                                            \
  DSC_HOOK int __tsan_atomic##bits##_compare_exchange_weak(volatile atomic##bits* a, atomic##bits* expected,   \
                                                           atomic##bits v, int, int) {                         \
    return __atomic_compare_exchange_n(a, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }
DSC_HOST_ATOMICS(8)
DSC_HOST_ATOMICS(16)
DSC_HOST_ATOMICS(32)
DSC_HOST_ATOMICS(64)
DSC_HOOK void __tsan_atomic_thread_fence(int) {}
DSC_HOOK void __tsan_atomic_signal_fence(int) {}
