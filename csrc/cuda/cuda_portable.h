// All that a kernel file includes besides csrc/core: CUDA under nvcc; under a host compiler the executor of
// tests/cuda_sim, which answers to the same name.
#pragma once

#include <cuda_runtime.h>

// An array shared by the threads of a block. The executor, which has its own definition, watches every access to it.
#if defined(__CUDACC__)
#define DSC_SHARED(type, name, length) __shared__ type name[length]
#endif
