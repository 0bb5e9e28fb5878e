// The memory of tapes, which stays with the library from step to step: what is new the system clears page by page.
#pragma once

#include "host.h"

namespace dsc::cpu {

// (bytes,) uint8 on the CPU. When a large tape is freed, its memory is kept for the next one, and marked as free: the
// system takes it where it is short of memory. Small tapes, and those of torch before 2.11, are torch's memory.
Tensor tape_memory(const Tensor& model, int64_t bytes);

}  // namespace dsc::cpu
