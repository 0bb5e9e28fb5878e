// What an operator does around its kernels: dtype, memory format, device, stream, launch.
//
// What a launch takes from its device is speed only: how many blocks share a loop, how much of a batch goes through all
// iterations at a time. Sums are cut into the same parts on every device, so that results are the same, too.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

#include "../core/tensors.h"
#include "reduction.cuh"

namespace dsc::cuda {

using torch::stable::accelerator::DeviceGuard;

// The dtype of sums over a tensor: accumulate_t of its element type.
inline ScalarType accumulate_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor, MemoryFormat format) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor, format);
}

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType dtype,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_like(const Tensor& tensor, MemoryFormat format) {
  return empty(tensor, tensor.sizes(), tensor.scalar_type(), format);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Whether accesses of 16 bytes are possible at the beginning of a tensor; an absent one is no obstacle.
inline bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }
inline bool aligned(const std::optional<Tensor>& tensor) { return !tensor || aligned(*tensor); }

inline cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks of block_threads threads that the device has room for, and bytes of its L2 cache.
struct DeviceLimits {
  int64_t blocks, cache;
};

// Of the current device; asked for once, so a captured stream never meets the question twice.
inline DeviceLimits device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return int64_t(value);
  };
  const int64_t blocks = ask(cudaDevAttrMaxThreadsPerMultiProcessor) / block_threads;
  return known[device] = {ask(cudaDevAttrMultiProcessorCount) * blocks, ask(cudaDevAttrL2CacheSize)};
}

// Launches exactly `grid` blocks of block_threads threads, with that many bytes of dynamic shared memory.
template <typename... Parameters, typename... Arguments>
void launch(const Tensor& on, dim3 grid, size_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)  // more than a block gets unasked
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = current_stream(on);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Launches a kernel on the current stream of the tensor's device, which has to be the current one. The kernel strides
// over its grid and writes the same whatever the grid is, so `blocks` is a wish: there are at most eight times as many
// as the device has room for, so that those which end early make room for others. None: there is nothing to do.
template <typename... Parameters, typename... Arguments>
void launch(const Tensor& on, int64_t blocks, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (blocks == 0) return;
  const int64_t most = 8 * device_limits().blocks;
  launch(on, dim3(static_cast<unsigned>(std::min(blocks, most))), 0, kernel, arguments...);
}

// sums[i] = sum of partials[part][i] over the parts, rounded to the type of sums.
template <typename A, typename Out>
void sum_partials(const Tensor& on, const A* partials, int64_t parts, int64_t count, Out* sums) {
  launch(on, ceil_div(count, sums_per_block(parts)), sum_partials_kernel<A, Out>, partials, parts, count, sums);
}

template <typename A, typename Out>
void sum_partials(const Tensor& partials, const Tensor& sums) {
  const int64_t count = sums.numel(), parts = count == 0 ? 0 : partials.numel() / count;
  sum_partials(sums, data<A>(partials), parts, count, mutable_data<Out>(sums));
}

}  // namespace dsc::cuda
