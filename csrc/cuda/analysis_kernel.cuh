// A_W of a dense plane, and what becomes of it without ever being dense:
//
//   u = A_W(plane) + bias + a code + another code,   out = T(u), packed,   or   out = u on the support of a code
//
// A block has a slab of 64 atoms and a tile of 16 x 8 code pixels, a warp one row of it. The tile of the plane and, a
// piece at a time, the weights are in shared memory. Products keeps a warp's 16 pixels x 64 atoms in registers. When
// all warps have them, stage() lays them out where plane and weights were: two runs of 8 pixels, in each of which a
// lane finds 16 atoms of one pixel, the order of a packed run. The atoms of lane l are rotated among groups of four by
// l / 2, so that lanes meet different banks.
#pragma once

#include "../core/threshold.h"
#include "packed.cuh"

namespace dsc::cuda {

constexpr int analysis_columns = 2 * run_pixels, analysis_rows = block_warps, staged_run = run_pixels * slab_atoms;

__device__ __forceinline__ int staged(int lane, int atom) { return lane * 16 + (atom ^ (lane / 2 % 4 * 4)); }

// The tile of the plane in shared memory: [channel][row][pitch].
struct PlaneTile {
  int rows, pitch;
  DSC_HOST_DEVICE int size(const Shape& shape) const { return shape.channels * rows * pitch; }
};

inline PlaneTile plane_tile(const Shape& shape) {
  const int width = (analysis_columns - 1) * shape.stride_w + shape.kernel_w;
  return {(analysis_rows - 1) * shape.stride_h + shape.kernel_h, (width + 3) / 4 * 4};
}

// --- products in float or double: a lane has 8 pixels x 4 atoms ------------------------------------------------------

// A unit is `taps` neighbours of a kernel row; its place is that of the first in the tile. Weights are
// [slab][unit][tap][atom].
template <typename A, int taps_, int stride>
struct FusedProducts {
  using Plane = A;   // the tile's elements
  using Weight = A;  // the table's
  static constexpr int taps = taps_, unit_weights = taps * slab_atoms;
  static constexpr int units_at_once = 49 / taps, unit_places = 1;
  static constexpr int pixels = 8, atoms = 4;

  DSC_HOST_DEVICE static int units(const Shape& shape) {
    return shape.channels * shape.kernel_h * (shape.kernel_w / taps);
  }

  template <typename T>
  __device__ static A arranged(const Shape& shape, const T* weight, int slab, int64_t i) {
    const int64_t m = slab * slab_atoms + i % slab_atoms;
    return m < shape.atoms ? load(weight[m * shape.taps() + i / slab_atoms]) : A(0);
  }

  __device__ static void put(A* tile, int i, A value, A) { tile[i] = value; }

  A sums[pixels][atoms];

  __device__ FusedProducts() {
#pragma unroll
    for (int p = 0; p < pixels; ++p)
#pragma unroll
      for (int m = 0; m < atoms; ++m) sums[p][m] = A(0);
  }

  DSC_HOST_DEVICE static int places(const Shape& shape) { return units(shape); }

  __device__ static int place(const Shape& shape, const PlaneTile& tile, int unit) {
    const int per_row = shape.kernel_w / taps, row = unit / per_row;
    return (row / shape.kernel_h * tile.rows + row % shape.kernel_h) * tile.pitch + unit % per_row * taps;
  }

  // `count` units, whose weights are in shared memory.
  __device__ void add(const Shape& shape, int pitch, const A* plane, int, const int* place, const A* weights,
                      int count) {
    const int lane = threadIdx.x % warp_threads, row = threadIdx.x / warp_threads;
    const A* const here = plane + row * shape.stride_h * pitch + lane / 16 * pixels * stride;
    const A* weight = weights + lane % 16 * atoms;
    const int* const end = place + count;
#pragma unroll 1
    for (; place < end; ++place) {
      const A* const from = here + *place;
      A window[(pixels - 1) * stride + taps];
#pragma unroll
      for (int i = 0; i < (pixels - 1) * stride + taps; ++i) window[i] = from[i];
#pragma unroll
      for (int t = 0; t < taps; ++t, weight += slab_atoms) {
        A four[atoms];
#pragma unroll
        for (int m = 0; m < atoms; m += unit_values<A>) {
          const Vector16<A> vector = load16(weight + m);
#pragma unroll
          for (int j = 0; j < unit_values<A>; ++j) four[m + j] = vector.values[j];
        }
#pragma unroll
        for (int p = 0; p < pixels; ++p)
#pragma unroll
          for (int m = 0; m < atoms; ++m) sums[p][m] += window[p * stride + t] * four[m];
      }
    }
  }

