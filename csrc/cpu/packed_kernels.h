// The products of lista on packed codes (core/code_format.h), at one instruction set level.
//
//   analysis     x = T(z + A_W(r)), packed: the only dense work, in analysis_kernels.h
//   synthesis    plane += S_D(z)
//   backward A   on the support of x:  dW += corr(r, g),  plane += S_W(g),  dtheta -= sign(x) g
//   backward B   on the support of z:  dD -= corr(gr, z),  gz = gu - A_D(gr)
//
// All but the first go from non-zero to non-zero, so they cost in proportion to them. A block of pixels is worked on at
// a time: its patches are copied from the plane into rows of their own (or added from there to the plane), which takes
// care of every kernel size, stride and dilation. The tables of atoms are cut into chunks of as many vectors as fit
// into registers, so that a chunk of a table, and of its gradient, stays in the first-level cache.
#pragma once

#include "analysis_kernels.h"
#include "column_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// --- synthesis ------------------------------------------------------------------------------------------------------

// Adds to each pixel's patch the sum over its non-zeros of value * atom. The non-zeros come from the masks, or from the
// workspace's list, which is faster where masks have several words and tables many chunks: where backward goes by
// atoms.
template <bool listed, typename A>
struct SumAtoms {
  const Workspace<A>& work;
  const int64_t* vector;   // where each vector of a patch begins
  const uint8_t* support;  // the masks of the block's pixels
  int64_t bytes;
  const A* values;
  const A* table;
  Block<A> sums;
  int64_t pixels;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    const A* const chunk = table + offset;
    const A* value = values;
    const uint8_t* mask = support;
    const int32_t* atoms = work.atom;
    for (int64_t p = 0; p < pixels; ++p, mask += bytes) {
      if (listed ? work.count[p] == 0 : !any_nonzero(mask, bytes)) continue;
      V sum[vectors] = {};
      const auto add = [&](int64_t atom) {
        const V* const row = reinterpret_cast<const V*>(chunk + atom * (vectors * Vector<A>::lanes));
        const A scale = *value++;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[v] += scale * row[v];
      };
      if (listed)
        for (const int32_t* const end = atoms + work.count[p]; atoms < end; ++atoms) add(*atoms);
      else
        for_each_nonzero(mask, bytes, add);
      A* const patch = sums.memory + sums.base[p];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        *reinterpret_cast<V*>(patch + vector[first + v]) += masked<A>(sum[v], work.masks[first + v]);
    }
  }
};

// The same from dense rows: four pixels and half of a chunk at a time.
template <typename A>
struct SumAllAtoms {
  const Workspace<A>& work;
  const int64_t* vector;
  const A* table;
  Block<A> sums;
  int64_t pixels, atoms;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    constexpr int half = (vectors + 1) / 2;
    for (int64_t p = 0; p < pixels; p += 4) {
      add<vectors, half>(offset, p, first, 0);
      if constexpr (vectors > half) add<vectors, vectors - half>(offset, p, first, half);
    }
  }

  template <int vectors, int part>
  DSC_HOST_DEVICE void add(int64_t offset, int64_t p, int64_t first, int64_t from) const {
    using V = Lanes<A>;
    const A* x[4];
    for (int i = 0; i < 4; ++i) x[i] = work.dense + (p + i < pixels ? p + i : p) * work.dense_width;
    const V* row = reinterpret_cast<const V*>(table + offset) + from;
    V sum[4][part] = {};
    for (int64_t m = 0; m < atoms; ++m, row += vectors) {
      V r[part];
#pragma GCC unroll 8
      for (int v = 0; v < part; ++v) r[v] = row[v];
#pragma GCC unroll 8
      for (int i = 0; i < 4; ++i) {
        const A value = x[i][m];
#pragma GCC unroll 8
        for (int v = 0; v < part; ++v) sum[i][v] += value * r[v];
      }
    }
    for (int64_t i = 0; i < 4 && p + i < pixels; ++i) {
      A* const patch = sums.memory + sums.base[p + i];
#pragma GCC unroll 8
      for (int v = 0; v < part; ++v)
        *reinterpret_cast<V*>(patch + vector[first + from + v]) += masked<A>(sum[i][v], work.masks[first + from + v]);
    }
  }
};

