// How a convolution between signals and packed codes is laid out in memory and cut into units that threads share.
//
// Images are independent, so lista takes them in slices, each a problem of its own.
// The code pixels of each group are cut into units: whole images, or strips of rows where images are few and large. A
// unit reads and writes the signal through a plane of its own, [image][column][row][channel] with a border for the
// padding, so units never wait for each other inside a phase and sums do not depend on the number of threads. Images
// between phases are compact: [group][image][column][row][channel]. A signal of one axis lies along the columns.
#pragma once

#include <vector>

#include "host.h"

namespace dsc::cpu {

struct Unit {
  int64_t group;
  int64_t first, pixels;     // code pixels [first, first + pixels) of the group's batch x code pixels
  int64_t block;             // its first place in a packed code
  int64_t image, images;     // which images they lie in
  int64_t strip, strips;     // of each image
  int64_t row;               // padded signal row of the plane's first row
  int64_t own_from, own_to;  // signal rows that are this unit's to write
};

class Plan {
 public:
  // vector: lanes of the kernels' vectors; chunk_vectors: how many a chunk of a table may have;
  // pairs: whether the analysis kernels can multiply pairs of taps; whole: units are whole images.
  Plan(const Geometry& geometry, int64_t vector, int64_t chunk_vectors, int64_t window_vectors, int64_t value_size,
       bool pairs, bool whole);

  Geometry g;  // a signal of one axis turned so that it lies along h
  std::vector<Unit> units;
  int64_t group_pixels;                                       // code pixels of a group: batch x code_h x code_w
  int64_t blocks;                                             // places of a packed code
  int64_t plane_w, plane_h, column, plane_image, plane_size;  // sizes and strides of a plane, in values
  int64_t group_signal;                                       // values of a group in a compact image
  int64_t stride;                                             // of an atom in a table
  std::vector<int64_t> base;                                  // of each pixel of the largest unit in its plane
  // Where the j-th value of a patch, in the order of its segments, stands in a weight (C/groups, kh, kw); and where the
  // j-th value of an atom in a table does, below 0 for none.
  std::vector<int64_t> tap, table_tap;

  Patches patches() const {
    const auto count = [](const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); };
    return {count(segment_), g.patch() / count(segment_),
            g.patch(),       segment_.data(),
            count(vector_),  copied_,
            vector_.data(),  count(chunks_),
            chunks_.data(),  slides_,
            g.code_w,        g.dilation_w * column,
            g.stride_w,      by_atoms_,
            in_pairs_};
  }
  int64_t vectors() const { return static_cast<int64_t>(vector_.size()); }
  // Where the unit's pixels begin among all pixels of all groups.
  int64_t pixel(const Unit& unit) const { return unit.group * group_pixels + unit.first; }
  int64_t table_size() const { return g.group_code_channels() * stride; }
  int64_t weight_size() const { return g.code_channels * g.patch(); }

 private:
  std::vector<int64_t> segment_, vector_, chunks_;
  bool copied_, slides_, by_atoms_, in_pairs_;
  void make_units(bool whole);
};

// How many images go through all steps of lista together, with threads for their units.
int64_t images_of_slice(const Geometry& geometry);
// How many make up a unit where units are whole images, of which there are enough for threads; else 0.
int64_t images_of_unit(const Geometry& geometry);

// A compact copy of signals (N, C, *), and back.
template <typename T>
void to_compact(const Plan& plan, const T* signal, accumulate_t<T>* compact);
template <typename T>
void from_compact(const Plan& plan, const accumulate_t<T>* compact, T* signal);

// A weight (M, C/groups, *kernel) as the analysis kernels read it, in pairs of taps where they do (scale is 1 or -1),
// and as a table of atoms; all groups.
template <typename T>
Buffer<accumulate_t<T>> analysis_weight(const Plan& plan, const T* weight, accumulate_t<T> scale, bool in_pairs);
template <typename T>
Buffer<accumulate_t<T>> atom_table(const Plan& plan, const T* weight);

// out, a unit's plane, = source - sum of the planes of all units that overlap it (sign -1), or their sum (sign 1,
// source null); planes null for none. The unit's own rows also go to `own` (compact, or null): written, or added to it.
template <typename A>
void make_plane(const Plan& plan, int64_t unit, const A* source, const A* planes, A sign, A* out, A* own, bool add);

}  // namespace dsc::cpu