  // Both runs of the warp.
  __device__ void stage(A* to) const {
    const int lane = threadIdx.x % warp_threads;
#pragma unroll
    for (int p = 0; p < pixels; ++p) {
      A* const at = to + lane / 16 * staged_run + staged(p * 4 + lane % 16 / 4, lane % 4 * 4);
#pragma unroll
      for (int m = 0; m < atoms; m += unit_values<A>) {
        Vector16<A> vector;
#pragma unroll
        for (int j = 0; j < unit_values<A>; ++j) vector.values[j] = sums[p][m + j];
        store16(at + m, vector);
      }
    }
  }
};

// --- products by tensor cores: fragments of 16 pixels x 8 atoms ------------------------------------------------------

enum class Tensor32 : int { tf32, bf16, f16 };

// A unit is what one 32-bit register of a fragment holds: a tap in tf32, two neighbouring taps of a kernel row in 16
// bits. The tile of the plane is made of such registers, the pair (x, x + 1) at x. Eight units are a step. Weights are
// [slab][step][atoms / 16][lane][4], as the lanes of a warp read them. A unit's place is twice that of its first tap,
// plus 1 where there is no second: what the register has of it is masked, so that zero weights meet no infinity. Units
// beyond the last have place -1 and read a zero behind the tile.
template <Tensor32 kind>
struct TensorProducts {
  using Plane = uint32_t;
  using Weight = uint32_t;
  static constexpr int step_units = 8, unit_weights = step_units * slab_atoms;
  static constexpr int units_at_once = 6, unit_places = step_units;  // here a unit is a step
  static constexpr int unit_taps = kind == Tensor32::tf32 ? 1 : 2;

  DSC_HOST_DEVICE static int per_row(const Shape& shape) { return (shape.kernel_w + unit_taps - 1) / unit_taps; }
  DSC_HOST_DEVICE static int all(const Shape& shape) { return shape.channels * shape.kernel_h * per_row(shape); }
  DSC_HOST_DEVICE static int units(const Shape& shape) { return (all(shape) + step_units - 1) / step_units; }

  __device__ static uint32_t pack(float first, float second) {
    if constexpr (kind == Tensor32::tf32) {
      const uint32_t bits = bit_cast<uint32_t>(first), rounded = (bits + 0x0fffu + (bits >> 13 & 1u)) & ~0x1fffu;
      return (bits & 0x7f800000u) == 0x7f800000u ? bits : rounded;  // infinity and NaN as they are
    } else if constexpr (kind == Tensor32::bf16) {
      return Store<bfloat16>::from(first).bits | uint32_t(Store<bfloat16>::from(second).bits) << 16;
    } else {
      return Store<float16>::from(first).bits | uint32_t(Store<float16>::from(second).bits) << 16;
    }
  }

  template <typename T>
  __device__ static uint32_t arranged(const Shape& shape, const T* weight, int slab, int64_t i) {
    const int lane = static_cast<int>(i / 4 % warp_threads), word = static_cast<int>(i % 4);
    const int eight = static_cast<int>(i / (4 * warp_threads) % (slab_atoms / 16)) * 2 + word / 2;
    const int64_t m = slab * slab_atoms + eight * 8 + lane / 4;
    const int unit = static_cast<int>(i / unit_weights) * step_units + lane % 4 + word % 2 * 4;
    if (m >= shape.atoms || unit >= all(shape)) return 0;
    const int dx = unit % per_row(shape) * unit_taps;
    const T* const tap = weight + m * shape.taps() + unit / per_row(shape) * shape.kernel_w + dx;
    return pack(load(tap[0]), unit_taps > 1 && dx + 1 < shape.kernel_w ? load(tap[1]) : 0.0f);
  }

