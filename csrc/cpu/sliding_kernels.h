// The sparse products where patches are rows of columns and neighbours share most of theirs: the patch of a pixel, and
// the sum that is to be added to it, stay in registers, side by side, and move on by a column from pixel to pixel. A
// column of the plane is read once and written once for a row of pixels, not once for every patch that it is in.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)

// Of a patch, at most: windows of a patch, of its sums and of one pixel's sums fill the registers.
constexpr int64_t window_vectors = 10;

// How a window of `vectors` vectors moves on by a column of `length` values.
template <typename A>
struct Slide {
  static constexpr int64_t lanes = Vector<A>::lanes;
  __m512i index;
  bool far;                      // by more than a vector
  int64_t rest;                  // lanes of the last vector that are the patch's, from 1 to all
  unsigned whole;                // those lanes
  unsigned last, after, beyond;  // lanes of the next column in the last vector, the one after it, the one beyond that
  unsigned own, own_next;        // lanes of the first column, in the first and the second vector

  Slide(const Patches& p)
      : index(lanes_from<A>(p.length % lanes)),
        far(p.length >= lanes),
        rest(p.size - (p.vectors - 1) * lanes),
        whole(between(0, rest)),
        last(between(rest, rest + p.length)),
        after(between(0, rest + p.length - lanes)),
        beyond(between(0, rest + p.length - 2 * lanes)),
        own(between(0, p.length)),
        own_next(between(0, p.length - lanes)) {}

  static unsigned between(int64_t from, int64_t to) {
    unsigned bits = 0;
    for (int64_t lane = from; lane < to && lane < lanes; ++lane) bits |= 1u << lane;
    return bits;
  }
};

template <int vectors, typename A>
struct Window {
  using V = Lanes<A>;
  static constexpr int64_t lanes = Vector<A>::lanes;
  V v[vectors] = {};

  DSC_HOST_DEVICE void shift(const Slide<A>& s, V after, V beyond) {
    if (s.far) {
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i)
        v[i] = join_lanes<A>(i + 1 < vectors ? v[i + 1 < vectors ? i + 1 : 0] : after, s.index,
                             i + 2 < vectors    ? v[i + 2 < vectors ? i + 2 : 0]
                             : i + 2 == vectors ? after
                                                : beyond);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i)
        v[i] = join_lanes<A>(v[i], s.index, i + 1 < vectors ? v[i + 1 < vectors ? i + 1 : 0] : after);
    }
  }

  // The next column comes in.
  DSC_HOST_DEVICE void push(const Slide<A>& s, const A* column) {
    v[vectors - 1] = load_lanes<A>(v[vectors - 1], s.last, column - s.rest);
    const V after = load_lanes<A>(V{}, s.after, column + (lanes - s.rest));
    shift(s, after, s.far ? load_lanes<A>(V{}, s.beyond, column + (2 * lanes - s.rest)) : V{});
  }

  // The first column is added to the plane's, and leaves.
  DSC_HOST_DEVICE void pop(const Slide<A>& s, A* column) {
    store_lanes<A>(s.own, v[0] + load_lanes<A>(V{}, s.own, column), column);
    if (vectors > 1 && s.far)
      store_lanes<A>(s.own_next, v[vectors > 1] + load_lanes<A>(V{}, s.own_next, column + lanes), column + lanes);
    shift(s, V{}, V{});
  }
};

// The pixel after those of a block that lie in one row with pixel t; `first` is the block's first pixel.
DSC_HOST_DEVICE int64_t row_end(const Patches& patches, int64_t first, int64_t t, int64_t pixels) {
  const int64_t left = patches.row - (first + t) % patches.row;
  return left < pixels - t ? t + left : pixels;
}

// Whether a pixel has one word of a mask and one column of its own: then the kernels know it, for 2 % of their time.
DSC_HOST_DEVICE bool is_usual(const Patches& patches, int64_t bytes) { return bytes == 8 && patches.fresh == 1; }

// Calls f.template run<patches.vectors>().
template <typename F>
DSC_HOST_DEVICE void with_window(const Patches& patches, const F& f) {
  switch (patches.vectors) {
#define DSC_WINDOW(n)    \
  case n:                \
    f.template run<n>(); \
    break;
    DSC_WINDOW(1)
    DSC_WINDOW(2)
    DSC_WINDOW(3)
    DSC_WINDOW(4)
    DSC_WINDOW(5)
    DSC_WINDOW(6)
    DSC_WINDOW(7)
    DSC_WINDOW(8)
    DSC_WINDOW(9)
    DSC_WINDOW(10)
#undef DSC_WINDOW
  }
}

// plane += the sum over a block's non-zeros of value * atom; gradient of each atom += value * patch of the residual.
// Plane or gradient may be null. With codes, beside a null, the lane of a gradient after the patch's += sign(code) * value:
// there the patch has a one.
template <typename A>
struct SlideSums {
  const Patches& patches;
  const int64_t* base;
  int64_t first, pixels;
  const uint8_t* support;
  int64_t bytes;
  const A* values;
  const A* table;
  A* plane;
  A* gradient;
  const A* residual;
  const A* codes;

  template <int vectors>
  DSC_HOST_DEVICE void run() const {
    is_usual(patches, bytes) ? run<vectors, true>() : run<vectors, false>();
  }

