// The phases of a convolution with packed codes: what is done with each unit (packed.h), and how threads share units.
#pragma once

#include <algorithm>
#include <cstring>

#include "packed.h"

namespace dsc::cpu {

// Memory for the packed codes of all units, for the worst case; only what is written is ever touched.
template <typename A>
class Storage {
 public:
  explicit Storage(const Plan& plan)
      : masks_(plan.g.groups * plan.group_pixels * mask_bytes(plan.g.group_code_channels())),
        places_(plan.blocks),
        values_(plan.g.code_size() + plan.blocks * block_room) {}

  PackedCodes<A> codes() const { return {masks_.get(), places_.get(), values_.get()}; }
  // Codes with the masks of another code and the values that stand here.
  PackedCodes<A> on(const PackedCodes<A>& support) const { return {support.masks, places_.get(), values_.get()}; }
  // Counts the values that are written from now on, over those of before.
  int64_t* restart() {
    used_ = 0;
    return &used_;
  }

 private:
  Buffer<uint8_t> masks_;
  Buffer<Place> places_;
  Buffer<A> values_;
  int64_t used_ = 0;
};

// A unit's part of packed codes.
template <typename A>
PackedCodes<A> part_of(const PackedCodes<A>& codes, const Plan& plan, const Unit& unit) {
  if (!codes.places) return codes;
  const int64_t bytes = mask_bytes(plan.g.group_code_channels());
  return {codes.masks ? codes.masks + plan.pixel(unit) * bytes : nullptr, codes.places + unit.block, codes.values};
}

// Tables that units add to, a fixed share of the units to each, so that sums do not depend on the number of threads.
// So many tables at a time are summed first, then their sums.
template <typename A>
struct Shares {
  int64_t count, size, together;
  Buffer<A> tables;

  Shares(int64_t count_, int64_t size_, int64_t together_)
      : count(count_), size(size_), together(together_), tables(count_ * size_) {
    clear();
  }
  void clear() { std::memset(tables.get(), 0, count * size * sizeof(A)); }
  A* of(int64_t share) const { return tables.get() + share * size; }
  // Calls body(sum) with the values [begin, end) of each sum of tables.
  template <typename Body>
  void for_each_sum(int64_t begin, int64_t end, std::vector<A>& sum, const Body& body) const {
    for (int64_t share = 0; share < count; ++share) {
      const A* const values = of(share);
      if (share % together == 0)
        sum.assign(values + begin, values + end);
      else
        for (int64_t i = begin; i < end; ++i) sum[i - begin] += values[i];
      if ((share + 1) % together == 0) body(sum);
    }
  }
  void add_to(A* table) const {
    std::vector<A> memory;
    for_each_sum(0, size, memory, [&](const std::vector<A>& sum) {
      for (int64_t i = 0; i < size; ++i) table[i] += sum[i];
    });
  }
  std::vector<A> sum() const {
    std::vector<A> all(size);
    add_to(all.data());
    return all;
  }
};

// grad (M, C/groups, *kernel) += the sum of all shares of its table
template <typename A>
void add_shares(const Plan& plan, const Shares<A>& shares, int64_t lanes, A* grad) {
  const int64_t atoms = plan.g.group_code_channels(), patch = plan.g.patch();
  const Patches patches = plan.patches();
  parallel(plan.g.code_channels, grain_of(patch * shares.count), [&](int64_t begin, int64_t end) {
    std::vector<A> memory;
    for (int64_t c = 0, first = 0; c < patches.chunks; first += patches.chunk_vectors[c++] * lanes) {
      const int64_t chunk = patches.chunk_vectors[c] * lanes;
      for (int64_t m = begin; m < end; ++m) {  // along the memory of each share
        const int64_t row = m / atoms * plan.table_size() + atoms * first + m % atoms * chunk;
        shares.for_each_sum(row, row + chunk, memory, [&](const std::vector<A>& sum) {
          for (int64_t j = 0; j < chunk; ++j)
            if (plan.table_tap[first + j] >= 0) grad[m * patch + plan.table_tap[first + j]] += sum[j];
        });
      }
    }
  });
}

template <typename T>
struct Units {
  using A = accumulate_t<T>;
  using Codes = PackedCodes<A>;
  const Kernels<T>& kernel = kernels<T>();
  Plan plan;