  // The neighbour is what a tile row has next.
  __device__ static void put(uint32_t* tile, int i, float value, float next) { tile[i] = pack(value, next); }

  float sums[slab_atoms / 8][4];

  __device__ TensorProducts() {
#pragma unroll
    for (int n = 0; n < slab_atoms / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
  }

  DSC_HOST_DEVICE static int places(const Shape& shape) { return units(shape) * step_units; }

  __device__ static int place(const Shape& shape, const PlaneTile& tile, int unit) {
    if (unit >= all(shape)) return -1;
    const int row = unit / per_row(shape), dx = unit % per_row(shape) * unit_taps;
    const int at = (row / shape.kernel_h * tile.rows + row % shape.kernel_h) * tile.pitch + dx;
    return 2 * at + (unit_taps > 1 && dx + 1 == shape.kernel_w ? 1 : 0);
  }

  // `count` steps, whose weights are in shared memory; `zero` is where the tile has a zero.
  __device__ void add(const Shape& shape, int pitch, const uint32_t* plane, int zero, const int* place,
                      const uint32_t* weights, int count) {
    const int lane = threadIdx.x % warp_threads, row = threadIdx.x / warp_threads;
    const int first = row * shape.stride_h * pitch + lane / 4 * shape.stride_w, second = first + 8 * shape.stride_w;
    const uint32_t* const end = weights + count * unit_weights;
    place += lane % 4;
#pragma unroll 1
    for (; weights < end; weights += unit_weights, place += step_units) {
      unsigned a[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int at = place[4 * k];
        const uint32_t bits = at & 1 ? 0xffffu : ~0u;
        a[2 * k] = plane[at < 0 ? zero : first + (at >> 1)] & bits;
        a[2 * k + 1] = plane[at < 0 ? zero : second + (at >> 1)] & bits;
      }
#pragma unroll
      for (int n = 0; n < slab_atoms / 16; ++n) {
        const Vector16<uint32_t> four = load16(weights + (n * warp_threads + lane) * 4);
        multiply(sums[2 * n], a, {four.values[0], four.values[1]});
        multiply(sums[2 * n + 1], a, {four.values[2], four.values[3]});
      }
    }
  }

  __device__ static void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    if constexpr (kind == Tensor32::tf32) {
      mma_tf32(d, a, b);
    } else if constexpr (kind == Tensor32::bf16) {
      mma_bf16(d, a, b);
    } else {
      mma_f16(d, a, b);
    }
  }

  // A lane has atoms 2 (lane % 4) and the next of eight atoms, for pixel lane / 4 and for the one 8 further.
  __device__ void stage(float* to) const {
    const int lane = threadIdx.x % warp_threads;
#pragma unroll
    for (int n = 0; n < slab_atoms / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[i / 2 * staged_run + staged(lane / 4 * 4 + n / 2, n % 2 * 8 + lane % 4 * 2 + i % 2)] = sums[n][i];
  }
};

// --- the kernel ------------------------------------------------------------------------------------------------------

// The weights of all slabs in the order in which Products reads them.
template <typename T, typename Products>
__global__ void __launch_bounds__(block_threads, 1)
    arrange_analysis_kernel(Shape shape, int64_t slab_size, const T* weight, typename Products::Weight* table) {
  const int64_t size = shape.slabs() * slab_size, step = int64_t(gridDim.x) * block_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x; i < size; i += step)
    table[i] = Products::arranged(shape, weight, static_cast<int>(i / slab_size), i % slab_size);
}

template <typename A>
struct ScaledCode {
  PackedCode<A> code;
  A scale;
};

template <typename A>
struct Analysis {
  Shape shape;
  PlaneTile tile;
  int across, down;  // tiles of an image
  const A* plane;    // in the order of the signal
  const void* table;
  const A* bias;  // (M) or null
  ScaledCode<A> first, second;
  const A* theta;  // (M); null for the support of a code
  bool one_sided;
  PackedCode<A> support;
  PackedCode<A> out;
};

constexpr int value_buffer = 128;  // values of a run that take the way of 16-byte accesses

// Behind it: weights, the plane's tile with a zero behind it, places; later what is staged.
template <typename A>
struct alignas(16) AnalysisShared {
  A values[block_warps][value_buffer];
  A theta[slab_atoms], bias[slab_atoms];
  int tile_x, tile_y, image, slab;  // kept here while registers are for products

