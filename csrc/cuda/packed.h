// What the operators on packed codes are made of: the steps of an iteration, each from tensors to one or two kernels.
#pragma once

#include <vector>

#include "analysis_kernel.cuh"
#include "correlation_kernel.cuh"
#include "launch.h"
#include "pack_kernels.cuh"
#include "synthesis_kernels.cuh"

#ifndef DSC_GRADIENT_PIXELS  // tests have less
#define DSC_GRADIENT_PIXELS (1 << 17)
#endif

namespace dsc::cuda {

using Sizes = std::vector<int64_t>;

// Checks what the kernels rely on; dsc_ops/_composed.py asks for these operators only where it holds.
inline Shape make_shape(const Tensor& y, const Tensor& weight, int64_t lead, const Sizes& stride,
                        const Sizes& padding) {
  const int64_t spatial = y.dim() - 2;
  STD_TORCH_CHECK((spatial == 1 || spatial == 2) && weight.dim() == lead + y.dim() &&
                      weight.size(lead + 1) == y.size(1) && int64_t(stride.size()) == spatial &&
                      int64_t(padding.size()) == spatial && y.numel() > 0 && weight.numel() > 0,
                  "dsc_ops: signal, weight, stride and padding do not fit together");
  const auto of = [&](const auto& values, int64_t axis) { return axis < 0 ? int64_t(1) : int64_t(values[axis]); };
  int64_t signal[2] = {1, 1}, kernel[2] = {1, 1}, strides[2] = {1, 1}, paddings[2] = {0, 0}, code[2] = {1, 1};
  for (int64_t d = 0; d < spatial; ++d) {
    const int64_t axis = 2 - spatial + d;
    signal[axis] = y.size(2 + d);
    kernel[axis] = weight.size(lead + 2 + d);
    strides[axis] = of(stride, d);
    paddings[axis] = of(padding, d);
    STD_TORCH_CHECK(strides[axis] >= 1 && paddings[axis] >= 0 && kernel[axis] >= 1 &&
                        signal[axis] + 2 * paddings[axis] >= kernel[axis],
                    "dsc_ops: the kernel does not fit into the signal");
    code[axis] = (signal[axis] + 2 * paddings[axis] - kernel[axis]) / strides[axis] + 1;
  }
  const int64_t n = y.size(0), c = y.size(1), m = weight.size(lead);
  Shape shape{int(n),          int(c),           int(m),          int(signal[0]), int(signal[1]),
              int(code[0]),    int(code[1]),     int(kernel[0]),  int(kernel[1]), int(strides[0]),
              int(strides[1]), int(paddings[0]), int(paddings[1])};
  shape.signal_channel = signal[0] * signal[1];
  shape.signal_image = c * shape.signal_channel;
  shape.signal_row = signal[1];
  shape.code_atom = code[0] * code[1];
  shape.code_image = m * shape.code_atom;
  shape.code_row = code[1];
  if (signal[0] == 1 && kernel[0] == 1 && paddings[0] == 0) {  // the signals are the rows of one image
    shape.rows_are_signals = true;
    shape.images = 1;
    shape.signal_h = shape.code_h = int(n);
    shape.stride_h = 1;
    shape.signal_row = shape.signal_image;
    shape.code_row = shape.code_image;
  }
  // The largest tile of a signal in shared memory, that of correlation_kernel.
  const int64_t tile = c * ((correlation_rows - 1) * shape.stride_h + shape.kernel_h) *
                       ((correlation_columns - 1) * shape.stride_w + shape.kernel_w);
  STD_TORCH_CHECK(tile * (y.scalar_type() == ScalarType::Double ? 8 : 4) <= 64 * 1024,
                  "dsc_ops: no packed kernel for a kernel of this size and stride");
  constexpr int64_t most = int64_t(1) << 31;
  STD_TORCH_CHECK(shape.slab_run(shape.runs(), 0) < most && shape.signal_w + 2 * shape.padding_w < most / 4 &&
                      shape.signal_h + 2 * shape.padding_h < most / 4,
                  "dsc_ops: a code of this size has more blocks than a launch");
  return shape;
}

// Equal slices, the last one perhaps smaller, of at most `most` signals.
inline int64_t even_slice(int64_t batch, int64_t most) {
  const int64_t slices = ceil_div(batch, std::clamp<int64_t>(most, 1, batch));
  return ceil_div(batch, slices);
}

// Signals of a slice for gradients: so many pixels of a slab, whose codes and gradients a large L2 cache holds at usual
// densities. The same on every device: it is part of the order in which a weight's gradient is summed up.
inline int64_t gradient_slice(const Shape& shape) {
  return even_slice(shape.batch(), int64_t(DSC_GRADIENT_PIXELS) * shape.batch() / shape.slab_pixels());
}

// The steps of one call, for a slice of its batch. Tensors that it makes are bytes: torch's allocator gives multiples
// of 512.
template <typename T>
class Packed {
 public:
  using A = accumulate_t<T>;