  explicit Units(const Geometry& geometry) : Units(geometry, strips_of_image(geometry)) {}
  Units(const Geometry& geometry, int64_t strips) : plan(geometry, kernel, sizeof(A), strips) {}

  int64_t count() const { return static_cast<int64_t>(plan.units.size()); }
  int64_t atoms() const { return plan.g.group_code_channels(); }
  // Atoms of a group, and as many more as fill up the last vector.
  int64_t width() const { return padded(atoms(), std::max<int64_t>(kernel.lanes, 8)); }
  Codes part(const Codes& codes, int64_t u) const { return part_of(codes, plan, plan.units[u]); }
  Buffer<A> planes() const { return Buffer<A>(count() * plan.plane_size); }
  A* plane(const Buffer<A>& planes, int64_t u) const { return planes.get() + u * plan.plane_size; }

  // Runs body(unit, scratch) for all units, in parallel.
  template <typename Body>
  void for_each(const Body& body) const {
    const int64_t products = plan.g.code_size() / std::max<int64_t>(1, count()) * plan.g.patch();
    parallel_tasks(count(), grain_of(products),
                   [&] { return [&, scratch = working_memory()](int64_t u) { body(u, scratch.get()); }; });
  }

  // How many shares gradients of weights have, `tables` tables for each: few enough that adding them up costs little,
  // as many as there may be threads. Images that are cut have equally many, whatever part of the batch is here.
  int64_t share_count(int64_t tables, int64_t batch) const {
    constexpr int64_t most_bytes = int64_t{4} << 20, least_shares = 8, most_shares = 32;
    const int64_t bytes = tables * plan.g.groups * plan.table_size() * static_cast<int64_t>(sizeof(A));
    const int64_t shares = std::clamp<int64_t>(most_bytes / std::max<int64_t>(1, bytes), least_shares, most_shares);
    if (plan.of_whole_images()) return std::clamp<int64_t>(shares, 1, std::max<int64_t>(1, count()));
    const int64_t of_image = shares / (batch * plan.g.groups);
    return plan.cut_images() * std::clamp<int64_t>(of_image, 1, plan.units.front().strips);
  }

  // Runs body(unit, share, scratch) for all units, in parallel over shares.
  template <typename Body>
  void for_each_share(int64_t shares, const Body& body) const {
    parallel_tasks(shares, grain_of(plan.g.code_size() / shares * plan.g.patch()), [&] {
      return [&, scratch = working_memory()](int64_t share) {
        for (int64_t u = count() * share / shares; u < count() * (share + 1) / shares; ++u)
          body(u, share, scratch.get());
      };
    });
  }

  // values[channel * stride] of all code channels, each group filled up to the width with zeros.
  Buffer<A> by_group(const T* values, int64_t stride) const {
    Buffer<A> out(plan.g.groups * width());
    for (int64_t group = 0; group < plan.g.groups; ++group)
      for (int64_t m = 0; m < width(); ++m)
        out.get()[group * width() + m] = m < atoms() ? load(values[(group * atoms() + m) * stride]) : A(0);
    return out;
  }

  // Packs the unit's part of a dense code: its non-zeros, or its values on the masks `on`.
  void from_dense(int64_t u, const T* dense, const uint8_t* on, const Codes& codes, int64_t* used,
                  char* scratch) const {
    const Unit& unit = plan.units[u];
    if (on) on += plan.pixel(unit) * mask_bytes(atoms());
    kernel.packed_from_dense({unit.pixels, atoms(), unit.first, plan.g.code_pixels(), image_size(),
                              of_group(dense, unit), on, part(codes, u), used},
                             scratch);
  }

  void to_dense(int64_t u, const Codes& codes, T* dense, char* scratch) const {
    const Unit& unit = plan.units[u];
    kernel.packed_to_dense(
        {unit.pixels, atoms(), unit.first, plan.g.code_pixels(), image_size(), part(codes, u), of_group(dense, unit)},
        scratch);
  }

