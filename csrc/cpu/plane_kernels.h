// Planes of units (packed.h) from those that meet there, at one instruction set level.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// out = in, or with add, out += scale * in, of a run of values. Its last vector lies over the one before: what it is
// added to is read before that is written.
template <bool add, typename A>
DSC_HOST_DEVICE void put_run(int64_t values, const A* in, A scale, A* out) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  const auto read = [](const A* from) __attribute__((always_inline)) { return *reinterpret_cast<const V*>(from); };
  const auto write = [](const V& v, A* to) __attribute__((always_inline)) { *reinterpret_cast<V*>(to) = v; };
  if (values >= lanes) {
    const int64_t last = values - lanes;
    const V before = read(out + last);
    for (int64_t i = 0; i < last; i += lanes) write(add ? read(out + i) + scale * read(in + i) : read(in + i), out + i);
    write(add ? before + scale * read(in + last) : read(in + last), out + last);
  } else if (values > 0) {
    const V v = load_between<A>(0, values, in);
    store_between<A>(0, values, add ? load_between<A>(0, values, out) + scale * v : v, out);
  }
}

// out = 0
template <typename A>
DSC_HOST_DEVICE void clear_run(int64_t values, A* out) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= values; i += lanes) *reinterpret_cast<V*>(out + i) = V{};
  if (i < values) store_between<A>(0, values - i, V{}, out + i);
}

// The columns of the source are fetched ahead: they begin in other pages, where the hardware does not look.
template <typename A>
void sum_planes(const PlaneSum<A>& p) {
  constexpr int64_t ahead = 8;
  for (int64_t image = 0; image < p.images; ++image) {
    const A* source = p.source ? p.source + image * p.compact_image : nullptr;
    A* own = p.own ? p.own + image * p.compact_image : nullptr;
    for (int64_t x = 0; x < p.columns; ++x) {
      const int64_t offset = image * p.image + x * p.column;
      A* const out = p.out + offset;
      if (x < p.first_column || x >= p.last_column) {
        clear_run(p.column, out);
        continue;
      }
      if (source) {
        clear_run(p.from, out);
        put_run<false>(p.to - p.from, source + p.from, A(1), out + p.from);
        for (int64_t i = p.from; i < p.to; i += 64 / sizeof(A))
          __builtin_prefetch(source + ahead * p.compact_column + i);
        clear_run(p.column - p.to, out + p.to);
        source += p.compact_column;
      } else {
        clear_run(p.column, out);
      }
      for (const PlanePart<A>* part = p.parts; part < p.parts_end; ++part)
        put_run<true>(part->to - part->from, part->values + offset + part->from, p.sign, out + part->from);
      if (!own) continue;
      const int64_t values = p.own_to - p.own_from;
      if (p.add)
        put_run<true>(values, out + p.own_from, A(1), own + p.own_from);
      else
        put_run<false>(values, out + p.own_from, A(1), own + p.own_from);
      own += p.compact_column;
    }
  }
}

template <typename A>
bool sum_columns(const ColumnSums<A>& p) {
  using V = Lanes<A>;
  A *const less_third = p.plane + p.size, *const plus_next = less_third + p.size, *const from_next = plus_next + p.size;
  for (int64_t i = 0; i < 2 * p.step + Vector<A>::lanes; ++i) p.plane[p.values + i] = A(0);
  V check = {};  // 0 of finite values, else NaN
  for (int64_t i = 0; i < p.values; i += Vector<A>::lanes) {
    const A* const x = p.plane + i;
    const V first = *reinterpret_cast<const V*>(x), second = *reinterpret_cast<const V*>(x + p.step);
    const V difference = first - *reinterpret_cast<const V*>(x + 2 * p.step), sum = first + second;
    *reinterpret_cast<V*>(less_third + i) = difference;
    *reinterpret_cast<V*>(plus_next + i) = sum;
    *reinterpret_cast<V*>(from_next + i) = second - first;
    check += A(0) * difference + A(0) * sum;
  }
  return sum_of_lanes<A>(check) == 0;
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