// work.dense = scale * the values of a block.
template <typename A>
DSC_HOST_DEVICE void make_dense(const uint8_t* support, int64_t bytes, const A* values, int64_t pixels, A scale,
                                const Workspace<A>& work) {
  Reader<A> reader{support, values};
  A* row = work.dense;
  for (int64_t t = 0; t < pixels; ++t, row += work.dense_width, reader.mask += bytes)
    for (int64_t v = 0; v < work.width / Vector<A>::lanes; ++v)
      reinterpret_cast<Lanes<A>*>(row)[v] = scale * reader.next(v);
}

template <typename A>
DSC_HOST_DEVICE bool is_dense(const Patches& patches, int64_t count, int64_t pixels, int64_t atoms) {
  return patches.by_atoms && static_cast<double>(count) > dense_share * static_cast<double>(pixels * atoms);
}

// plane += the sum over the block's non-zeros of value * atom. Where backward goes by atoms, the list by pixels, or the
// dense rows, stay in the workspace.
template <typename A>
DSC_HOST_DEVICE void add_block(const Patches& patches, const uint8_t* support, int64_t bytes, const A* values,
                               int64_t count, const A* table, A* plane, const int64_t* base, int64_t pixels,
                               int64_t atoms, const Workspace<A>& work) {
  const Block<A> sums = products_for(patches, plane, base, pixels, work);
  if (is_dense<A>(patches, count, pixels, atoms)) {
    make_dense(support, bytes, values, pixels, A(1), work);
    for_each_chunk<A>(patches, atoms, SumAllAtoms<A>{work, patches.vector, table, sums, pixels, atoms});
  } else if (patches.by_atoms) {
    list_by_pixels(support, bytes, pixels, work);
    for_each_chunk<A>(patches, atoms,
                      SumAtoms<true, A>{work, patches.vector, support, bytes, values, table, sums, pixels});
  } else {
    for_each_chunk<A>(patches, atoms,
                      SumAtoms<false, A>{work, patches.vector, support, bytes, values, table, sums, pixels});
  }
  add_products(patches, plane, base, pixels, work);
}

template <typename A>
void packed_synthesis(const PackedSynthesis<A>& p, char* scratch) {
  Workspace<A> work(p.atoms, p.patches.vectors, scratch);
  work.make_masks(p.patches);
  const int64_t bytes = mask_bytes(p.atoms);
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t first = block * block_pixels;
    prefetch_next(p.codes, block, p.pixels);
    if (p.codes.places[block].count == 0) continue;
#if defined(__AVX512F__)
    if (p.patches.slides) {
      run_patches<A>(PatchSums<A>{p.patches, p.base + first, first, block_size(p.pixels, block),
                                  p.codes.masks + first * bytes, bytes, p.codes.values + p.codes.places[block].first,
                                  p.table, p.plane, nullptr, nullptr, nullptr});
      continue;
    }
#endif
    add_block(p.patches, p.codes.masks + first * bytes, bytes, p.codes.values + p.codes.places[block].first,
              p.codes.places[block].count, p.table, p.plane, p.base + first, block_size(p.pixels, block), p.atoms,
              work);
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// Adds to each pixel's patch of `sums` the sum of g * atom, to the gradient of each atom g * patch, and to its place in
// signed_sums, where they are given, sign(code) * g.
template <typename A>
struct SumAtomsAndGradient {
  const LaneMask<A>* masks;
  const int64_t* vector;
  const uint8_t* support;
  int64_t bytes;
  const A* values;
  const A* codes;
  A* signed_sums;
  const A* table;
  A* gradient;
  Block<const A> patches;
  Block<A> sums;
  int64_t pixels;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    const bool with_signs = signed_sums && first == 0;
    with_signs ? add<vectors, true>(offset, first) : add<vectors, false>(offset, first);
  }

  template <int vectors, bool with_signs>
  __attribute__((noinline)) void add(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    const V* const atoms = reinterpret_cast<const V*>(table + offset);
    V* const gradients = reinterpret_cast<V*>(gradient + offset);
    A* const signs = signed_sums;
    const A *value = values, *code = codes;
    const uint8_t* mask = support;
    for (int64_t p = 0; p < pixels; ++p, mask += bytes) {
      if (!any_nonzero(mask, bytes)) continue;
      V sum[vectors] = {}, patch[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        patch[v] = *reinterpret_cast<const V*>(patches.memory + patches.base[p] + vector[first + v]);
      for_each_nonzero(mask, bytes, [&](int64_t atom) {
        const V* const row = atoms + atom * vectors;
        V* const out = gradients + atom * vectors;
        if (with_signs) add_signed(code++, value, signs + atom);
        const A scale = *value++;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          sum[v] += scale * row[v];
          out[v] = in_register<A>(out[v]) + scale * patch[v];
        }
      });
      A* const target = sums.memory + sums.base[p];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        *reinterpret_cast<V*>(target + vector[first + v]) += masked<A>(sum[v], masks[first + v]);
    }
  }
};

