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
//   unused     1/32 of the values' size
//   places     K x (pixels / 32 + groups) x 16 bytes   (of which there is one for each block)
//   masks      K x pixels x mask bytes
//   residuals  K x signal              y - S_D z, where worth keeping; accumulate_t
//   values     K x atoms x pixels      the arena of all iterations, filled from its start; accumulate_t
//   end        64 bytes                what vector loads may read past the last value
//
// What is written lies between parts that are not, so that it lies in large pages, wherever they begin in this memory.
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

// Of an iteration, the place of a slice's first block, by the slice's first pixel, and in a slice that of an image
// which is cut into strips. Units have 192 pixels and more, but for one a group and slice, or image, and a group of a
// slice has as many, but in the last: so q pixels have at most q / 48 blocks, in the last slice q / 64 and one a group.
DSC_HOST_DEVICE int64_t first_place(int64_t pixel) { return pixel / 32; }

struct TapeLayout {
  int64_t places, masks, residuals, values, bytes;  // where each part begins, and the size of all
  int64_t step_places;                              // of one iteration

  // value_size: of accumulate_t. dsc_ops/_autograd.py computes `bytes` too, from symbolic shapes.
  TapeLayout(const Geometry& g, int64_t iterations, int64_t value_size) {
    const int64_t pixels = g.batch * g.groups * g.code_pixels();
    const int64_t size_of_values = iterations * g.code_size() * value_size;
    step_places = first_place(pixels) + g.groups;
    places = (size_of_values + 2047) / 2048 * 64;
    masks = places + iterations * step_places * int64_t(sizeof(Place));
    residuals = masks + iterations * pixels * mask_bytes(g.group_code_channels());
    values = residuals + iterations * g.signal_size() * value_size;
    bytes = values + size_of_values + 64;
  }
};

}  // namespace dsc
