// Runs a kernel: a launch runs its blocks one after another in random order, a block its threads in random order, each
// until it meets a barrier or an operation of its warp. executor.cpp explains how.
//
// These functions are compiled once, without any sanitizer: what is theirs is never instrumented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#pragma GCC visibility push(hidden)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 gridDim, blockDim;
extern uint3 blockIdx, threadIdx;

namespace cuda_sim {

// The line of a kernel that asks for something: what complaints name.
using Place = std::source_location;

constexpr unsigned warp_threads = 32, all_lanes = ~0u;
constexpr size_t default_shared_bytes = 48 * 1024, most_shared_bytes = 227 * 1024;

// Sets the random numbers that order blocks and threads.
void seed(uint64_t value);

// A kernel with its arguments.
struct Body {
  void (*run)(const void* closure);
  const void* closure;
  const void* kernel;  // the function, for its name
};

// Whether the launch ended well; if not, complaint() says what was wrong.
bool run_grid(dim3 grid, dim3 block, size_t dynamic_bytes, const Body& body);
const std::string& complaint();
void set_complaint(const std::string& text);

// Thread switches so far, for measurements.
uint64_t switches();

// Ends the launch that runs, from within one of its threads, with a complaint. Does not return.
void fail(const std::string& message, const Place& place);

// --- what threads do together ----------------------------------------------------------------------------------------

void barrier(const Place& place);

enum class Operation { shuffle, ballot, sync, mma_tf32, mma_bf16, mma_f16 };

// All lanes of the mask meet; each gets the value of the lane it names as its source.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane, const Place& place);
// All lanes of the mask meet; each gets the bits of those whose predicate is not 0.
unsigned ballot(unsigned mask, bool predicate, const Place& place);
void sync_warp(unsigned mask, const Place& place);
// The whole warp meets; d += a b.
void mma(Operation kind, float* d, const unsigned* a, const unsigned* b, const Place& place);

inline unsigned lane() { return threadIdx.x % warp_threads; }

// --- memory ----------------------------------------------------------------------------------------------------------

// A declaration of shared memory: where it lies in the block that runs.
struct SharedSlot {
  uint64_t block = 0;  // for which the address holds
  void* address = nullptr;
};

// Serial number of the block that runs, over all launches.
extern uint64_t current_block;

void place_shared(SharedSlot& slot, size_t bytes, size_t alignment, const char* name, const Place& place);
void* dynamic_shared();

enum class Access { read, write, atomic };

// Says that a thread accesses `bytes` bytes, which have to be aligned to their number. Complains where it must not.
void access(const void* address, size_t bytes, Access kind, const Place& place);

void copy_async(void* shared, const void* global, const Place& place);
void copy_async_commit();
void copy_async_wait(int pending);
void fence();

}  // namespace cuda_sim

#pragma GCC visibility pop