// Copies `vectors` vectors of each pixel's patch side by side.
template <int vectors, typename A>
DSC_HOST_DEVICE void copy_chunk(const Block<const A>& patches, const int64_t* vector, const LaneMask<A>* masks,
                                int64_t pixels, A* out) {
  for (int64_t p = 0; p < pixels; ++p, out += vectors * Vector<A>::lanes)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      reinterpret_cast<Lanes<A>*>(out)[v] =
          masked<A>(*reinterpret_cast<const Lanes<A>*>(patches.memory + patches.base[p] + vector[v]), masks[v]);
}

// Adds to the gradient of each atom g * patch, atom by atom; g are the entries' factors.
template <typename A>
struct GradientByAtoms {
  const Workspace<A>& work;
  const int64_t* vector;
  A* gradient;
  Block<const A> patches;
  int64_t pixels, atoms;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    copy_chunk<vectors>(patches, vector + first, work.masks + first, pixels, work.chunk);
    V* out = reinterpret_cast<V*>(gradient + offset);
    for (int64_t m = 0; m < atoms; ++m, out += vectors) {
      int32_t entry = work.first_entry[m];
      const int32_t end = work.first_entry[m + 1];
      if (entry == end) continue;
      V sum[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[v] = out[v];
      for (; entry < end; ++entry) {
        const V* const patch = reinterpret_cast<const V*>(work.chunk) + work.entry_pixel[entry] * vectors;
        const A scale = work.factor[entry];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[v] += scale * patch[v];
      }
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) out[v] = sum[v];
    }
  }
};

// The same from dense rows, two atoms at a time.
template <typename A>
struct GradientOfAllAtoms {
  const Workspace<A>& work;
  const int64_t* vector;
  A* gradient;
  Block<const A> patches;
  int64_t pixels, atoms;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    copy_chunk<vectors>(patches, vector + first, work.masks + first, pixels, work.chunk);
    V* const out = reinterpret_cast<V*>(gradient + offset);
    for (int64_t m = 0; m < atoms; m += 2) {
      const int64_t second = m + 1 < atoms ? 1 : 0;
      const V* patch = reinterpret_cast<const V*>(work.chunk);
      const A* g = work.dense + m;
      V sum[2][vectors] = {};
      for (int64_t t = 0; t < pixels; ++t, patch += vectors, g += work.dense_width) {
        const A one = g[0], other = g[second];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const V p = patch[v];
          sum[0][v] += one * p;
          sum[1][v] += other * p;
        }
      }
      for (int64_t i = 0; i <= second; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) out[(m + i) * vectors + v] += sum[i][v];
    }
  }
};

