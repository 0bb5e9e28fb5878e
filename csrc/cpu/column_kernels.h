// The sparse products where patches are rows of columns and neighbours share most of theirs. The patch of a pixel, and
// the sum that is to be added to it, stay in registers, side by side: either they move on by a column from pixel to
// pixel, and a column of the plane is read once and written once for a row of pixels, not once for every patch that it
// is in; or, where columns are few and short, pixels that have non-zeros read and write all of theirs.
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
        whole(lanes_between(0, rest)),
        last(lanes_between(rest, rest + p.length)),
        after(lanes_between(0, rest + p.length - lanes)),
        beyond(lanes_between(0, rest + p.length - 2 * lanes)),
        own(lanes_between(0, p.length)),
        own_next(lanes_between(0, p.length - lanes)) {}
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

// plane += the sum over a block's non-zeros of value * atom; gradient of each atom += value * patch of the residual.
// Plane or gradient may be null. With codes, beside neither, the lane of a gradient after the patch's += sign(code) *
// value.
template <typename A>
struct PatchSums {
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

  template <typename Way>
  DSC_HOST_DEVICE void run() const {
    if (!gradient)
      Way::template add<true, false, false>(*this);
    else if (!plane)
      Way::template add<false, true, false>(*this);
    else if (!codes)
      Way::template add<true, true, false>(*this);
    else
      Way::template add<true, true, true>(*this);
  }

  // The lane of a gradient after the patch's.
  unsigned spare() const { return 1u << patches.size % Vector<A>::lanes; }
};

// On the support: result = grad, which has a support of its own, - patch * atom; gradient of each atom, where there is
// one, -= value * patch. To move a pixel's grad here keeps the processor busy while its guesses about the loop over the
// pixel before turn out wrong.
template <typename A>
struct PatchDots {
  const Patches& patches;
  const int64_t* base;
  int64_t first, pixels;
  const uint8_t* support;
  int64_t bytes, atom_vectors;
  const A* values;
  const uint8_t* grad_support;
  const A* grad;
  A* result;  // with room for a vector more
  const A* table;
  A* gradient;
  const A* plane;

  template <typename Way>
  DSC_HOST_DEVICE void run() const {
    gradient ? Way::template subtract<true>(*this) : Way::template subtract<false>(*this);
  }
};

// v with the sign of *code in the lanes of the mask.
DSC_HOST_DEVICE Lanes<float> with_sign(const Lanes<float>& v, const Lanes<float>& sign, const float* code) {
  int bits;
  memcpy(&bits, code, 4);
  return (Lanes<float>)_mm512_ternarylogic_epi32((__m512i)v, (__m512i)sign, _mm512_set1_epi32(bits), 0x78);
}
DSC_HOST_DEVICE Lanes<double> with_sign(const Lanes<double>& v, const Lanes<double>& sign, const double* code) {
  int64_t bits;
  memcpy(&bits, code, 8);
  return (Lanes<double>)_mm512_ternarylogic_epi64((__m512i)v, (__m512i)sign, _mm512_set1_epi64(bits), 0x78);
}

// The products of a pixel's non-zeros with its patch, or into it: sum += value * atom; gradient of each atom += value *
// patch; and, with codes, the lane `spare` of that, where the patch has a one, += sign(code) * value.
template <bool with_sums, bool with_gradient, bool with_signs, int vectors, typename AnyMask, typename A>
DSC_HOST_DEVICE void add_nonzeros(const AnyMask& mask, const A*& value, const A*& code, const A* atoms, A* gradients,
                                  unsigned spare, const Lanes<A> (&patch)[vectors], Lanes<A> (&sum)[vectors]) {
  using V = Lanes<A>;
  const V sign = only_lanes<A>(spare, broadcast<A>(A(-0.0)));
  const V last = with_signs ? with_lanes<A>(patch[vectors - 1], spare, broadcast<A>(A(1))) : patch[vectors - 1];
  for_each_nonzero(mask, [&](int64_t atom) __attribute__((always_inline)) {
    const Row<vectors, A> row(atom);
    V* const out = with_gradient ? row.of(gradients) : nullptr;
    const A scale = *value++;
    V end = last;
    if (with_signs) end = with_sign(last, sign, code++);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      if (with_sums) sum[v] += scale * row.read(atoms, v);
      if (with_gradient) out[v] += scale * (v + 1 < vectors ? patch[v] : end);
    }
  });
}

