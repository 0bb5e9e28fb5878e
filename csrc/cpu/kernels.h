// The CPU kernels as plain functions over raw memory, so that simd_kernels.cpp, which is compiled for several
// instruction sets, includes no torch and no standard library template: such code, compiled for AVX-512 and merged by
// the linker with its baseline twin, would crash a machine without AVX-512.
//
// Each kernel does tasks [begin, end) of a problem; the caller runs ranges in parallel. Results never depend on how
// tasks are spread over threads. Signals are contiguous accumulate_t<T>, codes contiguous T.
#pragma once

#include <cstdint>

#include "../core/code_format.h"
#include "../core/geometry.h"
#include "../core/scalar.h"
#include "../core/threshold.h"

namespace dsc::cpu {

DSC_HOST_DEVICE int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// A dense tensor in storage order: (outer, channels, inner). NCHW is (N, M, H*W), channels_last (N*H*W, M, 1).
struct Layout {
  int64_t outer, channels, inner;
  DSC_HOST_DEVICE int64_t size() const { return outer * channels * inner; }
};

// Elements of one task of the elementwise kernels: a run inside one plane, or whole rows of channels when inner is 1.
constexpr int64_t elementwise_run = 16384;

// Tasks of the elementwise kernels and where task `index` begins and ends.
struct Run {
  int64_t begin, end;  // elements in storage order
  int64_t channel;     // of a run inside a plane; rows of channels start at channel 0
};

DSC_HOST_DEVICE int64_t runs_per_plane(const Layout& layout) {
  return (layout.inner + elementwise_run - 1) / elementwise_run;
}

DSC_HOST_DEVICE int64_t rows_per_run(const Layout& layout) {
  const int64_t rows = elementwise_run / (layout.channels > 0 ? layout.channels : 1);
  return rows > 0 ? rows : 1;
}

DSC_HOST_DEVICE int64_t run_count(const Layout& layout) {
  if (layout.size() == 0) return 0;
  if (layout.inner == 1) return (layout.outer + rows_per_run(layout) - 1) / rows_per_run(layout);
  return layout.outer * layout.channels * runs_per_plane(layout);
}

DSC_HOST_DEVICE Run run_at(const Layout& layout, int64_t index) {
  if (layout.inner == 1) {
    const int64_t rows = rows_per_run(layout), first = index * rows;
    const int64_t last = first + rows < layout.outer ? first + rows : layout.outer;
    return {first * layout.channels, last * layout.channels, 0};
  }
  const int64_t plane = index / runs_per_plane(layout), first = index % runs_per_plane(layout) * elementwise_run;
  const int64_t last = first + elementwise_run < layout.inner ? first + elementwise_run : layout.inner;
  return {plane * layout.inner + first, plane * layout.inner + last, plane % layout.channels};
}

template <typename T>
struct SoftThreshold {
  using A = accumulate_t<T>;
  Layout layout;
  const T* u;
  const T* residual;  // or null
  const A* bias;      // one per channel, or null
  const A* theta;     // theta[channel * theta_stride]
  int64_t theta_stride;
  bool one_sided;
  T* codes;
};

// Sums over a task, begun at zero and added up by the caller in the order of the tasks: sums[(task * 2 + which) * width
// + channel], width being `channels` for rows of channels and 1 for runs inside a plane. which: 0 the gradient of
// theta, 1 that of the bias.
template <typename T>
struct SoftThresholdBackward {
  Layout layout;
  const T* grad;
  const T* codes;
  T* grad_u;
  double* sums;
};

template <typename T>
struct Shrink {
  using A = accumulate_t<T>;
  Layout layout;
  const T* u;
  const A* theta;
  int64_t theta_stride;
  Activation activation;
  bool one_sided;
  T* out;
};

template <typename T>
struct ShrinkBackward {
  using A = accumulate_t<T>;
  Layout layout;
  const T* grad;
  const T* u;
  const A* theta;
  int64_t theta_stride;
  Activation activation;
  bool one_sided;
  T* grad_u;
  double* sums;  // as above with one `which`: sums[task * width + channel]
};

template <typename T>
struct L1Norm {
  int64_t size;
  const T* x;
  double alpha;
  double* sums;     // one per run of elementwise_run elements
  int64_t* counts;  // likewise
};

template <typename T>
struct L1NormBackward {
  const T* x;
  accumulate_t<T> grad;
  T* grad_x;
};

// Channels of (outer, channels, inner), whose planes are contiguous and whose samples are so many elements apart.
template <typename T>
struct Channels {
  const T* values;
  int64_t stride, outer, inner;
  DSC_HOST_DEVICE const T* plane(int64_t sample, int64_t channel) const {
    return values + sample * stride + channel * inner;
  }
};

// relu(BN(scale x + bias)), or with g: x = u is made first, u = g - scale [e; u], and normalised as u + bias. One value
// for each channel; mean and variance are written in training.
template <typename T>
struct NormRelu {
  using A = accumulate_t<T>;
  Channels<T> x;
  T* u;              // x's values
  Channels<T> g, e;  // or null
  int64_t handed;    // channels of e
  A scale;
  const A *bias, *gamma, *beta;
  A *mean, *variance;
  bool training;
  A eps;
  T* out;
  int64_t out_stride;
  bool error;  // out = g less the result
};

// Of relu(gamma xhat + beta), xhat = scale x + shift, with respect to what batch norm was given, grad_u; `inverse` is
// one over its standard deviation. One value for each channel.
template <typename T>
struct NormReluBackward {
  using A = accumulate_t<T>;
  Channels<T> x, grad, e;  // e or null
  const A *scale, *shift, *gamma, *beta, *inverse;
  bool training;  // mean and deviation are those of this batch
  A factor;
  int64_t handed;
  int64_t dotted;  // channels that have a dot: those of e, or all
  T* out;          // grad's values: factor grad_u in the channels that are handed on, grad_u in the others
  T* share;        // or null: grad_u, less grad where `error`
  int64_t share_stride;
  bool error;
  A *grad_gamma, *grad_beta;
  A* dot;  // of grad_u and e, or x
};

// --- dilated convolutions (dilated_kernels.h)
// -------------------------------------------------------------------------

// A 3x3 kernel of some dilation, of which a picture of this size has as much padding. Pictures are cut into strips.
struct Dilation {
  int64_t height, length, dilation;
  bool backward;  // p - d t in the place of p + d t
  int64_t rows;   // of a strip