// sums[atom] += g of the atom in a block, or -sign(x) g where x is given: by vectors within it, in double beyond.
template <typename A>
DSC_HOST_DEVICE void add_sums_by_atom(const uint8_t* support, int64_t bytes, int64_t pixels, int64_t count,
                                      int64_t atoms, const A* x, const A* g, const Workspace<A>& work, double* sums) {
  using V = Lanes<A>;
  constexpr int few = 4;  // vectors that stay in registers
  if (x) {
    for (int64_t i = 0; i < count; i += Vector<A>::lanes)
      *reinterpret_cast<V*>(work.values + i) =
          with_sign_of<A>(*reinterpret_cast<const V*>(x + i), *reinterpret_cast<const V*>(g + i));
    g = work.values;
  }
  Reader<A> reader{support, g};
  V* const block = reinterpret_cast<V*>(work.rows);
  const int64_t vectors = work.width / Vector<A>::lanes;
  V own[few] = {};
  for (int64_t v = 0; v < vectors; ++v) block[v] = V{};
  for (int64_t t = 0; t < pixels; ++t, reader.mask += bytes) {
    if (vectors == few) {
#pragma GCC unroll 4
      for (int v = 0; v < few; ++v) own[v] += reader.next(v);
    } else {
      for (int64_t v = 0; v < vectors; ++v) block[v] += reader.next(v);
    }
  }
  if (vectors == few)
    for (int v = 0; v < few; ++v) block[v] = own[v];
  for (int64_t m = 0; m < atoms; ++m) sums[m] += x ? -work.rows[m] : work.rows[m];
}

template <typename A>
void packed_backward_analysis(const PackedBackwardAnalysis<A>& p, char* scratch) {
  Workspace<A> work(p.atoms, p.patches.vectors, scratch);
  work.make_masks(p.patches);
  const int64_t bytes = mask_bytes(p.atoms), spare = p.patches.size % Vector<A>::lanes;
  // Where patches slide, what dtheta needs is summed in a lane of the gradients that no tap needs.
  const bool in_lane = p.patches.slides && p.plane && p.gradient && p.grad_theta && spare != 0;
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t pixels = block_size(p.pixels, block), first = block * block_pixels;
    const int64_t count = p.codes.places[block].count;
    const int64_t* const base = p.base + first;
    prefetch_next(p.codes, block, p.pixels);
    prefetch_next(p.grad, block, p.pixels);
    if (count == 0) continue;
    const uint8_t* const support = p.codes.masks + first * bytes;
    const A* const x = p.codes.values + p.codes.places[block].first;
    const A* const grad = p.grad.values + p.grad.places[block].first;
    if (p.grad_bias)
      add_sums_by_atom(support, bytes, pixels, count, p.atoms, static_cast<const A*>(nullptr), grad, work, p.grad_bias);
    const bool together = p.plane && p.gradient && !p.patches.by_atoms && !p.patches.slides;
    if (p.grad_theta && !together && !in_lane)
      add_sums_by_atom(support, bytes, pixels, count, p.atoms, x, grad, work, p.grad_theta);
#if defined(__AVX512F__)
    if (p.patches.slides) {
      if (p.plane || p.gradient)
        run_patches<A>(PatchSums<A>{p.patches, base, first, pixels, support, bytes, grad, p.table, p.plane, p.gradient,
                                    p.residual, in_lane ? x : nullptr});
      continue;
    }
#endif
    if (together) {
      A* const signed_sums = p.grad_theta ? work.rows : nullptr;
      for (int64_t m = 0; signed_sums && m < p.atoms; ++m) signed_sums[m] = A(0);
      const Block<A> sums = products_for(p.patches, p.plane, base, pixels, work);
      for_each_chunk<A>(
          p.patches, p.atoms,
          SumAtomsAndGradient<A>{work.masks, p.patches.vector, support, bytes, grad, x, signed_sums, p.table,
                                 p.gradient, patches_of(p.patches, p.residual, base, pixels, work), sums, pixels});
      for (int64_t m = 0; signed_sums && m < p.atoms; ++m) p.grad_theta[m] -= signed_sums[m];
      add_products(p.patches, p.plane, base, pixels, work);
    } else if (p.plane) {
      add_block(p.patches, support, bytes, grad, count, p.table, p.plane, base, pixels, p.atoms, work);
    }
    if (p.gradient && !together) {
      const Block<const A> patches = patches_of(p.patches, p.residual, base, pixels, work);
      const bool dense = is_dense<A>(p.patches, count, pixels, p.atoms);
      if (!p.plane) {
        if (dense)
          make_dense(support, bytes, grad, pixels, A(1), work);
        else
          list_by_pixels(support, bytes, pixels, work);
      }
      if (dense) {
        for_each_chunk<A>(p.patches, p.atoms,
                          GradientOfAllAtoms<A>{work, p.patches.vector, p.gradient, patches, pixels, p.atoms});
      } else {
        list_by_atoms(pixels, p.atoms, grad, work);
        for_each_chunk<A>(p.patches, p.atoms,
                          GradientByAtoms<A>{work, p.patches.vector, p.gradient, patches, pixels, p.atoms});
      }
    }
  }
  for (int64_t m = 0; in_lane && m < p.atoms; ++m) {
    A& sum = p.gradient[((m + 1) * p.patches.vectors - 1) * Vector<A>::lanes + spare];
    p.grad_theta[m] -= sum;
    sum = A(0);
  }
}

