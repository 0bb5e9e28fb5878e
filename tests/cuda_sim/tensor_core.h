// The products of tensor cores, of fragments as the PTX ISA lays them out over the lanes of a warp: "mma.m16n8k8" for
// tf32, "mma.m16n8k16" for the half types. d[lane], a[lane], b[lane] are a lane's registers; d += a b.
#pragma once

#pragma GCC visibility push(hidden)

namespace cuda_sim {

void multiply_tf32(float* const* d, const unsigned* const* a, const unsigned* const* b);
void multiply_bf16(float* const* d, const unsigned* const* a, const unsigned* const* b);
void multiply_f16(float* const* d, const unsigned* const* a, const unsigned* const* b);

}  // namespace cuda_sim

#pragma GCC visibility pop
