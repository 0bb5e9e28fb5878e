// Planes of units (packed.h) from those that meet there, at one instruction set level.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

template <typename A>
void sum_planes(const PlaneSum<A>& p) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t image = 0; image < p.images; ++image) {
    const A* source = p.source ? p.source + image * p.compact_image : nullptr;
    A* own = p.own ? p.own + image * p.compact_image : nullptr;
    A* out = p.out + image * p.image;
    for (int64_t x = 0; x < p.columns; ++x, out += p.column) {
      const bool inside = x >= p.first_column && x < p.last_column;
      for (int64_t j = 0; j < p.column; j += lanes) {
        V sum = {};
        if (inside) {
          if (source) sum = load_between<A>(p.from - j, p.to - j, source + j);
          for (const PlanePart<A>* part = p.parts; part < p.parts_end; ++part)
            if (part->from < j + lanes && part->to > j)
              sum += p.sign *
                     load_between<A>(part->from - j, part->to - j, part->values + image * p.image + x * p.column + j);
          if (own && p.own_from < j + lanes && p.own_to > j)
            store_between<A>(p.own_from - j, p.own_to - j,
                             p.add ? sum + load_between<A>(p.own_from - j, p.own_to - j, own + j) : sum, own + j);
        }
        store_between<A>(0, p.column - j, sum, out + j);
      }
      if (inside && source) source += p.compact_column;
      if (inside && own) own += p.compact_column;
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
