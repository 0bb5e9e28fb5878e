// All that a kernel file includes besides csrc/core: CUDA under nvcc; under a host compiler the executor of
// tests/cuda_sim, which answers to the same name and defines the same functions and macros as the second half of this
// file.
//
//   DSC_SHARED(type, name, length)   an array shared by the threads of a block
//   DSC_DYNAMIC_SHARED(type, name)   a pointer to the shared memory whose size the launch says; 16-byte aligned
//   load16, store16                  a Vector16<T>, 16 / sizeof(T) neighbouring numbers, in one access of 16 bytes
//   copy_async16                     16 bytes from global to shared memory, there after the wait that covers them
//   copy_async_commit                the copies of this thread since the last commit are a group
//   copy_async_wait<pending>         all groups of this thread but the last `pending` have arrived
//   mma_tf32, mma_bf16, mma_f16      d += a b for a 16 x 8 tile d of a warp, in fragments (PTX: mma.m16n8k8 for tf32,
//                                    mma.m16n8k16 for the others; "row.col", float accumulators)
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDACC__)

#define DSC_SHARED(type, name, length) __shared__ type name[length]
#define DSC_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char dsc_dynamic[]; \
  type* const name = reinterpret_cast<type*>(dsc_dynamic)

namespace dsc::cuda {

template <typename T>
struct alignas(16) Vector16 {
  T values[16 / sizeof(T)];
};

template <typename T>
__device__ __forceinline__ Vector16<T> load16(const T* from) {
  return *reinterpret_cast<const Vector16<T>*>(from);
}

template <typename T>
__device__ __forceinline__ void store16(T* to, const Vector16<T>& vector) {
  *reinterpret_cast<Vector16<T>*>(to) = vector;
}

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#define DSC_MMA(name, shape)                                                                            \
  __device__ __forceinline__ void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
DSC_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
DSC_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
DSC_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef DSC_MMA

}  // namespace dsc::cuda

#endif
