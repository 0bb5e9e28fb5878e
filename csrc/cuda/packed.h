// What the operators on packed codes are made of: the steps of an iteration, each from tensors to one or two kernels.
#pragma once

#include <string>
#include <vector>

#include "analysis_kernel.cuh"
#include "correlation_kernel.cuh"
#include "launch.h"
#include "pack_kernels.cuh"
#include "synthesis_kernels.cuh"

namespace dsc::cuda {

using Sizes = std::vector<int64_t>;

// Checks what the kernels rely on; dsc_ops/_composed.py asks for these operators only where it holds.
inline Shape make_shape(const Tensor& y, const Tensor& weight, int64_t lead, const Sizes& stride, const Sizes& padding) {
  const int64_t spatial = y.dim() - 2;
  STD_TORCH_CHECK((spatial == 1 || spatial == 2) && weight.dim() == lead + y.dim() &&
                      weight.size(lead + 1) == y.size(1) && int64_t(stride.size()) == spatial &&
                      int64_t(padding.size()) == spatial,
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
  Shape shape{int(n),         int(c),         int(m),         int(signal[0]), int(signal[1]), int(code[0]),
              int(code[1]),   int(kernel[0]), int(kernel[1]), int(strides[0]), int(strides[1]), int(paddings[0]),
              int(paddings[1])};
  shape.signal_channel = signal[0] * signal[1];
  shape.signal_image = c * shape.signal_channel;
  shape.signal_row = signal[1];
  shape.code_atom = code[0] * code[1];
  shape.code_image = m * shape.code_atom;
  shape.code_row = code[1];
  if (signal[0] == 1 && kernel[0] == 1 && paddings[0] == 0) {  // the signals are the rows of one image
    shape.images = 1;
    shape.signal_h = shape.code_h = int(n);
    shape.stride_h = 1;
    shape.signal_row = shape.signal_image;
    shape.code_row = shape.code_image;
  }
  constexpr int64_t most = int64_t(1) << 31;
  STD_TORCH_CHECK(shape.runs() * run_pixels * m < 2 * most && shape.signal_w + 2 * shape.padding_w < most / 4 &&
                      shape.signal_h + 2 * shape.padding_h < most / 4,
                  "dsc_ops: a code of this size has no place in 32-bit offsets of 16 bytes");
  return shape;
}

// The kernels compiled for one width of segments and one stride; `blocks` of analysis_kernel fit on a multiprocessor.
template <typename A, int taps, int stride_>
struct Tiling {
  static constexpr int stride = stride_;
  using S = Segments<taps>;
  using Products = FusedProducts<A, taps, stride>;
  static constexpr int blocks = sizeof(A) == 8 ? 1 : stride == 1 ? 4 : 3;
};

// visit(Tiling) for a shape. dsc_ops/_composed.py knows the same table.
template <typename A, typename Visit>
void visit_tiling(const Shape& shape, const Visit& visit) {
  const auto divides = [&](int taps, int stride) { return shape.stride_w == stride && shape.kernel_w % taps == 0; };
  if constexpr (sizeof(A) == 4) {
    if (divides(7, 1)) return visit(Tiling<A, 7, 1>());
    if (divides(5, 1)) return visit(Tiling<A, 5, 1>());
    if (divides(4, 1)) return visit(Tiling<A, 4, 1>());
    if (divides(7, 2)) return visit(Tiling<A, 7, 2>());
    if (divides(5, 2)) return visit(Tiling<A, 5, 2>());
  }
  if (divides(3, 1)) return visit(Tiling<A, 3, 1>());
  if (divides(3, 2)) return visit(Tiling<A, 3, 2>());
  STD_TORCH_CHECK(false, "dsc_ops: no packed kernel for kernel width ", shape.kernel_w, " and stride ", shape.stride_w);
}

// How inner products are taken: the type's own arithmetic, or tensor cores.
template <typename Products_, int blocks_>
struct Analyzer {
  using Products = Products_;
  static constexpr int blocks = blocks_;
};

template <typename T, typename Visit>
void visit_analyzer(const Shape& shape, bool tensor_cores, const Visit& visit) {
  if constexpr (std::is_same_v<T, bfloat16>) return visit(Analyzer<TensorProducts<Tensor32::bf16>, 4>());
  if constexpr (std::is_same_v<T, float16>) return visit(Analyzer<TensorProducts<Tensor32::f16>, 4>());
  if constexpr (std::is_same_v<T, float>)
    if (tensor_cores) return visit(Analyzer<TensorProducts<Tensor32::tf32>, 4>());
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>)
    visit_tiling<accumulate_t<T>>(shape, [&](auto tiling) {
      using Tiling = decltype(tiling);
      visit(Analyzer<typename Tiling::Products, Tiling::blocks>());
    });
}

// The steps of one call. Tensors that it makes are bytes: torch's allocator gives multiples of 512.
template <typename T>
class Packed {
 public:
  using A = accumulate_t<T>;

  Packed(const Tensor& on, const Shape& shape, bool tensor_cores)
      : shape(shape), size(shape), on_(on), tensor_cores_(tensor_cores) {
    visit_tiling<A>(shape, [&](auto tiling) {
      using S = typename decltype(tiling)::S;
      tiles_ = tiles_of<S>(shape);
      table_rounds_ = S::passes(shape) * shape.slabs();
    });
    pieces_ = bytes(int64_t(shape.images) * tiles_.down * tiles_.across * shape.channels * tiles_.piece() * sizeof(A));
  }

  Shape shape;
  PackedSize<A> size;

  Tensor bytes(int64_t count) const { return empty(on_, {count}, ScalarType::Byte); }
  Tensor plane() const { return bytes(shape.signal_size() * sizeof(A)); }

