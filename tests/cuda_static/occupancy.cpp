// Occupancy by NVIDIA's own rules, cuda_occupancy.h, without a GPU: the properties of the devices stand here, from the
// CUDA C++ programming guide, section "Compute Capabilities".
//
//   in      a line for each question: compute capability, registers, static and dynamic shared memory, threads
//   out     a line for each answer: blocks and warps on a multiprocessor, its most warps, and what limits them (a bit
//           for each of warps, registers, shared memory, blocks, barriers); zero blocks cannot be launched
#include <cuda_occupancy.h>

#include <cstdio>

struct Device {
  int capability, threads, shared, block_shared;
};

constexpr Device devices[] = {
    {80, 2048, 167936, 166912}, {86, 1536, 102400, 101376},  {89, 1536, 102400, 101376},
    {90, 2048, 233472, 232448}, {100, 2048, 233472, 232448}, {120, 1536, 102400, 101376},
};

int main() {
  int capability, registers, fixed, dynamic, threads;
  while (std::scanf("%d %d %d %d %d", &capability, &registers, &fixed, &dynamic, &threads) == 5) {
    const Device* device = nullptr;
    for (const Device& known : devices) {
      if (known.capability == capability) device = &known;
    }
    if (!device) return 1;

    cudaOccDeviceProp properties{};
    properties.computeMajor = capability / 10;
    properties.computeMinor = capability % 10;
    properties.maxThreadsPerBlock = 1024;
    properties.maxThreadsPerMultiprocessor = device->threads;
    properties.regsPerBlock = properties.regsPerMultiprocessor = 65536;
    properties.warpSize = 32;
    properties.numSms = 1;
    properties.sharedMemPerBlock = 49152;
    properties.sharedMemPerMultiprocessor = device->shared;
    properties.sharedMemPerBlockOptin = device->block_shared;
    properties.reservedSharedMemPerBlock = 1024;

    cudaOccFuncAttributes attributes{};
    attributes.maxThreadsPerBlock = 1024;
    attributes.numRegs = registers;
    attributes.sharedSizeBytes = fixed;
    attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
    attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    attributes.maxDynamicSharedSizeBytes = device->block_shared - fixed;
    attributes.numBlockBarriers = 1;

    const cudaOccDeviceState state{};
    cudaOccResult result{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, threads, dynamic)) return 1;
    const int blocks = result.activeBlocksPerMultiprocessor;
    std::printf("%d %d %d %u\n", blocks, blocks * ((threads + 31) / 32), device->threads / 32, result.limitingFactors);
  }
}
