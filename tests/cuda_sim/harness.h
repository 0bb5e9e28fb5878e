// What kernels.cpp and packed_kernels.cpp need to run kernels without PyTorch.
//
// Arrays are copied to heap blocks of exactly their size, which stand for device memory: the address sanitizer sees the
// first byte beyond. Every exported function returns the executor's complaint, or an empty string.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cuda/reduction.cuh"

#define DSC_EXPORT __attribute__((visibility("default")))

namespace dsc::cuda {

template <typename T>
class DeviceArray {
 public:
  DeviceArray(T* host, int64_t size) : host_(host), memory_(host, host + size) {}
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { std::copy(memory_.begin(), memory_.end(), host_); }
  T* data() { return memory_.data(); }

 private:
  T* host_;
  std::vector<T> memory_;
};

inline std::string error;

// One launch of several: after a complaint no more of them run.
template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (!error.empty()) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = shared_bytes;
  if (cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) != cudaSuccess) error = cuda_sim::complaint();
}

template <typename... Parameters, typename... Arguments>
void launch(int64_t blocks, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (blocks > 0) launch(dim3(static_cast<unsigned>(blocks)), 0, kernel, arguments...);
}

inline const char* complaint() {
  static std::string last;
  last = std::exchange(error, {});
  return last.c_str();
}

}  // namespace dsc::cuda
