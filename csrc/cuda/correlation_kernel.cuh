// The weight's gradient: corr(plane, code)[m, tap] = sum over pixels of code[m, pixel] plane[pixel + tap], over the
// non-zeros of a packed code; with it the sums of the code itself and of the code times the signs of another.
//
// A block goes through tiles of 32 x 8 code pixels. It sorts the non-zeros of a tile by (atom, pixel), by counting: the
// masks are transposed to one word of 32 pixels per row and atom, from which every non-zero knows its place. Then a
// warp has 8 atoms, a lane some of the taps, and every sum is taken in the order of pixels. The blocks' sums are added
// by sum_partials_kernel.
#pragma once

#include "packed.cuh"

namespace dsc::cuda {

constexpr int correlation_columns = 32, correlation_rows = block_warps, warp_atoms = slab_atoms / block_warps;

template <typename A>
struct Correlation {
  Shape shape;
  int across, down;  // tiles of an image
  int rows, pitch;   // of the plane's tile: [channel][row][pitch]
  const A* plane;    // in the order of the signal
  PackedCode<A> code;
  PackedCode<A> signs;  // a code with the same masks, or null
  A* partials;          // [block][M][tap]; null when only sums are wanted
  A* sums;              // [block][2][M]: sum of -sign(signs) code, sum of code; or null
  bool adds;            // to what the partials hold
};

template <typename A>
struct CorrelationShared {
  static constexpr int entries = correlation_columns * slab_atoms;  // at least a row of the tile with all atoms
  A value[entries];
  int where[entries];  // of the pixel in the plane's tile; the lowest bit tells that its sign is negative
  uint32_t pixels[correlation_rows][slab_atoms];
  int start[correlation_rows + 1][slab_atoms];  // the last row: where an atom's entries end
  int row_total[correlation_rows];
  A plane[1];  // and more behind it
};

template <typename A, int lane_taps>
__global__ void __launch_bounds__(block_threads, sizeof(A) == 8 || lane_taps > 3 ? 2
                                                 : lane_taps == 3 ? 3
                                                                  : 4) correlation_kernel(Correlation<A> s) {
  using Shared = CorrelationShared<A>;
  DSC_DYNAMIC_SHARED(Shared, shared);
  const Shape& shape = s.shape;
  const int thread = threadIdx.x, warp = thread / warp_threads, lane = thread % warp_threads;
  const int slab = blockIdx.y, first_tap = blockIdx.z * warp_threads * lane_taps, plane_rows = shape.channels * s.rows;
  const int64_t tiles = int64_t(shape.images) * s.down * s.across;
  const int row_pixels = shape.row_runs() * run_pixels;

  int offset[lane_taps];  // of a tap in the plane's tile
#pragma unroll
  for (int i = 0; i < lane_taps; ++i) {
    const int tap = first_tap + i * warp_threads + lane, kernel_row = tap / shape.kernel_w;
    const int channel = kernel_row / shape.kernel_h, dy = kernel_row % shape.kernel_h;
    offset[i] = tap < shape.taps() ? (channel * s.rows + dy) * s.pitch + tap % shape.kernel_w : 0;
  }
  A sums[warp_atoms][lane_taps], code_sums[warp_atoms];  // code_sums: with signs in lane 0, without in the others
#pragma unroll
  for (int a = 0; a < warp_atoms; ++a) {
    code_sums[a] = A(0);
#pragma unroll
    for (int i = 0; i < lane_taps; ++i) sums[a][i] = A(0);
  }

#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int tile_x = static_cast<int>(tile % s.across), tile_y = static_cast<int>(tile / s.across % s.down);
    const int64_t image = tile / s.across / s.down;
    __syncthreads();  // the tile before is done with
    const int signal_x = tile_x * correlation_columns * shape.stride_w - shape.padding_w;
    const int signal_y = tile_y * correlation_rows * shape.stride_h - shape.padding_h;
    for (int r = warp; r < plane_rows; r += block_warps) {
      const int channel = r / s.rows, row = signal_y + r % s.rows;
      const A* const from =
          s.plane + image * shape.signal_image + channel * shape.signal_channel + row * shape.signal_row;
      const bool inside = row >= 0 && row < shape.signal_h;
      for (int i = lane; i < s.pitch; i += warp_threads) {
        const int column = signal_x + i;
        shared->plane[r * s.pitch + i] = inside && column >= 0 && column < shape.signal_w ? from[column] : A(0);
      }
    }

    // A thread has a pixel.
    const int y = tile_y * correlation_rows + warp, x = tile_x * correlation_columns + lane;
    const bool inside = y < shape.code_h && x < row_pixels;
    const int64_t run = (image * shape.code_h + y) * shape.row_runs() + x / run_pixels;
    const uint64_t* const masks = reinterpret_cast<const uint64_t*>(s.code.masks) + x % run_pixels;
    const uint64_t mask = inside ? masks[shape.slab_run(run, slab) * run_pixels] : 0;
    const unsigned low = static_cast<unsigned>(mask), high = static_cast<unsigned>(mask >> 32);
    const int count = __popcll(mask), before = scan(count, run_pixels) - count;
    const int64_t room = room_of(shape, run, slab) + before;
    const A* value = s.code.values + room;
    const A* sign = s.signs.masks ? s.signs.values + room : nullptr;
    unsigned low_pixels = 0, high_pixels = 0;  // of atoms `lane` and `lane` + 32
#pragma unroll 8
    for (int m = 0; m < warp_threads; ++m) {
      const unsigned of_low = __ballot_sync(whole_warp, low >> m & 1u),
                     of_high = __ballot_sync(whole_warp, high >> m & 1u);
      if (lane == m) {
        low_pixels = of_low;
        high_pixels = of_high;
      }
    }
    shared->pixels[warp][lane] = low_pixels;
    shared->pixels[warp][lane + warp_threads] = high_pixels;
    const int total = __shfl_sync(whole_warp, scan(count), warp_threads - 1);
    if (lane == 0) shared->row_total[warp] = total;
    __syncthreads();

    // As many rows at a time as have room.
    for (int begin = 0, end = 0; begin < correlation_rows; begin = end) {
      for (int entries = 0; end < correlation_rows && entries + shared->row_total[end] <= Shared::entries; ++end)
        entries += shared->row_total[end];
      if (warp == 0) {
        int atom_totals[2] = {0, 0};
#pragma unroll
        for (int k = 0; k < 2; ++k)
          for (int r = begin; r < end; ++r) atom_totals[k] += __popc(shared->pixels[r][lane + k * warp_threads]);
        const int low_end = scan(atom_totals[0]);
        const int high_end = scan(atom_totals[1]) + __shfl_sync(whole_warp, low_end, warp_threads - 1);
        const int ends[2] = {low_end, high_end};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int m = lane + k * warp_threads;
          int at = ends[k] - atom_totals[k];
          for (int r = begin; r < end; ++r) {
            shared->start[r][m] = at;
            at += __popc(shared->pixels[r][m]);
          }
          shared->start[correlation_rows][m] = at;
        }
      }
      __syncthreads();
      if (warp >= begin && warp < end) {
        const int where = (warp * shape.stride_h * s.pitch + lane * shape.stride_w) * 2;
        for (uint64_t left = mask; left; left &= left - 1) {
          const int m = __ffsll(left) - 1;
          const int at = shared->start[warp][m] + __popc(shared->pixels[warp][m] & ((1u << lane) - 1u));
          shared->value[at] = *value++;
          shared->where[at] = where | (sign && *sign++ < A(0) ? 1 : 0);
        }
      }
      __syncthreads();
#pragma unroll
      for (int a = 0; a < warp_atoms; ++a) {
        const int m = warp * warp_atoms + a, stop = shared->start[correlation_rows][m];
#pragma unroll 2
        for (int i = shared->start[begin][m]; i < stop; ++i) {
          const A entry = shared->value[i];
          const int where = shared->where[i];
          code_sums[a] += lane == 0 && !(where & 1) ? -entry : entry;
          const A* const from = shared->plane + (where >> 1);
#pragma unroll
          for (int t = 0; t < lane_taps; ++t) sums[a][t] += entry * from[offset[t]];
        }
      }
      __syncthreads();
    }
  }

#pragma unroll
  for (int a = 0; a < warp_atoms; ++a) {
    const int m = slab * slab_atoms + warp * warp_atoms + a;
    if (m >= shape.atoms) break;
    if (s.sums && blockIdx.z == 0 && lane < 2) {
      s.sums[(int64_t(blockIdx.x) * 2 + lane) * shape.atoms + m] = code_sums[a];
    }
#pragma unroll
    for (int i = 0; i < lane_taps; ++i) {
      const int tap = first_tap + i * warp_threads + lane;
      if (!s.partials || tap >= shape.taps()) continue;
      A& out = s.partials[(int64_t(blockIdx.x) * shape.atoms + m) * shape.taps() + tap];
      out = s.adds ? out + sums[a][i] : sums[a][i];
    }
  }
}

}  // namespace dsc::cuda