  template <typename Products>
  static size_t bytes(const Shape& shape, const PlaneTile& tile) {
    const size_t weights = sizeof(typename Products::Weight) * Products::units_at_once * Products::unit_weights;
    const size_t plane = sizeof(typename Products::Plane) * (tile.size(shape) + 4);
    const size_t places = sizeof(int) * Products::places(shape);
    return sizeof(AnalysisShared) + std::max(weights + plane + places, sizeof(A) * block_warps * 2 * staged_run);
  }
};

// Adds scale times a run of a packed code to what the warp has staged.
template <typename A>
__device__ __forceinline__ void add_code(const ScaledCode<A>& scaled, int64_t slab_run, int64_t room, A* staged_values,
                                         A* buffer) {
  const int lane = threadIdx.x % warp_threads;
  const LanePart part(lane_mask(scaled.code, slab_run));
  const A* from = scaled.code.values + room;
  if (part.total <= value_buffer) {
#pragma unroll 1
    for (int i = lane * unit_values<A>; i < part.total; i += warp_threads * unit_values<A>)
      store16(buffer + i, load16(from + i));
    __syncwarp();
    from = buffer;
  }
  from += part.first;
#pragma unroll 1
  for (unsigned mask = part.mask; mask; mask &= mask - 1)
    staged_values[staged(lane, __ffs(mask) - 1)] += scaled.scale * *from++;
  __syncwarp();  // the buffer is free again
}

template <typename A, typename Products, int blocks>
__global__ void __launch_bounds__(block_threads, blocks) analysis_kernel(Analysis<A> s) {
  using Plane = typename Products::Plane;
  using Weight = typename Products::Weight;
  DSC_DYNAMIC_SHARED(AnalysisShared<A>, shared);
  Weight* const weights = reinterpret_cast<Weight*>(shared + 1);
  Plane* const plane = reinterpret_cast<Plane*>(weights + Products::units_at_once * Products::unit_weights);
  const int zero = s.tile.size(s.shape);
  int* const places = reinterpret_cast<int*>(plane + zero + 4);
  A* const mine = reinterpret_cast<A*>(shared + 1) + threadIdx.x / warp_threads * 2 * staged_run;
  const Shape& shape = s.shape;
  const int thread = threadIdx.x, warp = thread / warp_threads, lane = thread % warp_threads;
  const int units = Products::units(shape);
  if (thread == 0) {
    const int block = blockIdx.x;
    shared->tile_x = block % s.across;
    shared->tile_y = block / s.across % s.down;
    shared->image = block / s.across / s.down;
    shared->slab = blockIdx.y;
  }
  __syncthreads();
  if (thread < slab_atoms) {
    const int m = shared->slab * slab_atoms + thread;
    shared->theta[thread] = s.theta && m < shape.atoms ? s.theta[m] : A(0);
    shared->bias[thread] = s.bias && m < shape.atoms ? s.bias[m] : A(0);
  }
  const int plane_rows = shape.channels * s.tile.rows;
  const int signal_x = shared->tile_x * analysis_columns * shape.stride_w - shape.padding_w;
  const int signal_y = shared->tile_y * analysis_rows * shape.stride_h - shape.padding_h;
  for (int r = warp; r < plane_rows; r += block_warps) {
    const int channel = r / s.tile.rows, row = signal_y + r % s.tile.rows;
    const A* const from =
        s.plane + shared->image * shape.signal_image + channel * shape.signal_channel + row * shape.signal_row;
    const bool inside = row >= 0 && row < shape.signal_h;
#pragma unroll 1
    for (int i = lane; i < s.tile.pitch; i += warp_threads) {
      const int column = signal_x + i;
      const A value = inside && column >= 0 && column < shape.signal_w ? from[column] : A(0);
      const A next = inside && column + 1 >= 0 && column + 1 < shape.signal_w ? from[column + 1] : A(0);
      Products::put(plane, r * s.tile.pitch + i, value, next);
    }
  }
  if (thread == 0) Products::put(plane, zero, A(0), A(0));
  for (int i = thread; i < Products::places(shape); i += block_threads) places[i] = Products::place(shape, s.tile, i);

  const Weight* const table =
      static_cast<const Weight*>(s.table) + int64_t(blockIdx.y) * units * Products::unit_weights;
  constexpr int words = 16 / sizeof(Weight);
  {
    Products products;
#pragma unroll 1
    for (int begin = 0; begin < units; begin += Products::units_at_once) {
      const int count = units - begin < Products::units_at_once ? units - begin : Products::units_at_once;
      if (begin > 0) __syncthreads();  // the weights before these are read
#pragma unroll 1
      for (int i = thread * words; i < count * Products::unit_weights; i += block_threads * words)
        copy_async16(weights + i, table + begin * Products::unit_weights + i);
      copy_async_commit();
      copy_async_wait<0>();
      __syncthreads();
      products.add(shape, s.tile.pitch, plane, zero, places + begin * Products::unit_places, weights, count);
    }
    __syncthreads();  // plane and weights are read
    products.stage(mine);
    __syncwarp();
  }

  A* const buffer = shared->values[warp];
  const int x = shared->tile_x * analysis_columns, y = shared->tile_y * analysis_rows + warp, slab = shared->slab;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int run_x = x + half * run_pixels;
    if (y >= shape.code_h || run_x >= shape.code_w) break;  // the whole warp
    const int64_t run = (int64_t(shared->image) * shape.code_h + y) * shape.row_runs() + run_x / run_pixels;
    const int64_t slab_run = shape.slab_run(run, slab), room = room_of(shape, run, slab);
    A* const run_staged = mine + half * staged_run;
    if (s.bias) {
      for (int m = 0; m < 16; ++m) run_staged[staged(lane, m)] += shared->bias[lane % 4 * 16 + m];
    }
    if (s.first.code.masks) add_code(s.first, slab_run, room, run_staged, buffer);
    if (s.second.code.masks) add_code(s.second, slab_run, room, run_staged, buffer);

    unsigned mask = 0;
    if (s.theta) {
      for (int m = 0; m < 16; m += unit_values<A>) {
        A* const at = run_staged + staged(lane, m);
        const Vector16<A> theta = load16(shared->theta + lane % 4 * 16 + m);
        Vector16<A> u = load16(at);
#pragma unroll
        for (int j = 0; j < unit_values<A>; ++j) {
          u.values[j] = s.one_sided ? soft_threshold<true>(u.values[j], theta.values[j])
                                    : soft_threshold<false>(u.values[j], theta.values[j]);
          if (!(u.values[j] == A(0))) mask |= 1u << (m + j);
        }
        store16(at, u);
      }
      mask &= run_x + lane / 4 < shape.code_w ? existing_atoms(shape, slab) : 0u;
    } else {
      mask = lane_mask(s.support, slab_run);
    }

    const LanePart part(mask);
    s.out.masks[slab_run * warp_threads + lane] = static_cast<uint16_t>(mask);
    A* const values = s.out.values + room;
    const bool buffered = part.total <= value_buffer;
    A* to = (buffered ? buffer : values) + part.first;
#pragma unroll 1
    for (unsigned left = mask; left; left &= left - 1) *to++ = run_staged[staged(lane, __ffs(left) - 1)];
    __syncwarp();
    if (!buffered) continue;
    const int whole = part.total - part.total % unit_values<A>;
#pragma unroll 1
    for (int i = lane * unit_values<A>; i < whole; i += warp_threads * unit_values<A>)
      store16(values + i, load16(buffer + i));
    if (whole + lane < part.total) values[whole + lane] = buffer[whole + lane];
    __syncwarp();
  }
}

}  // namespace dsc::cuda
