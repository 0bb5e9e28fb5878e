// Launches with the limits of an H100. Asked about the device, it answers for the one that the test has chosen.
#include "host_api.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

namespace {

cudaError_t last_error = cudaSuccess;
int chosen_device = 0;
uint64_t launched = 0;

cudaError_t failed(cudaError_t error, const std::string& why) {
  cuda_sim::set_complaint(why);
  return last_error = error;
}

std::map<const void*, size_t>& most_dynamic_bytes() {
  static std::map<const void*, size_t> bytes_by_kernel;
  return bytes_by_kernel;
}

}  // namespace

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_sim::complaint().c_str();
}

cudaError_t cudaGetDevice(int* device) {
  *device = chosen_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  // Device 0 is an H100, device 1 has room for one block and a cache for nothing.
  const bool large = device == 0;
  const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMultiProcessorCount, large ? 132 : 1},
      {cudaDevAttrL2CacheSize, large ? 50 << 20 : 0},
      {cudaDevAttrMaxThreadsPerMultiProcessor, large ? 2048 : 256},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, cuda_sim::default_shared_bytes},
      {cudaDevAttrWarpSize, cuda_sim::warp_threads},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda_sim::most_shared_bytes},
  };
  const auto found = values.find(attribute);
  if (found == values.end()) return failed(cudaErrorInvalidValue, "cudaDeviceGetAttribute: unknown attribute");
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* begin, int value, size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(begin, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace cuda_sim {

void use_device(int device) { chosen_device = device; }
uint64_t launches() { return launched; }

cudaError_t set_most_dynamic_bytes(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 ||
      static_cast<size_t>(bytes) > most_shared_bytes)
    return failed(cudaErrorInvalidValue, "cudaFuncSetAttribute: a block has at most 227 KB of shared memory");
  most_dynamic_bytes()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Body& body) {
  ++launched;
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (block.x < 1 || block.x > 1024) return failed(cudaErrorInvalidConfiguration, "a block has 1 to 1024 threads");
  if (block.y != 1 || block.z != 1)
    return failed(cudaErrorInvalidConfiguration, "the executor runs blocks of one dimension only");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return failed(cudaErrorInvalidConfiguration, "a grid has 1 to 2^31 - 1 blocks in x, 1 to 65535 in y and z");
  const auto asked = most_dynamic_bytes().find(body.kernel);
  const size_t most =
      asked == most_dynamic_bytes().end() ? default_shared_bytes : std::max(asked->second, default_shared_bytes);
  if (config.dynamicSmemBytes > most)
    return failed(cudaErrorInvalidValue, "the launch asks for " + std::to_string(config.dynamicSmemBytes) +
                                             " bytes of dynamic shared memory, the kernel may have " +
                                             std::to_string(most) + " (cudaFuncSetAttribute)");
  return run_grid(grid, block, config.dynamicSmemBytes, body) ? cudaSuccess : (last_error = cudaErrorLaunchFailure);
}

}  // namespace cuda_sim
