// What the race checker is told, and what it may ask. Without one the executor tells nobody.
#pragma once

#include <cstdint>
#include <vector>

#include "executor.h"

#pragma GCC visibility push(hidden)

namespace cuda_sim {

class Observer {
 public:
  virtual ~Observer() = default;
  virtual void begin_launch() = 0;
  virtual void end_launch() = 0;
  virtual void begin_block() = 0;
  virtual void barrier() = 0;  // all threads of the block have met
  virtual void sync_warp(unsigned warp, unsigned mask) = 0;
  virtual void fence() = 0;
  virtual void access(const void* address, size_t bytes, Access kind, const void* code) = 0;
  // A copy under way: from its issue to its landing nobody may read or write `shared`.
  virtual void copy_issued(void* shared, const void* global, const void* code) = 0;
  virtual void copy_landed(void* shared, const void* global, const void* code) = 0;
};

extern Observer* observer;
extern bool in_thread;  // whether a thread of a kernel runs, and not the host

// An array in the shared memory of the block that runs.
struct SharedRange {
  char* begin;
  char* end;
  const char* name;
  Place place;
};

const std::vector<SharedRange>& shared_ranges();
char* shared_arena();
size_t shared_arena_bytes();
bool on_a_fiber(const void* address);  // in the stack of some thread

// As access, by the instruction given.
void access_at(const void* address, size_t bytes, Access kind, const Place& place, const void* code);

// As fail, for what is known by the address of an instruction.
void fail_at(const std::string& message, const void* code);

}  // namespace cuda_sim

#pragma GCC visibility pop