// grad of each non-zero -= patch * atom; gradient of each atom -= value * patch.
template <bool with_gradient, typename A>
struct DotAtoms {
  const LaneMask<A>* masks;
  const int64_t* vector;
  const uint8_t* support;
  int64_t bytes;
  const A* values;
  A* grad;
  const A* table;
  A* gradient;
  Block<const A> patches;
  int64_t pixels;

  template <int vectors>
  __attribute__((noinline)) void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    const V* const atoms = reinterpret_cast<const V*>(table + offset);
    V* const gradients = reinterpret_cast<V*>(gradient + offset);
    const A* value = values;
    A* out = grad;
    const uint8_t* mask = support;
    for (int64_t p = 0; p < pixels; ++p, mask += bytes) {
      if (!any_nonzero(mask, bytes)) continue;
      V patch[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        patch[v] = masked<A>(*reinterpret_cast<const V*>(patches.memory + patches.base[p] + vector[first + v]),
                             masks[first + v]);
      add_dots_of_nonzeros<A>(Mask(mask, bytes), out, [&](int64_t atom, V& dot) __attribute__((always_inline)) {
        const V* const row = atoms + atom * vectors;
        dot = -patch[0] * row[0];
#pragma GCC unroll 8
        for (int v = 1; v < vectors; ++v) dot -= patch[v] * row[v];
        if (with_gradient) {
          V* const sums = gradients + atom * vectors;
          const A scale = *value++;
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sums[v] = in_register<A>(sums[v]) - scale * patch[v];
        }
      });
    }
  }
};

// The same atom by atom: the factors of the entries are the values, their results the products with the patch.
template <bool with_gradient, typename A>
struct DotByAtoms {
  const Workspace<A>& work;
  const int64_t* vector;
  const A* table;
  A* gradient;
  Block<const A> patches;
  int64_t pixels, atoms;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    copy_chunk<vectors>(patches, vector + first, work.masks + first, pixels, work.chunk);
    const V* row = reinterpret_cast<const V*>(table + offset);
    V* out = reinterpret_cast<V*>(gradient + offset);
    for (int64_t m = 0; m < atoms; ++m, row += vectors, out += vectors) {
      int32_t entry = work.first_entry[m];
      const int32_t end = work.first_entry[m + 1];
      if (entry == end) continue;
      V sum[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        if (with_gradient) sum[v] = out[v];
      const auto visit = [&](int32_t i) {
        const V* const patch = reinterpret_cast<const V*>(work.chunk) + work.entry_pixel[i] * vectors;
        const A scale = work.factor[i];
        V dot = {};
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          const V p = patch[v];
          dot += p * row[v];
          if (with_gradient) sum[v] -= scale * p;
        }
        return dot;
      };
      for (; entry + 4 <= end; entry += 4) {
        const V dots[4] = {visit(entry), visit(entry + 1), visit(entry + 2), visit(entry + 3)};
        add_four_sums<A>(dots, work.result + entry);
      }
      for (; entry < end; ++entry) work.result[entry] += sum_of_lanes<A>(visit(entry));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        if (with_gradient) out[v] = sum[v];
    }
  }
};

