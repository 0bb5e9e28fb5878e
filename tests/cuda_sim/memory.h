// Shared memory, accesses of 16 bytes, asynchronous copies, atomics.
#pragma once

#include <cstddef>
#include <cstring>

#include "executor.h"

namespace cuda_sim {

template <typename T, size_t length>
T (&shared_array(SharedSlot& slot, const char* name, const Place& place = Place::current()))
[length] {
  if (slot.block != current_block) place_shared(slot, sizeof(T[length]), alignof(T), name, place);
  return *static_cast<T(*)[length]>(slot.address);
}

}  // namespace cuda_sim

#define DSC_SHARED(type, name, length)       \
  static ::cuda_sim::SharedSlot name##_slot; \
  type(&name)[length] = ::cuda_sim::shared_array<type, length>(name##_slot, #name)

#define DSC_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::cuda_sim::dynamic_shared())

namespace dsc::cuda {

template <typename T>
struct alignas(16) Vector16 {
  T values[16 / sizeof(T)];
};

// The bytes are copied as bytes: what the address is aligned to is for access() to say.
template <typename T>
inline Vector16<T> load16(const T* from, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  cuda_sim::access(from, 16, cuda_sim::Access::read, place);
  Vector16<T> vector;
  std::memcpy(&vector, static_cast<const void*>(from), 16);
  return vector;
}

template <typename T>
inline void store16(T* to, const Vector16<T>& vector, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  cuda_sim::access(to, 16, cuda_sim::Access::write, place);
  std::memcpy(static_cast<void*>(to), &vector, 16);
}

inline void copy_async16(void* shared, const void* global, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  cuda_sim::copy_async(shared, global, place);
}

inline void copy_async_commit() { cuda_sim::copy_async_commit(); }

template <int pending>
inline void copy_async_wait() {
  static_assert(pending >= 0, "copy_async_wait takes the number of groups that may stay under way");
  cuda_sim::copy_async_wait(pending);
}

}  // namespace dsc::cuda

#pragma GCC visibility push(hidden)

int atomicAdd(int* address, int value, const cuda_sim::Place& place = cuda_sim::Place::current());
unsigned atomicAdd(unsigned* address, unsigned value, const cuda_sim::Place& place = cuda_sim::Place::current());
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value,
                             const cuda_sim::Place& place = cuda_sim::Place::current());
float atomicAdd(float* address, float value, const cuda_sim::Place& place = cuda_sim::Place::current());

int atomicMax(int* address, int value, const cuda_sim::Place& place = cuda_sim::Place::current());
unsigned atomicMax(unsigned* address, unsigned value, const cuda_sim::Place& place = cuda_sim::Place::current());
unsigned long long atomicMax(unsigned long long* address, unsigned long long value,
                             const cuda_sim::Place& place = cuda_sim::Place::current());

#pragma GCC visibility pop

inline void __threadfence() { cuda_sim::fence(); }
