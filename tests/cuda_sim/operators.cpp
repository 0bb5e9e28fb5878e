// The CUDA operators, host code and kernels, compiled for the CPU: the very same .cu files, registered for CPU tensors
// as torch.ops.dsc_ops_cuda_sim.* (the schemas come from csrc/ops.cpp by way of the test). What PyTorch provides only
// in its CUDA build stands here in its simplest form.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cuda_runtime.h"

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

AOTITorchError torch_c10_cuda_check_msg(int32_t status, const char*, const char*, uint32_t, bool, char** message) {
  *message = status == cudaSuccess ? nullptr : strdup(cuda_sim::executor.error.c_str());
  return 0;
}

void torch_c10_cuda_free_error_msg(char* message) { free(message); }

void cuda_sim_seed(uint64_t seed) { cuda_sim::executor.random.seed(seed); }
}

#define dsc_ops dsc_ops_cuda_sim
#define CUDA CPU
#include "cuda/penalty.cu"
#include "cuda/threshold.cu"
