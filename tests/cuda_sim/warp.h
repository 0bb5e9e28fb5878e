// What the lanes of a warp do together. T: a number of 4 or 8 bytes, as for CUDA's own.
#pragma once

#include <cstring>
#include <type_traits>

#include "executor.h"

namespace cuda_sim {

template <typename T>
T shuffle_number(unsigned mask, T value, unsigned source, const Place& place) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_sim

// `width` divides the warp into parts, a power of two of lanes each. Where the source would lie outside of its part, a
// lane gets its own value.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const cuda_sim::Place& place = cuda_sim::Place::current()) {
  const unsigned lane = cuda_sim::lane(), last = static_cast<unsigned>(width) - 1;
  return cuda_sim::shuffle_number(mask, value, (lane & ~last) + (static_cast<unsigned>(source) & last), place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const cuda_sim::Place& place = cuda_sim::Place::current()) {
  const unsigned lane = cuda_sim::lane(), last = static_cast<unsigned>(width) - 1;
  return cuda_sim::shuffle_number(mask, value, (lane & last) >= delta ? lane - delta : lane, place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const cuda_sim::Place& place = cuda_sim::Place::current()) {
  const unsigned lane = cuda_sim::lane(), last = static_cast<unsigned>(width) - 1;
  return cuda_sim::shuffle_number(mask, value, (lane & last) + delta <= last ? lane + delta : lane, place);
}

// The one that may read from a part before its own.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const cuda_sim::Place& place = cuda_sim::Place::current()) {
  const unsigned lane = cuda_sim::lane(), last = static_cast<unsigned>(width) - 1;
  const unsigned source = (lane ^ static_cast<unsigned>(lane_mask)) % cuda_sim::warp_threads;
  return cuda_sim::shuffle_number(mask, value, source <= (lane | last) ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  return cuda_sim::ballot(mask, predicate != 0, place);
}

inline int __any_sync(unsigned mask, int predicate, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  return cuda_sim::ballot(mask, predicate != 0, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  return cuda_sim::ballot(mask, predicate != 0, place) == mask;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const cuda_sim::Place& place = cuda_sim::Place::current()) {
  cuda_sim::sync_warp(mask, place);
}

namespace dsc::cuda {

#define DSC_SIM_MMA(name)                                                         \
  inline void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], \
                   const cuda_sim::Place& place = cuda_sim::Place::current()) {   \
    cuda_sim::mma(cuda_sim::Operation::name, d, a, b, place);                     \
  }
DSC_SIM_MMA(mma_tf32)
DSC_SIM_MMA(mma_bf16)
DSC_SIM_MMA(mma_f16)
#undef DSC_SIM_MMA

}  // namespace dsc::cuda
