// Choice of the instruction set level at run time. The kernels in simd_kernels.cpp are compiled once for each level;
// the best one that the machine has is taken when the library loads, or the one that DSC_OPS_CPU_CAPABILITY names.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dsc::cpu {

std::vector<std::string> available_capabilities();
std::string capability();
void set_capability(const std::string& level);

// The kernels of the level in use for element type T.
template <typename T>
const Kernels<T>& kernels();

}  // namespace dsc::cpu
