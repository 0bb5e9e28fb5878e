// Atomics: no thread interrupts another, so that they are plain accesses, which are announced as atomic ones.
#include "memory.h"
#include "observer.h"

#define DSC_SIM_ATOMIC(name, type, after)                                                                     \
  type name(type* address, type value, const cuda_sim::Place& place) {                                        \
    cuda_sim::access_at(address, sizeof(type), cuda_sim::Access::atomic, place, __builtin_return_address(0)); \
    const type before = *address;                                                                             \
    *address = after;                                                                                         \
    return before;                                                                                            \
  }
DSC_SIM_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value)))
DSC_SIM_ATOMIC(atomicAdd, unsigned, before + value)
DSC_SIM_ATOMIC(atomicAdd, unsigned long long, before + value)
DSC_SIM_ATOMIC(atomicAdd, float, before + value)
DSC_SIM_ATOMIC(atomicMax, int, before < value ? value : before)
DSC_SIM_ATOMIC(atomicMax, unsigned, before < value ? value : before)
DSC_SIM_ATOMIC(atomicMax, unsigned long long, before < value ? value : before)
