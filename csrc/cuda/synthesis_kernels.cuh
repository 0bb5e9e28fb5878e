// S_D of a packed code, in two kernels without atomics.
//
// synthesis_kernel: a block has a tile of code pixels and makes the piece of signal that they reach, unreduced. A
// kernel row is cut into segments of `taps` neighbouring taps. A lane has one segment and one row of code pixels: it
// walks along the row with `taps` running sums, of which the first `stride` are complete when it steps to the next
// pixel. What is complete goes to shared memory, and at the end every signal value of the tile adds up what the lanes
// have for it.
//
// combine_kernel: every signal value adds up the tiles that reach it, in a fixed order, and takes its linear part in
// what the iteration needs: y - S_D z, a sum of gradients.
#pragma once

#include "packed.cuh"

namespace dsc::cuda {

// How a kernel row is cut. Sums of lanes that have no segment are not read.
template <int taps_>
struct Segments {
  static constexpr int taps = taps_;
  static constexpr int slots = taps <= 4 ? 4 : 8;         // of a segment in the table of weights
  static constexpr int lanes = slab_atoms / slots;        // segments in one pass
  static constexpr int warp_rows = warp_threads / lanes;  // rows of code pixels of a warp
  static constexpr int warp_columns = 16;
  static constexpr int tile_rows = block_warps / 2 * warp_rows;  // of code pixels; warps stand 2 abreast
  static constexpr int tile_columns = 2 * warp_columns;

  DSC_HOST_DEVICE static int per_row(const Shape& shape) { return shape.kernel_w / taps; }
  DSC_HOST_DEVICE static int per_channel(const Shape& shape) { return shape.kernel_h * per_row(shape); }
  DSC_HOST_DEVICE static int passes(const Shape& shape) {
    return (shape.channels * per_channel(shape) + lanes - 1) / lanes;
  }
};

// The tiles of a synthesis: [image][tile row][tile column][channel][height][width].
struct Tiles {
  int rows, columns;  // of code pixels in a tile
  int down, across;   // tiles of an image
  int height, width;  // of the signal piece
  DSC_HOST_DEVICE int64_t piece() const { return int64_t(height) * width; }
};

template <typename S>
Tiles tiles_of(const Shape& shape) {
  return {S::tile_rows,
          S::tile_columns,
          (shape.code_h + S::tile_rows - 1) / S::tile_rows,
          (shape.code_w + S::tile_columns - 1) / S::tile_columns,
          (S::tile_rows - 1) * shape.stride_h + shape.kernel_h,
          (S::tile_columns - 1) * shape.stride_w + shape.kernel_w};
}

// Atoms as synthesis_kernel reads them, [slab][pass][atom][slot / 4][lane][slot % 4], zero where there is none.
template <typename T, typename S>
__global__ void __launch_bounds__(block_threads, 1)
    arrange_synthesis_kernel(Shape shape, const T* weight, accumulate_t<T>* table) {
  using A = accumulate_t<T>;
  const int passes = S::passes(shape), segments = shape.channels * S::per_channel(shape);
  const int64_t size = int64_t(shape.slabs()) * passes * slab_atoms * slab_atoms,
                step = int64_t(gridDim.x) * block_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x; i < size; i += step) {
    const int inner = static_cast<int>(i % slab_atoms), atom = static_cast<int>(i / slab_atoms % slab_atoms);
    const int64_t round = i / (slab_atoms * slab_atoms);
    const int slot = inner / (4 * S::lanes) * 4 + inner % 4;
    const int segment = static_cast<int>(round % passes) * S::lanes + inner / 4 % S::lanes;
    const int64_t m = round / passes * slab_atoms + atom;
    const bool exists = m < shape.atoms && segment < segments && slot < S::taps;
    // Kernel rows follow each other in memory, and so do their segments.
    table[i] = exists ? load(weight[m * shape.taps() + int64_t(segment) * S::taps + slot]) : A(0);
  }
}

template <typename A, typename S, int stride>
struct SynthesisShared {
  static constexpr int columns = ((S::warp_columns - 1) * stride + S::taps) | 1;  // odd: lanes meet different banks
  static constexpr int entries = slab_atoms * S::warp_rows;  // a column of code pixels with all atoms present
  A table[slab_atoms * slab_atoms];
  A sums[block_warps][warp_threads][columns];
  A value[block_warps][entries];
  uint8_t atom[block_warps][entries];
};

template <typename A>
struct Synthesis {
  Shape shape;
  Tiles tiles;
  PackedCode<A> code;
  const A* table;
  A* pieces;
};

