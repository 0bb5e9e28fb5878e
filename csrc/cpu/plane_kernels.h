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

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
