// Packed codes on a CUDA device, and the shape that all kernels on them share.
//
// Atoms come in slabs of 64, code pixels in runs of 8 neighbours in a row (the last run of a row is filled up with
// empty pixels). Per slab and run
//
//   masks    8 x 64 bits: which atoms are present at each pixel
//   offset   where the run's values begin, in units of 16 bytes
//   values   of the atoms that are present, pixel after pixel, in rising order of atoms; room for all of them, so that
//            a writer needs to know nothing of its neighbours
//
// A warp reads and writes a run with lane = 4 pixel + quarter: 16 atoms of one pixel to a lane, in the order of values.
#pragma once

#include "reduction.cuh"

namespace dsc::cuda {

constexpr int slab_atoms = 64, run_pixels = 8, warp_threads = 32, block_warps = block_threads / warp_threads;
constexpr unsigned whole_warp = 0xffffffffu;

// A convolution as core/geometry.h has it, with one group and without dilation. A batch of 1-D signals is one image
// whose rows are the signals: strides tell where the rows are.
struct Shape {
  int images, channels, atoms;
  int signal_h, signal_w, code_h, code_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int64_t signal_image, signal_channel, signal_row;  // strides of a dense signal, whose columns are neighbours
  int64_t code_image, code_atom, code_row;           // likewise of a dense code

  DSC_HOST_DEVICE int taps() const { return channels * kernel_h * kernel_w; }
  DSC_HOST_DEVICE int slabs() const { return (atoms + slab_atoms - 1) / slab_atoms; }
  DSC_HOST_DEVICE int row_runs() const { return (code_w + run_pixels - 1) / run_pixels; }
  DSC_HOST_DEVICE int64_t runs() const { return int64_t(images) * code_h * row_runs(); }
  DSC_HOST_DEVICE int atoms_of(int slab) const {
    const int left = atoms - slab * slab_atoms;
    return left < slab_atoms ? left : slab_atoms;
  }
  DSC_HOST_DEVICE int64_t signal_size() const { return int64_t(images) * channels * signal_h * signal_w; }
};

template <typename A>
struct PackedCode {
  uint16_t* masks;    // [slab][run][pixel][quarter]; null where there is no code
  uint32_t* offsets;  // [slab][run]
  A* values;
};

// Sizes of the parts of a packed code. Values begin at multiples of 16 bytes: 8 pixels have room for a multiple of it.
template <typename A>
struct PackedSize {
  int64_t masks, offsets, values;  // numbers of uint16_t, uint32_t, A

  explicit PackedSize(const Shape& shape)
      : masks(shape.slabs() * shape.runs() * run_pixels * 4),
        offsets((shape.slabs() * shape.runs() + 3) / 4 * 4),
        values(shape.runs() * run_pixels * shape.atoms) {}

  int64_t bytes() const { return masks * 2 + offsets * 4 + values * int64_t(sizeof(A)); }

  // The code that begins at an address that is a multiple of 16.
  PackedCode<A> at(void* memory) const {
    A* const first_value = static_cast<A*>(memory);
    uint32_t* const first_offset = reinterpret_cast<uint32_t*>(first_value + values);
    return {reinterpret_cast<uint16_t*>(first_offset + offsets), first_offset, first_value};
  }
};

template <typename A>
constexpr int unit_values = 16 / sizeof(A);  // values in one unit of an offset

// The unit at which a run's own room begins.
template <typename A>
DSC_HOST_DEVICE uint32_t room_of(const Shape& shape, int slab, int64_t run) {
  const int64_t first = int64_t(slab) * shape.runs() * run_pixels * slab_atoms;
  return static_cast<uint32_t>((first + run * run_pixels * shape.atoms_of(slab)) / unit_values<A>);
}

// Sum over this lane and those before it in its group of `width` lanes.
__device__ __forceinline__ int scan(int value, int width = warp_threads) {
  const int lane = threadIdx.x % width;
#pragma unroll
  for (int distance = 1; distance < warp_threads; distance *= 2) {
    if (distance >= width) break;
    const int before = __shfl_up_sync(whole_warp, value, distance, width);
    if (lane >= distance) value += before;
  }
  return value;
}

// What a lane has of a run that its warp reads or writes.
struct LanePart {
  unsigned mask;  // of its 16 atoms
  int first;      // its values are [first, first + count) of the run's
  int count, total;

  __device__ explicit LanePart(unsigned mask) : mask(mask) {
    count = __popc(mask);
    const int end = scan(count);
    first = end - count;
    total = __shfl_sync(whole_warp, end, warp_threads - 1);
  }
};

// The 16 atoms of a lane that exist at all.
__device__ __forceinline__ unsigned existing_atoms(const Shape& shape, int slab) {
  const int left = shape.atoms_of(slab) - threadIdx.x % 4 * 16;
  return left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1u : 0u;
}

template <typename A>
__device__ __forceinline__ unsigned lane_mask(const PackedCode<A>& code, int64_t slab_run) {
  return code.masks[slab_run * warp_threads + threadIdx.x % warp_threads];
}

template <typename A>
__device__ __forceinline__ A* run_values(const PackedCode<A>& code, int64_t slab_run) {
  return code.values + int64_t(code.offsets[slab_run]) * unit_values<A>;
}

}  // namespace dsc::cuda
