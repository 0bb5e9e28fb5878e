// Sizes of packed codes and places in them of any size, for test_cuda_packed.py.
#include "cuda/packed.cuh"

extern "C" __attribute__((visibility("default"))) void offsets(int64_t images, int64_t atoms, int64_t height,
                                                               int64_t width, int64_t* found) {
  dsc::cuda::Shape shape{};
  shape.images = static_cast<int>(images);
  shape.atoms = static_cast<int>(atoms);
  shape.channels = 1;
  shape.code_h = shape.signal_h = static_cast<int>(height);
  shape.code_w = shape.signal_w = static_cast<int>(width);
  const dsc::cuda::PackedSize<float> size(shape);
  found[0] = shape.runs();
  found[1] = size.masks;
  found[2] = size.values;
  found[3] = dsc::cuda::room_of(shape, shape.runs() - 1, shape.slabs() - 1);
  found[4] = shape.signal_size();
}