  template <int vectors, bool usual>
  DSC_HOST_DEVICE void run() const {
    if (!gradient)
      add<vectors, usual, true, false, false>();
    else if (!plane)
      add<vectors, usual, false, true, false>();
    else if (!codes)
      add<vectors, usual, true, true, false>();
    else
      add<vectors, usual, true, true, true>();
  }

  template <int vectors, bool usual, bool with_sums, bool with_gradient, bool with_signs>
  __attribute__((noinline)) void add() const {
    using V = Lanes<A>;
    const Slide<A> slide(patches);
    const int64_t columns = patches.segments, step = patches.column;
    const int64_t fresh = usual ? 1 : patches.fresh, mask_size = usual ? 8 : bytes;
    const unsigned spare = 1u << slide.rest;  // the lane after the patch's
    const V one = broadcast<A>(A(1)), sign = only_lanes<A>(spare, broadcast<A>(A(-0.0)));
    const A* const atoms = table;  // what is in registers need not be read again after each store
    A* const gradients = gradient;
    const A *value = values, *code = codes;
    const uint8_t* mask = support;
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(patches, first, t, pixels);
      Window<vectors, A> patch, sum;
      const A* in = with_gradient ? residual + base[t] : nullptr;  // the column that comes in next
      A* out = with_sums ? plane + base[t] : nullptr;              // and that which leaves
      if (with_gradient)
        for (int64_t i = columns - fresh; i > 0; --i, in += step) patch.push(slide, in);
      for (; t < stop; ++t, mask += mask_size) {
        if (with_gradient)
          for (int64_t i = fresh; i > 0; --i, in += step) patch.push(slide, in);
        V own[vectors] = {}, last = patch.v[vectors - 1];
        if (with_signs) last = with_lanes<A>(last, spare, one);
        for_each_nonzero(mask, mask_size, [&](int64_t atom) {
          const V* const row = reinterpret_cast<const V*>(atoms) + atom * vectors;
          V* const sums = reinterpret_cast<V*>(gradients) + atom * vectors;
          const A scale = *value++;
          V end = last;
          if (with_signs) end = (V)((LaneMask<A>)last ^ ((LaneMask<A>)broadcast<A>(*code++) & (LaneMask<A>)sign));
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) {
            if (with_sums) own[v] += scale * row[v];
            if (with_gradient) sums[v] += scale * (v + 1 < vectors ? patch.v[v] : end);
          }
        });
        if (with_sums) {
          own[vectors - 1] = only_lanes<A>(slide.whole, in_register<A>(own[vectors - 1]));  // NaN times zero is none of the next column
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) sum.v[v] += own[v];
          for (int64_t i = fresh; i > 0; --i, out += step) sum.pop(slide, out);
        }
      }
      if (with_sums)
        for (int64_t i = columns - fresh; i > 0; --i, out += step) sum.pop(slide, out);
    }
  }
};

// On the support: result = grad, which has a support of its own, - patch * atom; gradient of each atom, where there is
// one, -= value * patch. To move a pixel's grad here keeps the processor busy while its guesses about the loop over the
// pixel before turn out wrong.
template <typename A>
struct SlideDots {
  const Patches& patches;
  const int64_t* base;
  int64_t first, pixels;
  const uint8_t* support;
  int64_t bytes, atom_vectors;
  const A* values;
  Reader<A> grad;
  A* result;  // with room for a vector more
  const A* table;
  A* gradient;
  const A* plane;

  template <int vectors>
  DSC_HOST_DEVICE void run() const {
    is_usual(patches, bytes) ? run<vectors, true>() : run<vectors, false>();
  }

  template <int vectors, bool usual>
  DSC_HOST_DEVICE void run() const {
    gradient ? subtract<vectors, usual, true>() : subtract<vectors, usual, false>();
  }

  template <int vectors, bool usual, bool with_gradient>
  __attribute__((noinline)) void subtract() const {
    using V = Lanes<A>;
    const Slide<A> slide(patches);
    const int64_t columns = patches.segments, step = patches.column;
    const int64_t fresh = usual ? 1 : patches.fresh, mask_size = usual ? 8 : bytes;
    const A* const atoms = table;  // what is in registers need not be read again after each store
    A* const gradients = gradient;
    const A* value = values;
    const uint8_t* mask = support;
    Reader<A> reader = grad;
    A* out = result;
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(patches, first, t, pixels);
      Window<vectors, A> patch;
      const A* in = plane + base[t];  // the column that comes in next
      for (int64_t i = columns - fresh; i > 0; --i, in += step) patch.push(slide, in);
      for (; t < stop; ++t, mask += mask_size, reader.mask += mask_size) {
        for (int64_t i = fresh; i > 0; --i, in += step) patch.push(slide, in);
        Picker<A> picker{mask, out};
        move_pixel(reader, picker, mask_size, atom_vectors);
        add_dots_of_nonzeros<A>(mask, mask_size, out, [&](int64_t atom, V& dot) __attribute__((always_inline)) {
          const V* const row = reinterpret_cast<const V*>(atoms) + atom * vectors;
          dot = -patch.v[0] * row[0];
#pragma GCC unroll 16
          for (int v = 1; v < vectors; ++v) dot -= patch.v[v] * row[v];
          if (with_gradient) {
            V* const sums = reinterpret_cast<V*>(gradients) + atom * vectors;
            const A scale = *value++;
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) sums[v] -= scale * patch.v[v];
          }
        });
      }
    }
  }
};

#else
constexpr int64_t window_vectors = 0;
#endif

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