  // Taps that are further away than the picture is large read nothing but zeros.
  DSC_HOST_DEVICE int64_t row_reach() const { return dilation < height ? dilation : height; }
  DSC_HOST_DEVICE int64_t column_reach() const { return dilation < length ? dilation : length; }
  DSC_HOST_DEVICE int64_t strips() const { return (height + rows - 1) / rows; }
};

// out = base + W x; base may be absent (values null) or out. In pairs of rows that are `dilation` apart the weights are
// those of F(2, 3), [point][output][input][column]. Tasks: images x strips x groups of outputs.
template <typename T>
struct DilatedConvolution {
  using A = accumulate_t<T>;
  Dilation dilation;
  int64_t images, inputs, outputs;
  Channels<T> x;
  const A* weight;
  int64_t weight_output, weight_input;  // from one output's taps to the next's, and likewise of inputs
  bool in_pairs;
  Channels<T> base;
  T* out;
  int64_t out_stride;  // of images

  // Outputs that share copies of what they read.
  DSC_HOST_DEVICE int64_t groups() const { return (outputs + 31) / 32; }
  DSC_HOST_DEVICE int64_t group() const { return (outputs + groups() - 1) / groups(); }
  DSC_HOST_DEVICE int64_t tasks() const { return images * dilation.strips() * groups(); }
};

// For each share, a range of strips of images: [channel of z][column][row][channel of x], the sums of
// z[o, p] x[c, p + d t], or of z[o, p + d t] x[c, p] where `dilation` is not backward. Tasks: shares x groups.
template <typename T>
struct DilatedCorrelation {
  using A = accumulate_t<T>;
  Dilation dilation;
  int64_t images, inputs, outputs;  // channels of x, of z
  Channels<T> x, z;
  int64_t chunk;  // strips whose sums over pixels are kept in registers
  int64_t shares;
  A* sums;

