// As kernels.cpp the kernels on packed codes: what check_packed.py loads. One step of lista and one correlation, in
// float32, for kernel rows of three taps and stride 1; each kernel is compiled once, so that a defect planted in one is
// built in a moment.
#include <cmath>
#include <vector>

#include "cuda/analysis_kernel.cuh"
#include "cuda/correlation_kernel.cuh"
#include "cuda/pack_kernels.cuh"
#include "cuda/synthesis_kernels.cuh"
#include "harness.h"

namespace {

using namespace dsc::cuda;
using Segment = Segments<3>;
using Products = FusedProducts<float, 3, 1>;

Shape make_shape(int64_t images, int64_t channels, int64_t atoms, int64_t height, int64_t width) {
  const int h = static_cast<int>(height), w = static_cast<int>(width);
  Shape shape{int(images), int(channels), int(atoms), h, w, h, w, 3, 3, 1, 1, 1, 1};
  shape.signal_row = shape.code_row = width;
  shape.signal_channel = shape.code_atom = height * width;
  shape.signal_image = channels * height * width;
  shape.code_image = atoms * height * width;
  return shape;
}

// As from torch's allocator in the tests.
std::vector<float> unwritten(int64_t size) { return std::vector<float>(size, NAN); }

// A packed code, its parts in memory of exactly their size.
struct Code {
  explicit Code(const Shape& shape)
      : masks(PackedSize<float>(shape).masks, uint16_t(-1)), values(unwritten(PackedSize<float>(shape).values)) {}
  PackedCode<float> parts() { return {masks.data(), values.data()}; }
  std::vector<uint16_t> masks;
  std::vector<float> values;
};

int64_t run_blocks(const Shape& shape) { return ceil_div(shape.slab_run(shape.runs(), 0), block_warps); }

}  // namespace

extern "C" {

DSC_EXPORT void seed(uint64_t value) { cuda_sim::seed(value); }

// out = T(x + A_W r), r = y - 1.5 S_D x + 0.5 before.
DSC_EXPORT const char* step(int64_t images, int64_t channels, int64_t atoms, int64_t height, int64_t width, float* y,
                            float* before, float* x, float* dictionary, float* analysis, float* theta, float* out) {
  const Shape shape = make_shape(images, channels, atoms, height, width);
  const int64_t signals = shape.signal_size(), weights = atoms * shape.taps(), size = images * shape.code_image;
  DeviceArray<float> device_y(y, signals), device_before(before, signals), device_x(x, size), device_out(out, size);
  DeviceArray<float> device_dictionary(dictionary, weights), device_analysis(analysis, weights);
  DeviceArray<float> device_theta(theta, atoms);
  Code code(shape), next(shape);
  launch(run_blocks(shape), pack_kernel<float>, shape, Support::nonzeros, device_x.data(), PackedCode<float>{},
         code.parts());

  const Tiles tiles = tiles_of<Segment>(shape);
  const int64_t blocks = images * tiles.down * tiles.across;
  std::vector<float> synthesis_table = unwritten(Segment::passes(shape) * shape.slabs() * slab_atoms * slab_atoms);
  std::vector<float> pieces = unwritten(blocks * channels * tiles.piece()), residual = unwritten(signals);
  launch(4, arrange_synthesis_kernel<float, Segment>, shape, device_dictionary.data(), synthesis_table.data());
  launch(dim3(unsigned(blocks)), sizeof(SynthesisShared<float, Segment, 1>), synthesis_kernel<float, Segment, 1>,
         Synthesis<float>{shape, tiles, code.parts(), synthesis_table.data(), pieces.data()});
  launch(3, combine_kernel<float>,
         Combine<float>{shape, tiles, pieces.data(), device_y.data(), device_before.data(), -1.5f, 0.5f,
                        residual.data(), nullptr, false, nullptr});

  const int64_t slab_size = Products::units(shape) * Products::unit_weights;
  std::vector<float> analysis_table = unwritten(shape.slabs() * slab_size);
  launch(4, arrange_analysis_kernel<float, Products>, shape, slab_size, device_analysis.data(), analysis_table.data());
  Analysis<float> fields{};
  fields.shape = shape;
  fields.tile = plane_tile(shape);
  fields.across = static_cast<int>(ceil_div(width, analysis_columns));
  fields.down = static_cast<int>(ceil_div(height, analysis_rows));
  fields.plane = residual.data();
  fields.table = analysis_table.data();
  fields.first = {code.parts(), 1.0f};
  fields.theta = device_theta.data();
  fields.out = next.parts();
  launch(dim3(unsigned(images * fields.down * fields.across), unsigned(shape.slabs())),
         AnalysisShared<float>::bytes<Products>(shape, fields.tile), analysis_kernel<float, Products, 4>, fields);
  launch(run_blocks(shape), unpack_kernel<float>, shape, next.parts(), device_out.data());
  return complaint();
}

// [block][M][tap], two blocks.
DSC_EXPORT const char* correlate(int64_t images, int64_t channels, int64_t atoms, int64_t height, int64_t width,
                                 float* y, float* x, float* partials) {
  const Shape shape = make_shape(images, channels, atoms, height, width);
  DeviceArray<float> device_y(y, shape.signal_size()), device_x(x, images * shape.code_image);
  DeviceArray<float> device_partials(partials, 2 * atoms * shape.taps());
  Code code(shape);
  launch(run_blocks(shape), pack_kernel<float>, shape, Support::nonzeros, device_x.data(), PackedCode<float>{},
         code.parts());
  const int rows = correlation_rows + 2, pitch = correlation_columns + 2;
  Correlation<float> fields{};
  fields.shape = shape;
  fields.across = static_cast<int>(ceil_div(width, correlation_columns));
  fields.down = static_cast<int>(ceil_div(height, correlation_rows));
  fields.rows = rows;
  fields.pitch = pitch;
  fields.plane = device_y.data();
  fields.code = code.parts();
  fields.partials = device_partials.data();
  launch(dim3(2, unsigned(shape.slabs())), sizeof(CorrelationShared<float>) + channels * rows * pitch * sizeof(float),
         correlation_kernel<float, 1>, fields);
  return complaint();
}
}