// out -= patch * atom for each of them; gradient of each atom, where there is one, -= value * patch.
template <bool with_gradient, int vectors, typename AnyMask, typename A>
DSC_HOST_DEVICE void subtract_nonzeros(const AnyMask& mask, const A*& value, A*& out, const A* atoms, A* gradients,
                                       const Lanes<A> (&patch)[vectors]) {
  using V = Lanes<A>;
  add_dots_of_nonzeros<A>(mask, out, [&](int64_t atom, V& dot) __attribute__((always_inline)) {
    const Row<vectors, A> row(atom);
    dot = -patch[0] * row.read(atoms, 0);
#pragma GCC unroll 16
    for (int v = 1; v < vectors; ++v) dot -= patch[v] * row.read(atoms, v);
    if (with_gradient) {
      V* const sums = row.of(gradients);
      const A scale = *value++;
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sums[v] -= scale * patch[v];
    }
  });
}

// What memory has for each pixel of a block, read while the pixel before is at work: where the processor has guessed
// wrong where a loop over non-zeros ends, it is not waited for.
template <typename Value, typename Read>
struct Ahead {
  Read read;
  Value following;

  // The next pixel's; the one after it is pixel `after`.
  DSC_HOST_DEVICE Value next(int64_t after) {
    const Value value = following;
    following = read(after);
    return value;
  }
};
template <typename Value, typename Read>
DSC_HOST_DEVICE auto read_ahead(const Read& read) {
  return Ahead<Value, Read>{read, read(0)};
}

template <bool one_word>
struct KindOfMask {
  using Type = Mask;
};
template <>
struct KindOfMask<true> {
  using Type = WordMask;
};
template <bool one_word>
DSC_HOST_DEVICE auto masks_ahead(const uint8_t* memory, int64_t bytes) {
  using Kind = typename KindOfMask<one_word>::Type;
  return read_ahead<Kind>([=](int64_t t) { return Kind(memory + t * bytes, bytes); });
}

// A patch of few short columns, of which the compiler knows where they lie in vectors.
template <typename A, int columns, int length>
struct Columns {
  using V = Lanes<A>;
  static constexpr int lanes = Vector<A>::lanes, vectors = (columns * length + lanes - 1) / lanes;
  static_assert(length <= lanes);

  template <int column = 0>
  DSC_HOST_DEVICE static void load(const A* in, int64_t step, V (&patch)[vectors]) {
    constexpr int v = column * length / lanes, at = column * length % lanes;
    patch[v] = load_lanes<A>(at == 0 ? V{} : patch[v], lanes_between(at, at + length), in - at);
    if constexpr (at + length > lanes)
      patch[v + 1] = load_lanes<A>(V{}, lanes_between(0, at + length - lanes), in + (lanes - at));
    if constexpr (column + 1 < columns) load<column + 1>(in + step, step, patch);
  }

  template <int column = 0>
  DSC_HOST_DEVICE static void add(A* out, int64_t step, const V (&sum)[vectors]) {
    constexpr int v = column * length / lanes, at = column * length % lanes;
    constexpr int next = at + length > lanes ? v + 1 : v;
    *reinterpret_cast<V*>(out) += from_lane<at, A>(lanes_between(0, length), sum[v], sum[next]);
    if constexpr (column + 1 < columns) add<column + 1>(out + step, step, sum);
  }
};