template <typename A>
void packed_backward_synthesis(const PackedBackwardSynthesis<A>& p, char* scratch) {
  Workspace<A> work(p.atoms, p.patches.vectors, scratch);
  work.make_masks(p.patches);
  const int64_t bytes = mask_bytes(p.atoms), atom_vectors = work.width / Vector<A>::lanes;
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t pixels = block_size(p.pixels, block), first = block * block_pixels;
    const int64_t count = p.codes.places[block].count;
    prefetch_next(p.codes, block, p.pixels);
    prefetch_next(p.grad, block, p.pixels);
    const int64_t place = count ? __atomic_fetch_add(p.used, count + block_room, __ATOMIC_RELAXED) : 0;
    p.result.places[block] = {place, count};
    if (count == 0) continue;
    A* const result = p.patches.slides ? p.result.values + place : work.values;
    const uint8_t* const support = p.codes.masks + first * bytes;
    const A* const values = p.codes.values + p.codes.places[block].first;
    Reader<A> reader{p.grad.masks + first * bytes, p.grad.values + p.grad.places[block].first};
#if defined(__AVX512F__)
    if (p.patches.slides) {
      run_patches<A>(PatchDots<A>{p.patches, p.base + first, first, pixels, support, bytes, atom_vectors, values,
                                  reader.mask, reader.values, result, p.table, p.gradient, p.plane});
      continue;
    }
#endif
    // The gradient of u, moved from the support of the step's result to that of its start; with the dense products
    // where the block takes those.
    const bool dense = is_dense<A>(p.patches, count, pixels, p.atoms);
    Picker<A> picker{support, result};
    for (int64_t t = 0; t < pixels && !dense; ++t, reader.mask += bytes, picker.mask += bytes)
      move_pixel(Mask(reader.mask, bytes), reader.values, Mask(picker.mask, bytes), picker.values, atom_vectors);
    if (dense) {
      Tiles<A> tiles;
      SingleTaps::place(p.patches, p.plane, p.base + first, first, pixels, scratch, tiles);
      multiply_block<SingleTaps>(p.patches, p.tap_weight, tiles, work, [&](int64_t, int64_t part) {
        const Lanes<A>* row = reinterpret_cast<const Lanes<A>*>(work.rows);
        for (int64_t t = 0; t < part; ++t, reader.mask += bytes, picker.mask += bytes)
          for (int64_t v = 0; v < atom_vectors; ++v, ++row) picker.add(v, reader.next(v) + *row);
      });
    }
    const Block<const A> patches = patches_of(p.patches, p.plane, p.base + first, pixels, work);
    const int64_t* const vector = p.patches.vector;
    if (dense) {
      make_dense(support, bytes, values, pixels, A(-1), work);
      if (p.gradient)
        for_each_chunk<A>(p.patches, p.atoms,
                          GradientOfAllAtoms<A>{work, vector, p.gradient, patches, pixels, p.atoms});
    } else if (p.patches.by_atoms) {
      list_by_pixels(support, bytes, pixels, work);
      list_by_atoms(pixels, p.atoms, values, work);
      for (int64_t i = 0; i < count; ++i) work.result[i] = A(0);
      if (p.gradient)
        for_each_chunk<A>(p.patches, p.atoms,
                          DotByAtoms<true, A>{work, vector, p.table, p.gradient, patches, pixels, p.atoms});
      else
        for_each_chunk<A>(p.patches, p.atoms,
                          DotByAtoms<false, A>{work, vector, p.table, nullptr, patches, pixels, p.atoms});
      for (int64_t i = 0; i < count; ++i) result[work.entry_value[i]] -= work.result[i];
    } else if (p.gradient) {
      for_each_chunk<A>(
          p.patches, p.atoms,
          DotAtoms<true, A>{work.masks, vector, support, bytes, values, result, p.table, p.gradient, patches, pixels});
    } else {
      for_each_chunk<A>(
          p.patches, p.atoms,
          DotAtoms<false, A>{work.masks, vector, support, bytes, values, result, p.table, nullptr, patches, pixels});
    }
    memcpy(p.result.values + place, result, count * sizeof(A));
  }
}

