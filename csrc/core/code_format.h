// A packed sparse code: how codes live between the iterations of lista, and on the tape that backward reads.
//
// Per code pixel and group of atoms a mask of one bit per atom, in bytes, the lowest bit of the first byte first,
// padded to whole 64-bit words; per block of pixels the values of the non-zeros, contiguous, pixel after pixel, in
// rising order of atoms. Blocks stand anywhere in an arena of values: a place says where. Pixels are counted group by
// group, image by image, row by row.
//
// The tape of K iterations is one piece of memory, sized for the worst case and touched only as far as codes have
// non-zeros, so its size follows from shapes alone:
//
//   places     K x pixels x 16 bytes   (of which there is one for each block)
//   values     K x atoms x pixels      the arena of all iterations, filled from its start; accumulate_t
//   residuals  K x signal              y - S_D z, where worth keeping; accumulate_t
//   masks      K x pixels x mask bytes
//   end        64 bytes                what vector loads may read past the last value
//
// On a CPU pixels and signals of an iteration are those of the first slice of images, then those of the second, and so
// on, each counted as above.
#pragma once

#include "geometry.h"

namespace dsc {

struct Place {
  int64_t first, count;  // values [first, first + count) of the arena
};

DSC_HOST_DEVICE int64_t mask_bytes(int64_t atoms) { return (atoms + 63) / 64 * 8; }

struct TapeLayout {
  int64_t places, values, residuals, masks, bytes;  // where each part begins, and the size of all

  // value_size: of accumulate_t. dsc_ops/_autograd.py computes `bytes` too, from symbolic shapes.
  TapeLayout(const Geometry& g, int64_t iterations, int64_t value_size) {
    const int64_t pixels = g.batch * g.groups * g.code_pixels();
    places = 0;
    values = places + iterations * pixels * int64_t(sizeof(Place));
    residuals = values + iterations * g.code_size() * value_size;
    masks = residuals + iterations * g.signal_size() * value_size;
    bytes = masks + iterations * pixels * mask_bytes(g.group_code_channels()) + 64;
  }
};

}  // namespace dsc