// Both with patches that slide, in a window of so many vectors.
template <typename A, int vectors, bool one_word, bool one_column>
struct Sliding {
  using V = Lanes<A>;

  template <bool with_sums, bool with_gradient, bool with_signs>
  __attribute__((noinline)) static void add(const PatchSums<A>& p) {
    const Slide<A> slide(p.patches);
    const int64_t columns = p.patches.segments, step = p.patches.column;
    const int64_t fresh = one_column ? 1 : p.patches.fresh;
    const A* const atoms = p.table;  // what is in registers need not be read again after each store
    A* const gradients = p.gradient;
    const A *value = p.values, *code = p.codes;
    const unsigned spare = p.spare();
    const int64_t last = p.pixels - 1;
    auto masks = masks_ahead<one_word>(p.support, one_word ? 8 : p.bytes);
    for (int64_t t = 0; t <= last;) {
      const int64_t stop = row_end(p.patches, p.first, t, p.pixels);
      Window<vectors, A> patch, sum;
      const A* in = with_gradient ? p.residual + p.base[t] : nullptr;  // the column that comes in next
      A* out = with_sums ? p.plane + p.base[t] : nullptr;              // and that which leaves
      if (with_gradient)
        for (int64_t i = columns - fresh; i > 0; --i, in += step) patch.push(slide, in);
      for (; t < stop; ++t) {
        const auto mask = masks.next(t < last ? t + 1 : last);
        if (with_gradient)
          for (int64_t i = fresh; i > 0; --i, in += step) patch.push(slide, in);
        V own[vectors] = {};
        add_nonzeros<with_sums, with_gradient, with_signs>(mask, value, code, atoms, gradients, spare, patch.v, own);
        if (with_sums) {
          // NaN times zero is none of the next column.
          own[vectors - 1] = only_lanes<A>(slide.whole, in_register<A>(own[vectors - 1]));
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v) sum.v[v] += own[v];
          for (int64_t i = fresh; i > 0; --i, out += step) sum.pop(slide, out);
        }
      }
      if (with_sums)
        for (int64_t i = columns - fresh; i > 0; --i, out += step) sum.pop(slide, out);
    }
  }

  template <bool with_gradient>
  __attribute__((noinline)) static void subtract(const PatchDots<A>& p) {
    const Slide<A> slide(p.patches);
    const int64_t columns = p.patches.segments, step = p.patches.column;
    const int64_t fresh = one_column ? 1 : p.patches.fresh;
    const A* const atoms = p.table;  // what is in registers need not be read again after each store
    A* const gradients = p.gradient;
    const A *value = p.values, *grad = p.grad;
    A* out = p.result;
    const int64_t last = p.pixels - 1, bytes = one_word ? 8 : p.bytes;
    auto masks = masks_ahead<one_word>(p.support, bytes), grad_masks = masks_ahead<one_word>(p.grad_support, bytes);
    for (int64_t t = 0; t <= last;) {
      const int64_t stop = row_end(p.patches, p.first, t, p.pixels);
      Window<vectors, A> patch;
      const A* in = p.plane + p.base[t];  // the column that comes in next
      for (int64_t i = columns - fresh; i > 0; --i, in += step) patch.push(slide, in);
      for (; t < stop; ++t) {
        const int64_t after = t < last ? t + 1 : last;
        const auto mask = masks.next(after), grad_mask = grad_masks.next(after);
        for (int64_t i = fresh; i > 0; --i, in += step) patch.push(slide, in);
        A* moved = out;
        move_pixel(grad_mask, grad, mask, moved, p.atom_vectors);
        subtract_nonzeros<with_gradient>(mask, value, out, atoms, gradients, patch.v);
      }
    }
  }
};

// Both with patches that are read, and added to the plane, where a pixel has non-zeros.
template <typename A, typename Patch, bool one_word>
struct ColumnByColumn {
  using V = Lanes<A>;
  static constexpr int vectors = Patch::vectors;

