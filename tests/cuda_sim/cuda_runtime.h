// CUDA on a CPU: what kernels find under the name cuda_runtime.h when a host compiler compiles them. README.md says how
// it works, what it sees and what it does not. csrc/cuda/cuda_portable.h is the contract: no more is defined here.
#pragma once

#include "arithmetic.h"
#include "executor.h"
#include "host_api.h"
#include "memory.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

inline void __syncthreads(const cuda_sim::Place& place = cuda_sim::Place::current()) { cuda_sim::barrier(place); }
