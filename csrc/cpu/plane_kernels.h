// Planes of units (packed.h) from those that meet there, at one instruction set level.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// out = f(read) for a run of values, where read(in) are those of `in` at the same place. The last vector lies over the
// one before: what it comes from, which may be `out`, is read before that is written.
template <typename A, typename F>
DSC_HOST_DEVICE void write_run(int64_t values, A* out, const F& f) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  if (values >= lanes) {
    const auto at = [](int64_t i) __attribute__((always_inline)) {
      return [i](const A* in) __attribute__((always_inline)) { return *reinterpret_cast<const V*>(in + i); };
    };
    const int64_t last = values - lanes;
    const V end = f(at(last));
    for (int64_t i = 0; i < last; i += lanes) *reinterpret_cast<V*>(out + i) = f(at(i));
    *reinterpret_cast<V*>(out + last) = end;
  } else if (values > 0) {
    store_between<A>(0, values, f([values](const A* in) { return load_between<A>(0, values, in); }), out);
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
      clear_run(p.from, out);
      clear_run(p.column - p.to, out + p.to);
      const int64_t values = p.to - p.from;
      A* const inner = out + p.from;
      const A* const plane = p.plane ? p.plane + offset + p.from : nullptr;
      if (source) {
        const A* const in = source + p.from;
        if (plane)
          write_run<A>(values, inner, [&](const auto& read) { return read(in) + p.sign * read(plane); });
        else
          write_run<A>(values, inner, [&](const auto& read) { return read(in); });
        for (int64_t i = 0; i < values; i += 64 / sizeof(A)) __builtin_prefetch(in + ahead * p.compact_column + i);
        source += p.compact_column;
      } else if (p.plane != p.out) {
        write_run<A>(values, inner, [&](const auto& read) { return read(plane); });
      }
      for (const PlanePart<A>* part = p.parts; part < p.parts_end; ++part) {
        A* const to = out + part->from;
        const A* const in = part->values + offset + part->from;
        write_run<A>(part->to - part->from, to, [&](const auto& read) { return read(to) + p.sign * read(in); });
      }
      if (!own) continue;
      A* const to = own + p.own_from;
      const A* const in = out + p.own_from;
      if (p.add)
        write_run<A>(p.own_to - p.own_from, to, [&](const auto& read) { return read(to) + read(in); });
      else
        write_run<A>(p.own_to - p.own_from, to, [&](const auto& read) { return read(in); });
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
