// The steps of packed.h, from the table of compiled kernels to launches. Included where Packed is compiled, nowhere
// else.
#pragma once

#include "packed.h"

namespace dsc::cuda {

// The kernels compiled for one width of segments and one stride; `blocks` of analysis_kernel fit on a multiprocessor.
template <typename A, int taps, int stride_>
struct Tiling {
  static constexpr int stride = stride_;
  using S = Segments<taps>;
  using Products = FusedProducts<A, taps, stride>;
  static constexpr int blocks = sizeof(A) == 8 ? 1 : 4;
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
    if (divides(3, 2)) return visit(Tiling<A, 3, 2>());
  }
  if (divides(3, 1)) return visit(Tiling<A, 3, 1>());
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

template <typename A>
Tiles synthesis_tiles(const Shape& shape) {
  Tiles tiles{};
  visit_tiling<A>(shape, [&](auto tiling) { tiles = tiles_of<typename decltype(tiling)::S>(shape); });
  return tiles;
}

// Of all blocks of a synthesis.
template <typename A>
int64_t pieces_bytes(const Shape& shape) {
  const Tiles tiles = synthesis_tiles<A>(shape);
  return int64_t(shape.images) * tiles.down * tiles.across * shape.channels * tiles.piece() * int64_t(sizeof(A));
}

template <typename T>
Packed<T>::Packed(const Tensor& on, const Shape& shape, bool tensor_cores)
    : shape(shape), size(shape), on_(on), tensor_cores_(tensor_cores) {
  visit_tiling<A>(shape, [&](auto tiling) { table_rounds_ = decltype(tiling)::S::passes(shape) * shape.slabs(); });
  pieces_ = bytes(pieces_bytes<A>(shape));
}

template <typename T>
int64_t Packed<T>::cached_slice(const Shape& shape, int64_t codes, int64_t planes) {
  const DeviceLimits device = device_limits();
  const int64_t batch = shape.batch();
  const PackedSize<A> size(shape);
  const int64_t code = size.masks * 2 + size.values * int64_t(sizeof(A)) / 4;
  const int64_t bytes = codes * code + planes * shape.signal_size() * int64_t(sizeof(A)) + pieces_bytes<A>(shape);
  const int64_t fits = batch * (device.cache / 2) / bytes;
  const int64_t fills = ceil_div(batch * device.blocks * analysis_rows * analysis_columns, shape.slab_pixels());
  return even_slice(batch, std::max(fits, fills));
}

template <typename T>
Tensor Packed<T>::synthesis_table(const T* weight) const {
  const Tensor table = bytes(table_rounds_ * slab_atoms * slab_atoms * int64_t(sizeof(A)));
  visit_tiling<A>(shape, [&](auto tiling) {
    launch(on_, ceil_div(table_rounds_ * slab_atoms * slab_atoms, block_threads),
           arrange_synthesis_kernel<T, typename decltype(tiling)::S>, shape, weight, mutable_data<A>(table));
  });
  return table;
}

template <typename T>
Tensor Packed<T>::analysis_table(const T* weight) const {
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

template <typename T>
void Packed<T>::pack(Support support, const T* dense, const PackedCode<A>& model, const PackedCode<A>& out) const {
  launch(on_, ceil_div(shape.runs() * shape.slabs(), block_warps), pack_kernel<T>, shape, support, dense, model, out);
}

template <typename T>
void Packed<T>::unpack(const PackedCode<A>& code, T* dense) const {
  launch(on_, ceil_div(shape.runs() * shape.slabs(), block_warps), unpack_kernel<T>, shape, code, dense);
}

template <typename T>
void Packed<T>::synthesize(const PackedCode<A>& code, const Tensor& table, Combine<T> combine) const {
  combine.shape = shape;
  combine.tiles = synthesis_tiles<A>(shape);
  combine.pieces = data<A>(pieces_);
  if (code.masks) {
    visit_tiling<A>(shape, [&](auto tiling) {
      using Tiling = decltype(tiling);
      using Shared = SynthesisShared<A, typename Tiling::S, Tiling::stride>;
      const Tiles& tiles = combine.tiles;
      launch(on_, dim3(unsigned(int64_t(shape.images) * tiles.down * tiles.across)), sizeof(Shared),
             synthesis_kernel<A, typename Tiling::S, Tiling::stride>,
             Synthesis<A>{shape, tiles, code, data<A>(table), mutable_data<A>(pieces_)});
    });
  } else {
    combine.tiles.down = 0;
  }
  launch(on_, ceil_div(shape.signal_size(), block_threads), combine_kernel<T>, combine);
}

template <typename T>
void Packed<T>::analyze(Analysis<A> analysis, const Tensor& table) const {
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

template <typename T>
void Packed<T>::correlate(const A* plane, const PackedCode<A>& code, const PackedCode<A>& signs, A* partials, A* sums,
                          bool adds) const {
  const int rows = (correlation_rows - 1) * shape.stride_h + shape.kernel_h;
  const int pitch = (correlation_columns - 1) * shape.stride_w + shape.kernel_w;
  const Correlation<A> correlation{shape,
                                   int(ceil_div(shape.code_w, correlation_columns)),
                                   int(ceil_div(shape.code_h, correlation_rows)),
                                   rows,
                                   pitch,
                                   plane,
                                   code,
                                   signs,
                                   partials,
                                   sums,
                                   adds};
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

template <typename T>
void Packed<T>::reduce(const Tensor& partials, int64_t count, A* out) const {
  sum_partials(on_, data<A>(partials), correlation_blocks(), count, out);
}

template <typename T>
void Packed<T>::reduce_slices(const Tensor& sums, int64_t slices, int64_t count, T* out) const {
  sum_partials(on_, data<A>(sums), slices, count, out);
}

}  // namespace dsc::cuda