  // result = a x + b y on the masks `on`, or on the union of both supports.
  void combine(int64_t u, A a, const Codes& x, A b, const Codes& y, const uint8_t* on, const Codes& result,
               int64_t* used, char* scratch) const {
    const Unit& unit = plan.units[u];
    if (on) on += plan.pixel(unit) * mask_bytes(atoms());
    kernel.packed_combine({unit.pixels, atoms(), a, part(x, u), b, part(y, u), on, part(result, u), used}, scratch);
  }

  // plane = S of the unit's codes
  void synthesize(int64_t u, const Codes& codes, const A* table, A* plane, char* scratch) const {
    const Unit& unit = plan.units[u];
    std::memset(plane, 0, plan.plane_size * sizeof(A));
    kernel.packed_synthesis({unit.pixels, atoms(), plan.base.data(), plan.patches(), part(codes, u),
                             table + unit.group * plan.table_size(), plane},
                            scratch);
  }

  // codes = T(start + A(plane)); plane is the first of Plan::analysis_planes()
  void analyze(int64_t u, A* plane, const AnalysisWeight<T>& weight, const A* theta, bool one_sided, const Codes& start,
               const Codes& codes, int64_t* used, char* scratch) const {
    const Unit& unit = plan.units[u];
    theta += unit.group * width();
    const bool nonnegative = std::all_of(theta, theta + width(), [](A value) { return value >= 0; });
    const TileProducts products = products_for(unit, plane, weight);
    kernel.packed_analysis({unit.pixels, atoms(), plan.base.data(), plan.patches(products), plane,
                            weight.of_group(plan, products, unit.group, width()), theta, one_sided, nonnegative,
                            part(start, u), part(codes, u), used},
                           scratch);
  }

  // dense = scale (start + A(plane)), or added to it
  void analyze_dense(int64_t u, A* plane, const AnalysisWeight<T>& weight, const Codes& start, A scale, bool add,
                     T* dense, char* scratch) const {
    dense_analysis(u, plane, weight, start, nullptr, nullptr, false, scale, add, dense, scratch);
  }

  // dense = T(A(plane) + bias); bias may be null
  void threshold_dense(int64_t u, A* plane, const AnalysisWeight<T>& weight, const A* bias, const A* theta,
                       bool one_sided, T* dense, char* scratch) const {
    const int64_t first = plan.units[u].group * width();
    dense_analysis(u, plane, weight, {}, bias ? bias + first : nullptr, theta + first, one_sided, A(1), false, dense,
                   scratch);
  }

 private:
  Buffer<char> working_memory() const {  // of a thread
    return Buffer<char>(kernel.workspace_size(atoms(), plan.vectors()) + plan.patches().copies);
  }

  void dense_analysis(int64_t u, A* plane, const AnalysisWeight<T>& weight, const Codes& start, const A* bias,
                      const A* theta, bool one_sided, A scale, bool add, T* dense, char* scratch) const {
    const Unit& unit = plan.units[u];
    const TileProducts products = products_for(unit, plane, weight);
    kernel.dense_analysis({unit.pixels, atoms(), unit.first, plan.g.code_pixels(), image_size(), plan.base.data(),
                           plan.patches(products), plane, weight.of_group(plan, products, unit.group, width()),
                           part(start, u), bias, theta, one_sided, scale, add, of_group(dense, unit)},
                          scratch);
  }

  // Makes what stands beside a plane; sums and differences of values that are not finite are no use.
  TileProducts products_for(const Unit& unit, A* plane, const AnalysisWeight<T>& weight) const {
    if (weight.products() != TileProducts::pairs_of_pixels) return weight.products();
    const int64_t values = unit.images * plan.plane_image, step = plan.patches().pairs.step;
    return kernel.sum_columns({plane, values, step, plan.plane_size}) ? TileProducts::pairs_of_pixels
                                                                      : TileProducts::taps;
  }

  int64_t image_size() const { return plan.g.code_channels * plan.g.code_pixels(); }
  template <typename D>
  D* of_group(D* dense, const Unit& unit) const {
    return dense + unit.group * atoms() * plan.g.code_pixels();
  }
};

}  // namespace dsc::cpu