// --- between packed codes -------------------------------------------------------------------------------------------

// result = a x + b y, on the union of both supports, or, with a mask given, on that.
template <typename A>
void packed_combine(const PackedCombine<A>& p, char* scratch) {
  const Workspace<A> work(p.atoms, 1, scratch);
  const int64_t bytes = mask_bytes(p.atoms);
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t pixels = block_size(p.pixels, block), first = block * block_pixels;
    Reader<A> x{p.x.masks, p.x.values + p.x.places[block].first}, y{p.y.masks, nullptr};
    if (p.y.masks) y.values = p.y.values + p.y.places[block].first;
    A* out = work.values;
    for (int64_t t = 0; t < pixels; ++t) {
      const int64_t mask = (first + t) * bytes;
      x.mask = p.x.masks + mask;
      y.mask = p.y.masks + mask;
      Picker<A> picker{p.on + mask, out};
      Packer<A> packer(p.result.masks + mask, p.on ? 0 : bytes, work.width, out);
      for (int64_t v = 0; v < work.width / Vector<A>::lanes; ++v) {
        Lanes<A> sum = p.a * x.next(v);
        if (p.y.masks) sum += p.b * y.next(v);
        p.on ? picker.add(v, sum) : packer.add(v, sum);
      }
      out = p.on ? picker.values : packer.values;
    }
    keep_values(work, out - work.values, p.result, block, p.used);
  }
}

// --- between packed and dense codes ---------------------------------------------------------------------------------

// Packed to dense: whole rows of pixels at a time, so that memory is written in runs.
template <typename T>
void packed_to_dense(const PackedToDense<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  Workspace<A> work(p.atoms, 1, scratch);
  const int64_t bytes = mask_bytes(p.atoms);
  T* const tile = reinterpret_cast<T*>(work.rows);  // [atom][pixel]
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t pixels = block_size(p.pixels, block), first = block * block_pixels;
    const A* value = p.codes.values + p.codes.places[block].first;
    if (p.image_pixels == 1) {  // atoms of a pixel side by side
      T* row = p.dense + (p.first + first) * p.image_size;
      for (int64_t t = 0; t < pixels; ++t, row += p.image_size) {
        memset(row, 0, p.atoms * sizeof(T));
        for_each_nonzero(p.codes.masks + (first + t) * bytes, bytes,
                         [&](int64_t atom) { row[atom] = store<T>(*value++); });
      }
      continue;
    }
    memset(tile, 0, p.atoms * block_pixels * sizeof(T));
    for (int64_t t = 0; t < pixels; ++t)
      for_each_nonzero(p.codes.masks + (first + t) * bytes, bytes,
                       [&](int64_t atom) { tile[atom * block_pixels + t] = store<T>(*value++); });
    for_each_run(p.first + first, pixels, p.image_pixels, p.image_size, [&](int64_t t, int64_t run, int64_t offset) {
      for (int64_t m = 0; m < p.atoms; ++m)
        memcpy(p.dense + offset + m * p.image_pixels, tile + m * block_pixels + t, run * sizeof(T));
    });
  }
}

// The values of up to a cache line of pixels on their support. Lines are copied first: those of all atoms are as far
// apart as a cache is large, and would push each other out before the last of their pixels is read.
template <typename T>
DSC_HOST_DEVICE void read_support(const uint8_t* on, int64_t bytes, int64_t pixels, const T* dense,
                                  int64_t image_pixels, T* tile, accumulate_t<T>*& out) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t b = 0; b < bytes; b += 8) {
    uint64_t any = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      uint64_t word;
      memcpy(&word, on + i * bytes + b, 8);
      any |= word;
    }
    for (; any; any &= any - 1) {
      const int64_t atom = 8 * b + __builtin_ctzll(any);
      __builtin_prefetch(dense + atom * image_pixels + line, 0, 2);
      if (pixels == line)
        memcpy(tile + atom * line, dense + atom * image_pixels, 64);
      else
        memcpy(tile + atom * line, dense + atom * image_pixels, pixels * sizeof(T));
    }
  }
  for (int64_t i = 0; i < pixels; ++i)
    for_each_nonzero(on + i * bytes, bytes, [&](int64_t atom) { *out++ = load(tile[i + atom * line]); });
}

