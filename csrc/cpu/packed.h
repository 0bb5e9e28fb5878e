// How a convolution between signals and packed codes is laid out in memory and cut into units that threads share.
//
// Images are independent, so lista takes them in slices, each a problem of its own.
// The code pixels of each group are cut into units: whole images, or strips of rows where images are few and large. A
// unit reads and writes the signal through a plane of its own, [image][column][row][channel] with a border for the
// padding, so units never wait for each other inside a phase and sums do not depend on the number of threads. Images
// between phases are compact: [group][image][column][row][channel]. A signal of one axis lies along the columns.
#pragma once

#include <memory>
#include <mutex>
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
  // strips: of each image; with one, units are whole images.
  Plan(const Geometry& geometry, const KernelSizes& kernel, int64_t value_size, int64_t strips);

  Geometry g;  // a signal of one axis turned so that it lies along h
  std::vector<Unit> units;
  int64_t group_pixels;                                       // code pixels of a group: batch x code_h x code_w
  int64_t blocks;                                             // places of a packed code
  int64_t plane_w, plane_h, column, plane_image, plane_size;  // sizes and strides of a plane, in values
  int64_t group_signal;                                       // values of a group in a compact image
  int64_t stride;                                             // of an atom in a table
  int64_t row_weights;                                        // of an atom, as the analysis kernels read them
  std::vector<int64_t> base;                                  // of each pixel of the largest unit in its plane
  // Where the j-th value of a patch, in the order of its segments, stands in a weight (C/groups, kh, kw); and where the
  // j-th value of an atom in a table does, below 0 for none.
  std::vector<int64_t> tap, table_tap;
  // Where pixels are multiplied in pairs: the first column of a patch of each three, then those that go alone; how many
  // columns from one of three to the next.
  std::vector<int64_t> pair_columns;
  int64_t pair_stride;

  Patches patches() const { return patches(products_); }
  Patches patches(TileProducts products) const {
    const auto count = [](const std::vector<int64_t>& v) { return static_cast<int64_t>(v.size()); };
    return {count(segment_),
            g.patch() / count(segment_),
            g.patch(),
            segment_.data(),
            count(vector_),
            copied_,
            vector_.data(),
            count(chunks_),
            chunks_.data(),
            slides_,
            g.code_w,
            g.dilation_w * column,
            g.stride_w,
            by_atoms_,
            products,
            {pairs_.row, pairs_.length, pairs_.step, pairs_.threes, pairs_.ones, pair_offset_.data(), pairs_.range},
            copies_};
  }
  int64_t vectors() const { return static_cast<int64_t>(vector_.size()); }
  // Whether units are whole images: then none meets the plane of another.
  bool of_whole_images() const { return units.empty() || units.front().strips == 1; }
  // How many images are cut into strips, counted in each group; where none are, 1: all together.
  int64_t cut_images() const { return of_whole_images() ? 1 : g.batch * g.groups; }
  // Where the unit's pixels begin among all pixels of all groups.
  int64_t pixel(const Unit& unit) const { return unit.group * group_pixels + unit.first; }
  int64_t table_size() const { return g.group_code_channels() * stride; }
  // Values of a plane and of those beside it that the analysis kernels read.
  int64_t analysis_planes() const { return (products_ == TileProducts::pairs_of_pixels ? 4 : 1) * plane_size; }
  int64_t weight_size() const { return g.code_channels * g.patch(); }

 private:
  std::vector<int64_t> segment_, vector_, chunks_, pair_offset_;
  bool copied_, slides_, by_atoms_;
  TileProducts products_;
  PixelPairs pairs_{};
  int64_t copies_ = 0;
  void make_units(int64_t strips);
  void choose_products(const KernelSizes& kernel, int64_t value_size, int64_t signal_row);
};

// How many strips an image is cut into: 1 where there are enough images, or small ones.
int64_t strips_of_image(const Geometry& geometry);
// How many images go through all steps of lista together, with threads for their units.
int64_t images_of_slice(const Geometry& geometry);
// How many make up a unit where units are whole images, of which there are enough for threads; else 0.
int64_t images_of_unit(const Geometry& geometry);

// Signals (N, C, *) in compact form: they themselves where they have it, else a copy. The signals have to outlive it.
template <typename T>
class Compact {
 public:
  using A = accumulate_t<T>;
  Compact() = default;
  Compact(const Plan& plan, const T* signal);
  const A* get() const { return values_; }

 private:
  Buffer<A> copy_{0};
  const A* values_ = nullptr;
};

// Signals (N, C, *) that are collected in compact form, from zero: finish() brings them to their places.
template <typename T>
class CompactSum {
 public:
  using A = accumulate_t<T>;
  CompactSum() = default;
  CompactSum(const Plan& plan, T* signal);
  A* get() const { return values_; }
  void finish(const Plan& plan) const;

 private:
  Buffer<A> copy_{0};
  A* values_ = nullptr;
  T* signal_ = nullptr;
};

// A weight (M, C/groups, *kernel) tap by tap, as the analysis kernels read it, and as a table of atoms; all groups.
// Scale is 1 or -1.
template <typename T>
Buffer<accumulate_t<T>> tap_weight(const Plan& plan, const T* weight, accumulate_t<T> scale);
template <typename T>
Buffer<accumulate_t<T>> atom_table(const Plan& plan, const T* weight);

// The same for the plan's products, or, if it is not finite, for single taps. The weight has to outlive it.
template <typename T>
class AnalysisWeight {
 public:
  using A = accumulate_t<T>;
  AnalysisWeight(const Plan& plan, const T* weight, A scale);

  TileProducts products() const { return products_; }
  // Of a group, for these products or for single taps.
  const A* of_group(const Plan& plan, TileProducts products, int64_t group, int64_t width) const;

 private:
  const T* weight_;
  A scale_;
  TileProducts products_;
  Buffer<A> values_;
  // Tap by tap, for planes that are not finite.
  mutable Buffer<A> taps_{0};
  std::unique_ptr<std::once_flag> has_taps_ = std::make_unique<std::once_flag>();
};

// out, a unit's plane, = source - sum of the planes of all units that overlap it (sign -1), or their sum (sign 1,
// source null); plane is the unit's own, beside which the others stand, or null for none. It may be `out` where units
// are whole images. The unit's own rows also go to `own` (compact, or null): written, or added to it.
template <typename A>
void make_plane(const Plan& plan, int64_t unit, const A* source, const A* plane, A sign, A* out, A* own, bool add);

}  // namespace dsc::cpu
