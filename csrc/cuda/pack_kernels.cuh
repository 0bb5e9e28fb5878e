// Between dense codes (N, M, h, w) and packed ones. A warp has a run of 8 pixels; its accesses to dense codes are whole
// sectors of 32 bytes, the 8 pixels of an atom.
#pragma once

#include "packed.cuh"

namespace dsc::cuda {

enum class Support : int { nonzeros, of_code, everything };

// Where the 16 atoms of a lane are in a dense code.
struct DensePart {
  int64_t offset;  // of the first one
  int atoms;       // that exist; none beyond the end of the row

  __device__ DensePart(const Shape& shape, int slab, int64_t run) {
    const int lane = threadIdx.x % warp_threads, first = slab * slab_atoms + lane % 4 * 16;
    const int64_t row = run / shape.row_runs();
    const int x = static_cast<int>(run % shape.row_runs()) * run_pixels + lane / 4;
    offset = row / shape.code_h * shape.code_image + first * shape.code_atom + row % shape.code_h * shape.code_row + x;
    const int left = shape.atoms - first;
    atoms = x >= shape.code_w || left < 0 ? 0 : left < 16 ? left : 16;
  }
};

// The present atoms of a dense code: those that are not zero, those that `model` has, or all.
template <typename T>
__global__ void __launch_bounds__(block_threads, 4)
    pack_kernel(Shape shape, Support support, const T* dense, PackedCode<accumulate_t<T>> model,
                PackedCode<accumulate_t<T>> out) {
  using A = accumulate_t<T>;
  const int64_t step = int64_t(gridDim.x) * block_warps, all = shape.slab_run(shape.runs(), 0);
  const int warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_warps + warp; i < all; i += step) {
    const int slab = static_cast<int>(i % shape.slabs());
    const int64_t run = i / shape.slabs();
    const DensePart dense_part(shape, slab, run);
    A values[16];
    unsigned mask = 0;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      const bool exists = m < dense_part.atoms;
      values[m] = exists ? load(dense[dense_part.offset + m * shape.code_atom]) : A(0);
      if (exists && (support == Support::everything || !(values[m] == A(0)))) mask |= 1u << m;
    }
    if (support == Support::of_code) mask = lane_mask(model, i);
    const LanePart part(mask);
    out.masks[i * warp_threads + lane] = static_cast<uint16_t>(mask);
    A* to = out.values + room_of(shape, run, slab) + part.first;
#pragma unroll
    for (int m = 0; m < 16; ++m)
      if (mask >> m & 1u) *to++ = values[m];
  }
}

template <typename T>
__global__ void __launch_bounds__(block_threads, 4)
    unpack_kernel(Shape shape, PackedCode<accumulate_t<T>> code, T* dense) {
  using A = accumulate_t<T>;
  const int64_t step = int64_t(gridDim.x) * block_warps, all = shape.slab_run(shape.runs(), 0);
  const int warp = threadIdx.x / warp_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_warps + warp; i < all; i += step) {
    const int slab = static_cast<int>(i % shape.slabs());
    const int64_t run = i / shape.slabs();
    const DensePart dense_part(shape, slab, run);
    const LanePart part(lane_mask(code, i));
    const A* from = code.values + room_of(shape, run, slab) + part.first;
#pragma unroll
    for (int m = 0; m < 16; ++m) {
      const A value = part.mask >> m & 1u ? *from++ : A(0);
      if (m < dense_part.atoms) dense[dense_part.offset + m * shape.code_atom] = store<T>(value);
    }
  }
}

}  // namespace dsc::cuda
