// Sizes and offsets of packed codes of any size, for test_cuda_packed.py.
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
  found[2] = size.offsets;
  found[3] = size.values;
  found[4] = dsc::cuda::room_of<float>(shape, shape.slabs() - 1, shape.runs() - 1);
  found[5] = shape.signal_size();
}