  template <bool with_sums, bool with_gradient, bool with_signs>
  __attribute__((noinline)) static void add(const PatchSums<A>& p) {
    const int64_t step = p.patches.column, last = p.pixels - 1, bytes = one_word ? 8 : p.bytes;
    const A* const atoms = p.table;
    A *const gradients = p.gradient, *const plane = p.plane;
    const A *value = p.values, *code = p.codes, *const residual = p.residual;
    const unsigned spare = p.spare();
    auto masks = masks_ahead<one_word>(p.support, bytes);
    auto bases = read_ahead<int64_t>([base = p.base](int64_t t) { return base[t]; });
    for (int64_t t = 0; t <= last; ++t) {
      const int64_t after = t < last ? t + 1 : last, base = bases.next(after);
      const auto mask = masks.next(after);
      if (!mask.any()) continue;
      V patch[vectors] = {}, own[vectors] = {};
      if (with_gradient) Patch::load(residual + base, step, patch);
      add_nonzeros<with_sums, with_gradient, with_signs>(mask, value, code, atoms, gradients, spare, patch, own);
      if (with_sums) Patch::add(plane + base, step, own);
    }
  }

  template <bool with_gradient>
  __attribute__((noinline)) static void subtract(const PatchDots<A>& p) {
    const int64_t step = p.patches.column, last = p.pixels - 1, bytes = one_word ? 8 : p.bytes;
    const A *const atoms = p.table, *const plane = p.plane;
    A* const gradients = p.gradient;
    const A *value = p.values, *grad = p.grad;
    A* out = p.result;
    auto masks = masks_ahead<one_word>(p.support, bytes), grad_masks = masks_ahead<one_word>(p.grad_support, bytes);
    auto bases = read_ahead<int64_t>([base = p.base](int64_t t) { return base[t]; });
    for (int64_t t = 0; t <= last; ++t) {
      const int64_t after = t < last ? t + 1 : last, base = bases.next(after);
      const auto mask = masks.next(after), grad_mask = grad_masks.next(after);
      if (!mask.any()) {
        grad += grad_mask.count();
        continue;
      }
      A* moved = out;
      move_pixel(grad_mask, grad, mask, moved, p.atom_vectors);
      V patch[vectors] = {};
      Patch::load(plane + base, step, patch);
      subtract_nonzeros<with_gradient>(mask, value, out, atoms, gradients, patch);
    }
  }
};

// Runs PatchSums or PatchDots in the way that suits its patches. Whether a pixel has one word of a mask and one column
// of its own the kernels know, for 3 to 6 % of their time.
template <typename A, typename F>
DSC_HOST_DEVICE void run_patches(const F& f) {
  const bool one_word = f.bytes == 8;
  // 3 x 3, of one and of three channels, takes 4 to 10 % less than with windows; larger ones do not.
  if constexpr (sizeof(A) == 4) {
    using OneChannel = Columns<A, 3, 3>;
    using ThreeChannels = Columns<A, 3, 9>;
#define DSC_COLUMNS(patch) \
  one_word ? f.template run<ColumnByColumn<A, patch, true>>() : f.template run<ColumnByColumn<A, patch, false>>()
    if (f.patches.segments == 3 && f.patches.length == 3) return DSC_COLUMNS(OneChannel);
    if (f.patches.segments == 3 && f.patches.length == 9) return DSC_COLUMNS(ThreeChannels);
#undef DSC_COLUMNS
  }
  const auto slide = [&]<int vectors>() {
    if (!one_word) return f.template run<Sliding<A, vectors, false, false>>();
    f.patches.fresh == 1 ? f.template run<Sliding<A, vectors, true, true>>()
                         : f.template run<Sliding<A, vectors, true, false>>();
  };
  switch (f.patches.vectors) {
#define DSC_WINDOW(n) \
  case n:             \
    return slide.template operator()<n>();
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

#else
constexpr int64_t window_vectors = 0;
#endif

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