// rows[pixel * width + atom] = the values of a run of pixels, in squares of 8 atoms and as many pixels.
template <typename T>
DSC_HOST_DEVICE void turn_run(const T* dense, int64_t image_pixels, int64_t run, int64_t atoms, accumulate_t<T>* rows,
                              int64_t width) {
  for (int64_t m = 0; m < atoms; m += 8) {
    const int64_t some = atoms - m < 8 ? atoms - m : 8;
    const T* const plane = dense + m * image_pixels;
    // The next run, whose lines are too far apart for the processor to foresee them.
    for (int64_t atom = 0; atom < some; ++atom)
      for (int64_t i = run; i < 2 * run; i += 64 / sizeof(T)) __builtin_prefetch(plane + atom * image_pixels + i, 0, 2);
    int64_t turned = 0;  // pixels
    if constexpr (sizeof(T) == sizeof(accumulate_t<T>))
      for (T square[8][8]; some == 8 && turned + 8 <= run; turned += 8) {
        turn(plane + turned, image_pixels, square);
        for (int64_t i = 0; i < 8; ++i) memcpy(rows + (turned + i) * width + m, square[i], sizeof square[i]);
      }
    for (int64_t atom = 0; atom < some; ++atom)
      for (int64_t i = turned; i < run; ++i) rows[i * width + m + atom] = load(plane[atom * image_pixels + i]);
  }
}

// Dense to packed: on the support given by p.on, or else on the dense code's own, whose masks are written.
template <typename T>
void packed_from_dense(const PackedFromDense<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  Workspace<A> work(p.atoms, 1, scratch);
  const int64_t bytes = mask_bytes(p.atoms), width = work.width;
  constexpr int64_t line = 64 / sizeof(T);
  T* const tile = reinterpret_cast<T*>(work.rows);  // [atom][pixel of a line]
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t pixels = block_size(p.pixels, block), first = block * block_pixels;
    A* out = work.values;
    const T* const row = p.dense + (p.first + first) * p.image_size;  // atoms of a pixel side by side, if it is alone
    if (p.on && p.image_pixels == 1) {
      for (int64_t t = 0; t < pixels; ++t)
        for_each_nonzero(p.on + (first + t) * bytes, bytes,
                         [&](int64_t atom) { *out++ = load(row[t * p.image_size + atom]); });
    } else if (p.on) {
      for_each_run(p.first + first, pixels, p.image_pixels, p.image_size, [&](int64_t t, int64_t run, int64_t offset) {
        for (int64_t i = 0; i < run; i += line) {
          const int64_t some = run - i < line ? run - i : line;
          read_support(p.on + (first + t + i) * bytes, bytes, some, p.dense + offset + i, p.image_pixels, tile, out);
        }
      });
    } else {
      for_each_run(p.first + first, pixels, p.image_pixels, p.image_size, [&](int64_t t, int64_t run, int64_t offset) {
        for (int64_t i = t; i < t + run; ++i)
          for (int64_t m = p.atoms; m < width; ++m) work.rows[i * width + m] = A(0);
        if (p.image_pixels == 1)
          for (int64_t m = 0; m < p.atoms; ++m) work.rows[t * width + m] = load(row[t * p.image_size + m]);
        else
          turn_run(p.dense + offset, p.image_pixels, run, p.atoms, work.rows + t * width, width);
      });
      for (int64_t t = 0; t < pixels; ++t) {
        Packer<A> packer(p.codes.masks + (first + t) * bytes, bytes, width, out);
        for (int64_t v = 0; v < width / Vector<A>::lanes; ++v)
          packer.add(v, *reinterpret_cast<const Lanes<A>*>(work.rows + t * width + v * Vector<A>::lanes));
        out = packer.values;
      }
    }
    keep_values(work, out - work.values, p.codes, block, p.used);
  }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
