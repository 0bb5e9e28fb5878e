// Launches with the limits of an H100, for which it also answers when asked about the device.
#include "host_api.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

namespace {

cudaError_t last_error = cudaSuccess;

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
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlock, cuda_sim::default_shared_bytes},
      {cudaDevAttrWarpSize, cuda_sim::warp_threads},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrL2CacheSize, 50 << 20},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
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

cudaError_t set_most_dynamic_bytes(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 ||
      static_cast<size_t>(bytes) > most_shared_bytes)
    return failed(cudaErrorInvalidValue, "cudaFuncSetAttribute: a block has at most 227 KB of shared memory");
  most_dynamic_bytes()[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Body& body) {
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
