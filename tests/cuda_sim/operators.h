// What every csrc/cuda/*.cu is compiled after (-include): its operators become torch.ops.dsc_ops_cuda_sim.*, for CPU
// tensors. torch's headers come first, before the two words are replaced.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define dsc_ops dsc_ops_cuda_sim
#define CUDA CPU
