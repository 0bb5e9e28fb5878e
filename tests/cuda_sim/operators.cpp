// What PyTorch provides only in its CUDA build, in its simplest form, and what the tests ask of the executor. With the
// objects of csrc/cuda/*.cu, the very same files, it makes a library of operators for CPU tensors (operators.h).
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>

#include "cuda_runtime.h"

#define DSC_EXPORT __attribute__((visibility("default")))

extern "C" {

DSC_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

DSC_EXPORT AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

DSC_EXPORT AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

DSC_EXPORT AOTITorchError torch_c10_cuda_check_msg(int32_t status, const char*, const char*, uint32_t, bool,
                                                   char** message) {
  *message = status == cudaSuccess ? nullptr : strdup(cuda_sim::complaint().c_str());
  return 0;
}

DSC_EXPORT void torch_c10_cuda_free_error_msg(char* message) { free(message); }

DSC_EXPORT void cuda_sim_use_device(int device) { cuda_sim::use_device(device); }
DSC_EXPORT uint64_t cuda_sim_launches() { return cuda_sim::launches(); }
DSC_EXPORT void cuda_sim_seed(uint64_t seed) { cuda_sim::seed(seed); }
DSC_EXPORT uint64_t cuda_sim_switches() { return cuda_sim::switches(); }
}
