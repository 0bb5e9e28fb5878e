// Names for addresses of instructions.
#pragma once

#include <string>

#pragma GCC visibility push(hidden)

namespace cuda_sim {

// "file:line" of the kernel's source that an instruction belongs to: of inlined calls the innermost that lies in
// neither the executor's headers nor the system's.
std::string line_of(const void* code);
std::string function_of(const void* code);

}  // namespace cuda_sim

#pragma GCC visibility pop
