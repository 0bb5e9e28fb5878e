// Packed codes on a CUDA device, and the shape that all kernels on them share.
//
// Atoms come in slabs of 64, code pixels in runs of 8 neighbours in a row (the last run of a row is filled up with
// empty pixels). Per run and slab
//
//   masks    8 x 64 bits: which atoms are present at each pixel
//   values   of the atoms that are present, pixel after pixel, in rising order of atoms; room for all of them, so that
//            a writer needs to know nothing of its neighbours
//
// Signals follow each other in both, so that a slice of the batch is a part of the memory.
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
  bool rows_are_signals = false;

  DSC_HOST_DEVICE int taps() const { return channels * kernel_h * kernel_w; }
  DSC_HOST_DEVICE int slabs() const { return (atoms + slab_atoms - 1) / slab_atoms; }
  DSC_HOST_DEVICE int row_runs() const { return (code_w + run_pixels - 1) / run_pixels; }
  DSC_HOST_DEVICE int64_t runs() const { return int64_t(images) * code_h * row_runs(); }
  DSC_HOST_DEVICE int64_t slab_run(int64_t run, int slab) const { return run * slabs() + slab; }
  DSC_HOST_DEVICE int atoms_of(int slab) const {
    const int left = atoms - slab * slab_atoms;
    return left < slab_atoms ? left : slab_atoms;
  }
  DSC_HOST_DEVICE int64_t signal_size() const { return int64_t(images) * channels * signal_h * signal_w; }

  // Pixels, those that fill up rows too, times slabs: what blocks are made of.
  int64_t slab_pixels() const { return runs() * run_pixels * slabs(); }

  // Of the batch: a signal's size, a code's, and how many there are.
  int64_t signal_item() const { return rows_are_signals ? signal_row : signal_image; }
  int64_t code_item() const { return rows_are_signals ? code_row : code_image; }
  int batch() const { return rows_are_signals ? code_h : images; }
  Shape of_batch(int64_t signals) const {
    Shape shape = *this;
    if (rows_are_signals) {
      shape.signal_h = shape.code_h = static_cast<int>(signals);
    } else {
      shape.images = static_cast<int>(signals);
    }
    return shape;
  }
};

template <typename A>
struct PackedCode {
  uint16_t* masks;  // [run][slab][pixel][quarter]; null where there is no code
  A* values;        // [run][slab], each with room for its atoms at 8 pixels
};

// Sizes of the parts of a packed code. Values begin at multiples of 16 bytes: 8 pixels have room for a multiple of it.
template <typename A>
struct PackedSize {
  int64_t signals, masks, values;  // numbers of signals, uint16_t, A

  explicit PackedSize(const Shape& shape)
      : signals(shape.batch()),
        masks(shape.slab_run(shape.runs(), 0) * run_pixels * 4),
        values(shape.runs() * run_pixels * shape.atoms) {}

  int64_t bytes() const { return masks * 2 + values * int64_t(sizeof(A)); }

  // The code that begins at an address that is a multiple of 16, from a signal on.
  PackedCode<A> at(void* memory, int64_t first_signal = 0) const {
    A* const first_value = static_cast<A*>(memory);
    uint16_t* const first_mask = reinterpret_cast<uint16_t*>(first_value + values);
    return {first_mask + masks / signals * first_signal, first_value + values / signals * first_signal};
  }
};

template <typename A>
constexpr int unit_values = 16 / sizeof(A);  // values in one access of 16 bytes

// Where the values of a run begin, a multiple of 16 bytes.
DSC_HOST_DEVICE int64_t room_of(const Shape& shape, int64_t run, int slab) {
  return (run * shape.atoms + slab * slab_atoms) * run_pixels;
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

}  // namespace dsc::cuda