  DSC_HOST_DEVICE int64_t sums_width() const { return padded(inputs, 4); }
  DSC_HOST_DEVICE int64_t share_size() const { return outputs * 9 * sums_width(); }
  DSC_HOST_DEVICE int64_t groups() const { return (outputs + 7) / 8; }
  DSC_HOST_DEVICE int64_t group() const { return (outputs + groups() - 1) / groups(); }
  DSC_HOST_DEVICE int64_t chunks() const { return (images * dilation.strips() + chunk - 1) / chunk; }
  DSC_HOST_DEVICE int64_t first_piece(int64_t share) const {
    const int64_t pieces = images * dilation.strips(), first = chunks() * share / shares * chunk;
    return first < pieces ? first : pieces;
  }
};

// --- 3x3 convolutions of as many outputs as inputs (winograd_kernels.h) ----------------------------------------------

constexpr int64_t winograd_channels = 16;  // which the channels are a multiple of: whole vectors at every level

// Pictures whose channels come last, in tiles of 2 x 2 pixels.
struct Tiling {
  int64_t images, height, width, channels;
  DSC_HOST_DEVICE int64_t rows() const { return (height + 1) / 2; }
  DSC_HOST_DEVICE int64_t columns() const { return (width + 1) / 2; }
  DSC_HOST_DEVICE int64_t tiles() const { return images * rows() * columns(); }
  DSC_HOST_DEVICE int64_t pixels() const { return images * height * width; }
};

// filters[point][input][output] of weights [..][tap]. Tasks: inputs.
template <typename A>
struct WinogradFilters {
  int64_t channels;
  const A* weight;
  int64_t weight_output, weight_input;  // from one output's nine taps to the next's, and likewise of inputs
  bool backward;                        // the taps in the opposite order: the adjoint of a convolution
  A* filters;
};

constexpr int64_t winograd_tiles = 12;  // of a task

// out = base + factor W x; base may be absent or out. Tasks: winograd_tiles tiles.
template <typename A>
struct WinogradConvolution {
  Tiling tiling;
  const A* x;
  const A* filters;
  const A* base;
  A factor;
  A* out;
  DSC_HOST_DEVICE int64_t tasks() const { return (tiling.tiles() + winograd_tiles - 1) / winograd_tiles; }
};

// For each share, a range of tiles: the sums of which the gradient of W is made, sum of z[o, p] x[c, p + t], as
// [point][c][o]. Tasks: shares.
template <typename A>
struct WinogradCorrelation {
  Tiling tiling;
  const A *x, *z;
  int64_t shares;
  A* sums;
};

// gradient[o][c][tap] of those sums. Tasks: channels of x.
template <typename A>
struct WinogradGradient {
  int64_t channels, shares;
  const A* sums;
  A* gradient;
};

// --- batch norm and ReLU of pixels whose channels come last (rows_kernels.h) -----------------------------------------

// Tasks: runs of so many pixels.
DSC_HOST_DEVICE int64_t pixels_of_run(int64_t channels) { return channels < 4096 ? 4096 / channels : 1; }

// sums[task] is the mean and the sum of squared deviations of each channel.
template <typename A>
struct MomentsOfRows {
  int64_t pixels, channels;
  const A* x;
  A* sums;
};

// out = relu(slope x + shift + base); base may be absent.
template <typename A>
struct NormRows {
  int64_t pixels, channels;
  const A *x, *base, *slope, *shift;
  A* out;
};

// With through = grad where the ReLU let pass, sums[task] are those of through and of through (x - mean), by channel.
// Then grad_x = slope through - of_shift - of_scale (x - mean); through itself is written where it is wanted.
template <typename A>
struct NormRowsBackward {
  NormRows<A> forward;
  const A *grad, *mean;
  A* sums;
  const A *of_shift, *of_scale;
  A *grad_x, *through;
};

// --- packed codes (packed_kernels.h) --------------------------------------------------------------------------------
// A kernel works on a unit: consecutive code pixels of one group, whose patches lie in a plane, the unit's own copy of
// the part of the signal that it meets, with a border for the padding.

constexpr int64_t block_pixels = 96;    // pixels that share a place in a packed code
constexpr int64_t product_pixels = 48;  // pixels whose products with all atoms are computed before they are packed
constexpr int64_t tile_pixels = 6;      // pixels of a register tile
constexpr int64_t block_room = 16;      // values past those of a block that may be written where results have room
static_assert(block_pixels % product_pixels == 0 && product_pixels % tile_pixels == 0);

// How the analysis kernels multiply tiles: by one tap at a time, by two in bfloat16, or two neighbouring pixels
// together.
enum class TileProducts { taps, pairs_of_taps, pairs_of_pixels };

// Neighbours in a row share columns of a plane (of a signal of one axis, values of its channels), and two of them go
// through three columns of their kernels together (PairsOfPixels in analysis_kernels.h). What that reads are the plane
// and three more after it.
struct PixelPairs {
  int64_t row;            // pixels
  int64_t length;         // values of a column of a patch
  int64_t step;           // from the patch of a pixel to that of its neighbour
  int64_t threes, ones;   // columns that go three at a time, of which there are so many, and alone
  const int64_t* offset;  // where each product's factors begin, for the first and for the second pixel
  int64_t range;          // values of a column whose weights go together
  DSC_HOST_DEVICE int64_t weights() const { return 2 * (2 * threes + ones); }  // for a value of a column
};

// Where the patch of a code pixel lies in a plane, and the tables of atoms that are as long as a patch.
//
// A patch is `segments` runs of `length` contiguous values. For the sparse products it is a row of `vectors` vectors:
// each run in vectors of its own, read where it lies, or, where that would waste too many lanes, all runs copied side
// by side first. A table has atoms in the same order, cut into chunks: [chunk][atom][vectors of the chunk].
struct Patches {
  int64_t segments, length;
  int64_t size;            // segments * length
  const int64_t* segment;  // where each run begins, from the pixel's own place
  int64_t vectors;
  bool copied;
  const int64_t* vector;  // where each vector begins, from the pixel's own place or in the copy
  int64_t chunks;
  const int64_t* chunk_vectors;
  bool slides;                 // neighbours share columns, which are the runs, and a window of registers holds a patch
  int64_t row, column, fresh;  // pixels of a row, from column to column, columns that a neighbour has alone
  bool by_atoms;  // backward goes from atom to atom, since a table and its gradient are too much for the nearest cache
  TileProducts products;  // pairs of taps where a run is a column, and columns touch
  PixelPairs pairs;
  int64_t copies;  // bytes that the analysis kernels need for copies of columns
};

// A unit's plane, column by column: source + sign * (plane + the values of all parts); zero outside the signal. One of
// source and plane may be null; without a source the sign is 1; plane may be `out`. Its own rows also go to `own`, or
// are added to it. Values [from, to) of a column are the signal's; source and own are compact, and begin with the first
// of the signal's columns, where value 0 of it would be.
template <typename A>
struct PlanePart {
  const A* values;   // where value 0 of the plane's first column would be
  int64_t from, to;  // of a column
};
template <typename A>
struct PlaneSum {
  int64_t images, columns, column;  // values of a column
  int64_t image;                    // from image to image of a plane
  int64_t first_column, last_column, from, to;
  const A* source;
  int64_t compact_column, compact_image;
  const A* plane;
  const PlanePart<A>*parts, *parts_end;
  A sign;
  A* out;
  A* own;  // or null
  int64_t own_from, own_to;
  bool add;
};

// The planes that pairs of pixels read beside a plane of so many values, `size` after it and each other: each value
// less that two steps on, plus that a step on, and that a step on less it. Beyond its values the plane is zero; there
// must be room for two steps and a vector. Returns whether all are finite.
template <typename A>
struct ColumnSums {
  A* plane;
  int64_t values, step, size;
};

// The packed codes of a unit; values of the whole arena. Absent (masks null) for a zero code.
template <typename A>
struct PackedCodes {
  uint8_t* masks;
  Place* places;
  A* values;
};

// plane += sum of value * atom
template <typename A>
struct PackedSynthesis {
  int64_t pixels, atoms;
  const int64_t* base;  // of each pixel in the plane
  Patches patches;
  PackedCodes<A> codes;
  const A* table;
  A* plane;
};

// codes = T(start + A_W(plane)); `used` counts the values in the arena, for all threads.
template <typename T>
struct PackedAnalysis {
  using A = accumulate_t<T>;
  int64_t pixels, atoms;
  const int64_t* base;
  Patches patches;
  const A* plane;
  const A* weight;  // packed [range][tile of atoms][weight][atom], for Patches::products (AnalysisWeight)
  const A* theta;   // of each atom, and as many more as fill up the last vector
  bool one_sided;
  bool nonnegative;  // all of theta
  PackedCodes<A> start;
  PackedCodes<A> codes;
  int64_t* used;
};

// dense = scale T(start + A_W(plane) + bias), added to what stands there or not; no T where theta is null. Where
// `dense` is as in PackedToDense.
template <typename T>
struct DenseAnalysis {
  using A = accumulate_t<T>;
  int64_t pixels, atoms, first, image_pixels, image_size;
  const int64_t* base;
  Patches patches;
  const A* plane;
  const A* weight;
  PackedCodes<A> start;
  const A* bias;   // as theta, or null
  const A* theta;  // as in PackedAnalysis, or null
  bool one_sided;
  A scale;
  bool add;
  T* dense;
};

// From the gradient on the support of the codes: gradient += corr(residual, grad), plane += S(grad),
// grad_theta -= sign(x) grad, grad_bias += grad. What is not wanted is null.
template <typename A>
struct PackedBackwardAnalysis {
  int64_t pixels, atoms;
  const int64_t* base;
  Patches patches;
  PackedCodes<A> codes;
  PackedCodes<A> grad;  // places and values
  const A* residual;
  const A* table;
  A* gradient;
  double* grad_theta;
  double* grad_bias;
  A* plane;
};

// On the support of the codes: result = grad - A(plane), gradient -= corr(plane, codes).
template <typename A>
struct PackedBackwardSynthesis {
  int64_t pixels, atoms;
  const int64_t* base;
  Patches patches;
  PackedCodes<A> codes;
  PackedCodes<A> grad;  // on its own support
  const A* plane;
  const A* table;
  A* gradient;            // or null
  const A* tap_weight;    // -1 times the same atoms as in PackedAnalysis, where Patches::by_atoms
  PackedCodes<A> result;  // each block has block_room more
  int64_t* used;
};

// result = a x + b y on the mask `on`, or on the union of both supports; y may be absent.
template <typename A>
struct PackedCombine {
  int64_t pixels, atoms;
  A a;
  PackedCodes<A> x;
  A b;
  PackedCodes<A> y;
  const uint8_t* on;
  PackedCodes<A> result;
  int64_t* used;
};

// The unit's pixels are [first, first + pixels) of the group's; image_size is the distance from one image of the dense
// code to the next.
template <typename T>
struct PackedToDense {
  int64_t pixels, atoms, first, image_pixels, image_size;
  PackedCodes<accumulate_t<T>> codes;
  T* dense;
};

template <typename T>
struct PackedFromDense {
  int64_t pixels, atoms, first, image_pixels, image_size;
  const T* dense;
  const uint8_t* on;  // the support to read, or null for the code's own
  PackedCodes<accumulate_t<T>> codes;
  int64_t* used;
};

// One instruction set level's kernels for element type T. Each takes a scratch of the size it asks for, aligned to 64
// bytes; those that go through packed codes workspace_size and, before that, Patches::copies.
struct KernelSizes {
  int64_t lanes;
  int64_t tile_vectors;     // of atoms in a register tile of packed_analysis, at most
  int64_t chunk_vectors;    // of a chunk of a table, at most
  int64_t window_vectors;   // of a patch that slides, at most
  int64_t taps_per_range;   // taps of a tile's weights that are read again and again from the first-level cache
  int64_t pairs_per_range;  // the same where the analysis kernels multiply pairs of taps; 0 if they cannot
};

template <typename T>
struct Kernels : KernelSizes {
  void (*soft_threshold)(const SoftThreshold<T>&, int64_t begin, int64_t end);
  void (*soft_threshold_backward)(const SoftThresholdBackward<T>&, int64_t begin, int64_t end);
  void (*shrink)(const Shrink<T>&, int64_t begin, int64_t end);
  void (*shrink_backward)(const ShrinkBackward<T>&, int64_t begin, int64_t end);
  void (*l1_norm)(const L1Norm<T>&, int64_t begin, int64_t end);
  void (*l1_norm_backward)(const L1NormBackward<T>&, int64_t begin, int64_t end);
  void (*norm_relu)(const NormRelu<T>&, int64_t begin, int64_t end);
  void (*norm_relu_backward)(const NormReluBackward<T>&, int64_t begin, int64_t end);
  int64_t (*dilated_convolution_scratch)(const DilatedConvolution<T>&);
  void (*dilated_convolution)(const DilatedConvolution<T>&, int64_t begin, int64_t end, char* scratch);
  int64_t (*dilated_correlation_scratch)(const DilatedCorrelation<T>&);
  void (*dilated_correlation)(const DilatedCorrelation<T>&, int64_t begin, int64_t end, char* scratch);
  void (*winograd_filters)(const WinogradFilters<accumulate_t<T>>&, int64_t begin, int64_t end);
  int64_t (*winograd_convolution_scratch)(const WinogradConvolution<accumulate_t<T>>&);
  void (*winograd_convolution)(const WinogradConvolution<accumulate_t<T>>&, int64_t begin, int64_t end, char* scratch);
  int64_t (*winograd_correlation_scratch)(const WinogradCorrelation<accumulate_t<T>>&);
  void (*winograd_correlation)(const WinogradCorrelation<accumulate_t<T>>&, int64_t begin, int64_t end, char* scratch);
  void (*winograd_gradient)(const WinogradGradient<accumulate_t<T>>&, int64_t begin, int64_t end);
  void (*moments_of_rows)(const MomentsOfRows<accumulate_t<T>>&, int64_t begin, int64_t end);
  void (*norm_rows)(const NormRows<accumulate_t<T>>&, int64_t begin, int64_t end);
  void (*norm_rows_sums)(const NormRowsBackward<accumulate_t<T>>&, int64_t begin, int64_t end);
  void (*norm_rows_backward)(const NormRowsBackward<accumulate_t<T>>&, int64_t begin, int64_t end);
  int64_t (*workspace_size)(int64_t atoms, int64_t vectors);
  void (*packed_synthesis)(const PackedSynthesis<accumulate_t<T>>&, char* scratch);
  void (*packed_analysis)(const PackedAnalysis<T>&, char* scratch);
  void (*dense_analysis)(const DenseAnalysis<T>&, char* scratch);
  void (*packed_backward_analysis)(const PackedBackwardAnalysis<accumulate_t<T>>&, char* scratch);
  void (*packed_backward_synthesis)(const PackedBackwardSynthesis<accumulate_t<T>>&, char* scratch);
  void (*packed_combine)(const PackedCombine<accumulate_t<T>>&, char* scratch);
  void (*packed_to_dense)(const PackedToDense<T>&, char* scratch);
  void (*packed_from_dense)(const PackedFromDense<T>&, char* scratch);
  void (*sum_planes)(const PlaneSum<accumulate_t<T>>&);
  bool (*sum_columns)(const ColumnSums<accumulate_t<T>>&);
  int64_t (*count_bits)(const uint8_t* masks, int64_t bytes);
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<bfloat16> bf16;
  Kernels<float16> fp16;
};

extern const KernelSet kernels_baseline;
extern const KernelSet kernels_avx2;
extern const KernelSet kernels_avx512;
extern const KernelSet kernels_avx512_bf16;  // in the object of avx512

// Vectors of the tile of atoms that begins `left` vectors before the end.
DSC_HOST_DEVICE int64_t tile_vectors_of(int64_t most, int64_t left) {
  return most >= 4 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

}  // namespace dsc::cpu