template <typename A, typename S, int stride>
__global__ void __launch_bounds__(block_threads, sizeof(A) == 8 ? 1
                                                 : stride == 1  ? 4
                                                                : 3) synthesis_kernel(Synthesis<A> s) {
  using Shared = SynthesisShared<A, S, stride>;
  constexpr int taps = S::taps, lanes = S::lanes, vector = unit_values<A>;
  DSC_DYNAMIC_SHARED(Shared, shared);
  const Shape& shape = s.shape;
  const Tiles& tiles = s.tiles;
  const int thread = threadIdx.x, warp = thread / warp_threads, lane = thread % warp_threads;
  const int64_t tile = blockIdx.x;
  const int tile_x = static_cast<int>(tile % tiles.across), tile_y = static_cast<int>(tile / tiles.across % tiles.down);
  const int64_t image = tile / tiles.across / tiles.down;
  const int row = warp / 2 * S::warp_rows + lane / lanes;  // in the tile
  const int y = tile_y * S::tile_rows + row, x = tile_x * S::tile_columns + warp % 2 * S::warp_columns;
  const int passes = S::passes(shape), row_pixels = shape.row_runs() * run_pixels;
  const int64_t row_run = (image * shape.code_h + y) * shape.row_runs();
  A* const piece = s.pieces + tile * shape.channels * tiles.piece();
  A* const sums = shared->sums[warp][lane];

  for (int round = 0; round < passes * shape.slabs(); ++round) {
    const int slab = round / passes, pass = round % passes;
    const A* const table = s.table + int64_t(round) * slab_atoms * slab_atoms;
    for (int i = thread * vector; i < slab_atoms * slab_atoms; i += block_threads * vector)
      copy_async16(shared->table + i, table + i);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();  // the table is there, the sums of the round before are read

    A running[taps];
#pragma unroll
    for (int t = 0; t < taps; ++t) running[t] = A(0);
#pragma unroll 1
    for (int first = 0; first < S::warp_columns; first += lanes) {  // a pixel to each lane of a row
      const int pixel_x = x + first + lane % lanes;
      const bool inside = y < shape.code_h && pixel_x < row_pixels;
      const int64_t run = row_run + pixel_x / run_pixels;
      const uint64_t* const masks = reinterpret_cast<const uint64_t*>(s.code.masks) + pixel_x % run_pixels;
      uint64_t mask = inside ? masks[shape.slab_run(run, slab) * run_pixels] : 0;
      const int count = __popcll(mask);
      const A* from = s.code.values + room_of(shape, run, slab) + scan(count, run_pixels) - count;

      // As many columns at a time as have room for their entries. There is always room for one.
      int window = count, width = 1;
#pragma unroll
      for (int distance = lanes; distance < warp_threads; distance *= 2)
        window += __shfl_xor_sync(whole_warp, window, distance);
      while (width < lanes) {
        window += __shfl_xor_sync(whole_warp, window, width);
        if (!__all_sync(whole_warp, window <= Shared::entries)) break;
        width *= 2;
      }
#pragma unroll 1
      for (int begin = 0; begin < lanes; begin += width) {
        const bool mine = lane % lanes / width == begin / width;
        const int size = mine ? count : 0, at = scan(size) - size;
        __syncwarp();
        for (int i = at; i < at + size; ++i) {
          shared->atom[warp][i] = static_cast<uint8_t>(__ffsll(mask) - 1);
          shared->value[warp][i] = *from++;
          mask &= mask - 1;
        }
        __syncwarp();
#pragma unroll 1
        for (int q = begin; q < begin + width; ++q) {
          const int start = __shfl_sync(whole_warp, at, q, lanes),
                    end = start + __shfl_sync(whole_warp, size, q, lanes);
#pragma unroll 1
          for (int i = start; i < end; ++i) {
            const A value = shared->value[warp][i];
            const A* const weights = shared->table + shared->atom[warp][i] * slab_atoms + lane % lanes * 4;
            A weight[S::slots];
#pragma unroll
            for (int slot = 0; slot < S::slots; slot += vector) {
              const Vector16<A> part = load16(weights + slot / 4 * 4 * lanes + slot % 4);
#pragma unroll
              for (int j = 0; j < vector; ++j) weight[slot + j] = part.values[j];
            }
#pragma unroll
            for (int t = 0; t < taps; ++t) running[t] += value * weight[t];
          }
#pragma unroll
          for (int t = 0; t < stride; ++t) sums[(first + q) * stride + t] = running[t];
#pragma unroll
          for (int t = 0; t < taps; ++t) running[t] = t + stride < taps ? running[t + stride] : A(0);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < taps - stride; ++t) sums[S::warp_columns * stride + t] = running[t];
    __syncthreads();

    // The channels that have a segment in this pass.
    const int per_row = S::per_row(shape), per_channel = S::per_channel(shape);
    const int first_segment = pass * lanes, all = shape.channels * per_channel;
    const int end_segment = first_segment + lanes < all ? first_segment + lanes : all;
    for (int channel = first_segment / per_channel; channel * per_channel < end_segment; ++channel) {
      const int from = channel * per_channel > first_segment ? channel * per_channel : first_segment;
      const int to = (channel + 1) * per_channel < end_segment ? (channel + 1) * per_channel : end_segment;
      const bool opens = slab == 0 && from == channel * per_channel;
      for (int i = thread; i < tiles.piece(); i += block_threads) {
        const int piece_y = i / tiles.width, piece_x = i % tiles.width;
        A sum = A(0);
        for (int segment = from; segment < to; ++segment) {
          const int kernel_row = (segment - channel * per_channel) / per_row;
          const int reach = piece_y - kernel_row, source = reach / shape.stride_h;
          if (reach < 0 || source * shape.stride_h != reach || source >= S::tile_rows) continue;
          const int source_lane = source % S::warp_rows * lanes + segment - first_segment;
          const int column = piece_x - (segment % per_row) * taps;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i_half = column - half * S::warp_columns * stride;
            if (i_half >= 0 && i_half < (S::warp_columns - 1) * stride + taps)
              sum += shared->sums[source / S::warp_rows * 2 + half][source_lane][i_half];
          }
        }
        A& out = piece[channel * tiles.piece() + i];
        out = opens ? sum : out + sum;
      }
    }
  }
}

// s = sum of the tiles;  out = base + tiles_scale s + before_scale before;  total = total + s, or s where it opens;
// kept = s. What is null is left out.
template <typename T>
struct Combine {
  using A = accumulate_t<T>;
  Shape shape;
  Tiles tiles;
  const A* pieces;
  const T* base;
  const A* before;
  A tiles_scale, before_scale;
  A* out;
  A* total;
  bool opens;
  A* kept;  // may be `before`
};

template <typename T>
__global__ void __launch_bounds__(block_threads, 4) combine_kernel(Combine<T> c) {
  using A = accumulate_t<T>;
  const Shape& shape = c.shape;
  const Tiles& tiles = c.tiles;
  const int64_t size = shape.signal_size(), step = int64_t(gridDim.x) * block_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x; i < size; i += step) {
    const int x = static_cast<int>(i % shape.signal_w), y = static_cast<int>(i / shape.signal_w % shape.signal_h);
    const int64_t plane = i / shape.signal_w / shape.signal_h, image = plane / shape.channels;
    const int channel = static_cast<int>(plane % shape.channels);
    const int64_t at = image * shape.signal_image + channel * shape.signal_channel + y * shape.signal_row + x;
    // Tile t begins at t `pitch` - padding and reaches `height` signal rows.
    const int pitch_y = tiles.rows * shape.stride_h, pitch_x = tiles.columns * shape.stride_w;
    const int from_y = y + shape.padding_h, from_x = x + shape.padding_w;
    const int late_y = from_y - tiles.height + pitch_y, late_x = from_x - tiles.width + pitch_x;
    const int last_y = from_y / pitch_y < tiles.down ? from_y / pitch_y : tiles.down - 1;
    const int last_x = from_x / pitch_x < tiles.across ? from_x / pitch_x : tiles.across - 1;
    A sum = A(0);
    for (int tile_y = late_y > 0 ? late_y / pitch_y : 0; tile_y <= last_y; ++tile_y)
      for (int tile_x = late_x > 0 ? late_x / pitch_x : 0; tile_x <= last_x; ++tile_x) {
        const int64_t tile = (image * tiles.down + tile_y) * tiles.across + tile_x;
        sum += c.pieces[(tile * shape.channels + channel) * tiles.piece() +
                        int64_t(from_y - tile_y * pitch_y) * tiles.width + from_x - tile_x * pitch_x];
      }
    A out = c.base ? load(c.base[at]) : A(0);
    out += c.tiles_scale * sum;
    if (c.before) out += c.before_scale * c.before[at];
    if (c.kept) c.kept[at] = sum;
    if (c.total) c.total[at] = c.opens ? sum : c.total[at] + sum;
    c.out[at] = out;
  }
}

}  // namespace dsc::cuda
