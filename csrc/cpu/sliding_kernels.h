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

// sum += sign(x) g
template <typename A>
DSC_HOST_DEVICE void add_signed(A x, A g, A* sum) {
  using I = typename MaskElement<A>::type;
  I bits, sign;
  memcpy(&sign, &x, sizeof(A));
  memcpy(&bits, &g, sizeof(A));
  bits ^= sign & (I(1) << (8 * sizeof(I) - 1));
  memcpy(&g, &bits, sizeof(A));
  *sum += g;
}

// plane += the sum over a block's non-zeros of value * atom; gradient of each atom += value * patch of the residual;
// signed_sums of each atom += sign(code) * value. Plane or gradient may be null; the last is null beside a null.
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
  A* signed_sums;

  template <int vectors>
  DSC_HOST_DEVICE void run() const {
    if (!gradient)
      add<vectors, true, false, false>();
    else if (!plane)
      add<vectors, false, true, false>();
    else if (!signed_sums)
      add<vectors, true, true, false>();
    else
      add<vectors, true, true, true>();
  }

  template <int vectors, bool with_sums, bool with_gradient, bool with_signs>
  __attribute__((noinline)) void add() const {
    using V = Lanes<A>;
    const Slide<A> slide(patches);
    const int64_t columns = patches.segments, step = patches.column, fresh = patches.fresh, mask_size = bytes;
    const A* const atoms = table;  // what is in registers need not be read again after each store
    A *const gradients = gradient, *const signs = signed_sums;
    const A *value = values, *code = codes;
    const uint8_t* mask = support;
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(patches, first, t, pixels);
      Window<vectors, A> patch, sum;
      if (with_gradient)
        for (int64_t i = 0; i < columns - fresh; ++i) patch.push(slide, residual + base[t] + i * step);
      for (; t < stop; ++t, mask += mask_size) {
        if (with_gradient)
          for (int64_t i = columns - fresh; i < columns; ++i) patch.push(slide, residual + base[t] + i * step);
        if (any_nonzero(mask, mask_size)) {
          V own[vectors] = {};
          for_each_nonzero(mask, mask_size, [&](int64_t atom) {
            const A scale = *value++;
            if (with_sums) {
              const V* const row = reinterpret_cast<const V*>(atoms) + atom * vectors;
#pragma GCC unroll 16
              for (int v = 0; v < vectors; ++v) own[v] += scale * row[v];
            }
            if (with_gradient) {
              V* const out = reinterpret_cast<V*>(gradients) + atom * vectors;
#pragma GCC unroll 16
              for (int v = 0; v < vectors; ++v) out[v] += scale * patch.v[v];
            }
            if (with_signs) add_signed(*code++, scale, signs + atom);
          });
          own[vectors - 1] = only_lanes<A>(slide.whole, own[vectors - 1]);  // NaN times zero is none of the next column
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) sum.v[v] += own[v];
        }
        if (with_sums)
          for (int64_t i = 0; i < fresh; ++i) sum.pop(slide, plane + base[t] + i * step);
      }
      if (with_sums)
        for (int64_t i = fresh; i < columns; ++i) sum.pop(slide, plane + base[t - 1] + i * step);
    }
  }
};

// grad of each non-zero -= patch * atom; gradient of each atom, where there is one, -= value * patch.
template <typename A>
struct SlideDots {
  const Patches& patches;
  const int64_t* base;
  int64_t first, pixels;
  const uint8_t* support;
  int64_t bytes;
  const A* values;
  A* grad;  // with room for three more
  const A* table;
  A* gradient;
  const A* plane;

  template <int vectors>
  DSC_HOST_DEVICE void run() const {
    gradient ? subtract<vectors, true>() : subtract<vectors, false>();
  }

  template <int vectors, bool with_gradient>
  __attribute__((noinline)) void subtract() const {
    using V = Lanes<A>;
    const Slide<A> slide(patches);
    const int64_t columns = patches.segments, step = patches.column, fresh = patches.fresh, mask_size = bytes;
    const A* const atoms = table;  // what is in registers need not be read again after each store
    A* const gradients = gradient;
    const A* value = values;
    const uint8_t* mask = support;
    A* result = grad;
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(patches, first, t, pixels);
      Window<vectors, A> patch;
      for (int64_t i = 0; i < columns - fresh; ++i) patch.push(slide, plane + base[t] + i * step);
      for (; t < stop; ++t, mask += mask_size) {
        for (int64_t i = columns - fresh; i < columns; ++i) patch.push(slide, plane + base[t] + i * step);
        for (int64_t b = 0; b < mask_size; b += 8) {
          uint64_t word;
          memcpy(&word, mask + b, 8);
          const auto next = [&](V& dot) {
            const int64_t atom = 8 * b + __builtin_ctzll(word);
            word &= word - 1;
            const V* const row = reinterpret_cast<const V*>(atoms) + atom * vectors;
            dot = V{};
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) dot -= patch.v[v] * row[v];
            if (with_gradient) {
              V* const out = reinterpret_cast<V*>(gradients) + atom * vectors;
              const A scale = *value++;
#pragma GCC unroll 16
              for (int v = 0; v < vectors; ++v) out[v] -= scale * patch.v[v];
            }
          };
          // Four at a time, whose lanes are summed together.
          int64_t left = __builtin_popcountll(word);
          for (; left >= 4; left -= 4, result += 4) {
            V dots[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) next(dots[i]);
            add_four_sums<A>(dots, result);
          }
          if (left & 2) {
            V dots[4] = {};
            next(dots[0]);
            next(dots[1]);
            add_four_sums<A>(dots, result);
            result += 2;
          }
          if (left & 1) {
            V dot;
            next(dot);
            *result++ += sum_of_lanes<A>(dot);
          }
        }
      }
    }
  }
};

#else
constexpr int64_t window_vectors = 0;
#endif

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