  Tensor synthesis_table(const T* weight) const {
    const Tensor table = bytes(table_rounds_ * slab_atoms * slab_atoms * int64_t(sizeof(A)));
    visit_tiling<A>(shape, [&](auto tiling) {
      launch(on_, ceil_div(table_rounds_ * slab_atoms * slab_atoms, block_threads),
             arrange_synthesis_kernel<T, typename decltype(tiling)::S>, shape, weight, mutable_data<A>(table));
    });
    return table;
  }

  Tensor analysis_table(const T* weight) const {
    Tensor table = bytes(0);
    visit_analyzer<T>(shape, tensor_cores_, [&](auto analyzer) {
      using Products = typename decltype(analyzer)::Products;
      using Weight = typename Products::Weight;
      const int64_t slab_size = int64_t(Products::units(shape)) * Products::unit_weights;
      table = bytes(shape.slabs() * slab_size * int64_t(sizeof(Weight)));
      launch(on_, ceil_div(shape.slabs() * slab_size, block_threads), arrange_analysis_kernel<T, Products>, shape,
             slab_size, weight, mutable_data<Weight>(table));
    });
    return table;
  }

  void pack(Support support, const T* dense, const PackedCode<A>& model, const PackedCode<A>& out) const {
    launch(on_, ceil_div(shape.runs() * shape.slabs(), block_warps), pack_kernel<T>, shape, support, dense, model, out);
  }

  void unpack(const PackedCode<A>& code, T* dense) const {
    launch(on_, ceil_div(shape.runs() * shape.slabs(), block_warps), unpack_kernel<T>, shape, code, dense);
  }

  // S of a code, combined (Combine's fields but the first three); a code without masks is zero.
  void synthesize(const PackedCode<A>& code, const Tensor& table, Combine<T> combine) const {
    combine.shape = shape;
    combine.tiles = tiles_;
    combine.pieces = data<A>(pieces_);
    if (code.masks) {
      visit_tiling<A>(shape, [&](auto tiling) {
        using Tiling = decltype(tiling);
        using Shared = SynthesisShared<A, typename Tiling::S, Tiling::stride>;
        launch(on_, dim3(unsigned(int64_t(shape.images) * tiles_.down * tiles_.across)), sizeof(Shared),
               synthesis_kernel<A, typename Tiling::S, Tiling::stride>,
               Synthesis<A>{shape, tiles_, code, data<A>(table), mutable_data<A>(pieces_)});
      });
    } else {
      combine.tiles.down = 0;
    }
    launch(on_, ceil_div(shape.signal_size(), block_threads), combine_kernel<T>, combine);
  }

  // Analysis's fields but shape, tile and grid.
  void analyze(Analysis<A> analysis, const Tensor& table) const {
    analysis.shape = shape;
    analysis.tile = plane_tile(shape);
    analysis.across = static_cast<int>(ceil_div(shape.code_w, analysis_columns));
    analysis.down = static_cast<int>(ceil_div(shape.code_h, analysis_rows));
    analysis.table = table.const_data_ptr();
    visit_analyzer<T>(shape, tensor_cores_, [&](auto analyzer) {
      using Products = typename decltype(analyzer)::Products;
      const dim3 grid(unsigned(int64_t(shape.images) * analysis.down * analysis.across), shape.slabs());
      const size_t shared = AnalysisShared<A>::template bytes<Products>(shape, analysis.tile);
      launch(on_, grid, shared, analysis_kernel<A, Products, decltype(analyzer)::blocks>, analysis);
    });
  }

  // Blocks of a correlation, the same on every device: the order of a sum is part of the result.
  int64_t correlation_blocks() const {
    return std::min<int64_t>(256, int64_t(shape.images) * ceil_div(shape.code_h, correlation_rows) *
                                      ceil_div(shape.code_w, correlation_columns));
  }
  int64_t partials_size() const { return correlation_blocks() * shape.atoms * shape.taps(); }
  int64_t sums_size() const { return correlation_blocks() * 2 * shape.atoms; }

  void correlate(const A* plane, const PackedCode<A>& code, const PackedCode<A>& signs, A* partials, A* sums,
                 bool adds) const {
    const int rows = (correlation_rows - 1) * shape.stride_h + shape.kernel_h;
    const int pitch = (correlation_columns - 1) * shape.stride_w + shape.kernel_w;
    const Correlation<A> correlation{shape, int(ceil_div(shape.code_w, correlation_columns)),
                                     int(ceil_div(shape.code_h, correlation_rows)), rows, pitch, plane, code, signs,
                                     partials, sums, adds};
    const size_t shared = sizeof(CorrelationShared<A>) + shape.channels * rows * pitch * sizeof(A);
    const auto go = [&](auto lane_taps, auto kernel) {
      const int taps = partials ? shape.taps() : 1;
      const dim3 grid(unsigned(correlation_blocks()), shape.slabs(), unsigned(ceil_div(taps, warp_threads * lane_taps)));
      launch(on_, grid, shared, kernel, correlation);
    };
    const int64_t lane_taps = ceil_div(shape.taps(), warp_threads);
    if constexpr (sizeof(A) == 4) {
      if (lane_taps == 1) return go(1, correlation_kernel<A, 1>);
      if (lane_taps == 3) return go(3, correlation_kernel<A, 3>);
      if (lane_taps == 5) return go(5, correlation_kernel<A, 5>);
    }
    go(2, correlation_kernel<A, 2>);
  }

  // Of the blocks' partials or sums.
  void reduce(const Tensor& partials, int64_t count, T* out) const {
    sum_partials(on_, data<A>(partials), correlation_blocks(), count, out);
  }

 private:
  Tensor on_;
  bool tensor_cores_;
  Tiles tiles_{};
  int64_t table_rounds_ = 0;
  Tensor pieces_;
};

}  // namespace dsc::cuda