  Packed(const Tensor& on, const Shape& shape, bool tensor_cores);

  // The same for a slice of so many signals, which are no more than here.
  Packed of_batch(int64_t signals) const {
    Packed slice = *this;
    slice.shape = shape.of_batch(signals);
    slice.size = PackedSize<A>(slice.shape);
    return slice;
  }

  Shape shape;
  PackedSize<A> size;

  Tensor bytes(int64_t count) const { return empty(on_, {count}, ScalarType::Byte); }
  Tensor plane() const { return bytes(shape.signal_size() * int64_t(sizeof(A))); }

  // Signals that go through all iterations before the next ones do, for the sake of the L2 cache: as many as have room
  // in half of it with `codes` packed codes, of which a quarter is non-zero, and `planes` signals, but no fewer than
  // give every multiprocessor its blocks. Results do not depend on it.
  static int64_t cached_slice(const Shape& shape, int64_t codes, int64_t planes);

  // A weight as synthesize and analyze read it.
  Tensor synthesis_table(const T* weight) const;
  Tensor analysis_table(const T* weight) const;

  void pack(Support support, const T* dense, const PackedCode<A>& model, const PackedCode<A>& out) const;
  void unpack(const PackedCode<A>& code, T* dense) const;

  // S of a code, combined (Combine's fields but the first three); a code without masks is zero.
  void synthesize(const PackedCode<A>& code, const Tensor& table, Combine<T> combine) const;

  // Analysis's fields but shape, tile, grid and table.
  void analyze(Analysis<A> analysis, const Tensor& table) const;

  // Correlation's last five fields.
  void correlate(const A* plane, const PackedCode<A>& code, const PackedCode<A>& signs, A* partials, A* sums,
                 bool adds) const;

  // Blocks of a correlation, the same on every device: the order of a sum is part of the result.
  int64_t correlation_blocks() const {
    return std::min<int64_t>(256, int64_t(shape.images) * ceil_div(shape.code_h, correlation_rows) *
                                      ceil_div(shape.code_w, correlation_columns));
  }
  int64_t partials_size() const { return correlation_blocks() * shape.atoms * shape.taps(); }
  int64_t sums_size() const { return correlation_blocks() * 2 * shape.atoms; }

  // Of the blocks' partials or sums; and of those that slices of the batch have.
  void reduce(const Tensor& partials, int64_t count, A* out) const;
  void reduce_slices(const Tensor& sums, int64_t slices, int64_t count, T* out) const;

 private:
  Tensor on_;
  bool tensor_cores_;
  int64_t table_rounds_ = 0;
  Tensor pieces_;
};

// Compiled in packed_*.cu, each kernel once.
extern template class Packed<float>;
extern template class Packed<double>;
extern template class Packed<bfloat16>;
extern template class Packed<float16>;

}  // namespace dsc::cuda
