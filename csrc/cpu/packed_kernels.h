// The products of lista on packed codes (core/code_format.h), at one instruction set level.
//
//   analysis     x = T(z + A_W(r)), packed: a matrix product in register tiles, the only dense work
//   synthesis    plane += S_D(z)
//   backward A   on the support of x:  dW += corr(r, g),  plane += S_W(g),  dtheta -= sign(x) g
//   backward B   on the support of z:  dD -= corr(gr, z),  gz = gu - A_D(gr)
//
// All but the first go from non-zero to non-zero, so they cost in proportion to them. A block of pixels is worked on at
// a time: its patches are copied from the plane into rows of their own (or added from there to the plane), which takes
// care of every kernel size, stride and dilation. The tables of atoms are cut into chunks of as many vectors as fit
// into registers, so that a chunk of a table, and of its gradient, stays in the first-level cache.
#pragma once

#include "sliding_kernels.h"
#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t tile_vectors = 4;  // 6 x 4 accumulators of the 32 registers
constexpr int64_t chunk_vectors = 8;
#else
constexpr int64_t tile_vectors = 2;   // 6 x 2 accumulators of the 16 registers
constexpr int64_t chunk_vectors = 7;  // a sum and a patch of 7 each
#endif
constexpr int64_t taps_per_range = 16384 / (tile_vectors * vector_bytes);

// Share of non-zeros above which a block of a wide dictionary is worked on as if it had no zeros (measured).
constexpr double dense_share = 0.4;

// --- blocks of pixels -----------------------------------------------------------------------------------------------

// Working memory of one thread: rows of atoms for a block of pixels, and copies of patches and of what is to be added
// to them.
template <typename A>
struct Workspace {
  // Of a row of atoms, of a row in `dense`, so long that not all rows fall into the same sets of a cache, of a patch.
  int64_t width, dense_width, stride;
  A *rows, *values, *patches, *products, *chunk, *dense;
  LaneMask<A>* masks;  // of the vectors of a patch: all bits set for its own lanes
  // The non-zeros of a block, atom by atom: where those of each atom begin, and the end; of each its pixel, and its
  // place among the values of the block, which go pixel by pixel; and two numbers for each.
  int32_t *first_entry, *entry_pixel, *entry_value;
  A *factor, *result;
  // And pixel by pixel: how many a pixel has, and their atoms.
  int32_t *count, *atom;
  int64_t copies[block_pixels];  // where the copy of each pixel's patch begins

  static int64_t align(int64_t bytes) { return padded(bytes, 64); }
  static int64_t row_bytes(int64_t atoms) {
    return align((block_pixels * row_atoms<A>(atoms) + Vector<A>::lanes) * sizeof(A));
  }
  static int64_t patch_bytes(int64_t vectors) {
    return align((block_pixels * vectors + 2) * Vector<A>::lanes * sizeof(A));
  }
  static int64_t size(int64_t atoms, int64_t vectors) {
    return 2 * row_bytes(atoms) + row_bytes(row_atoms<A>(atoms) + Vector<A>::lanes) + 2 * patch_bytes(vectors) +
           patch_bytes(chunk_vectors) + align(vectors * sizeof(LaneMask<A>)) + align((atoms + 2) * sizeof(int32_t)) +
           align(block_pixels * sizeof(int32_t)) + 3 * align(block_pixels * atoms * sizeof(int32_t)) +
           2 * align((block_pixels * atoms + Vector<A>::lanes) * sizeof(A));
  }

  Workspace(int64_t group_atoms, int64_t vectors, char* memory)
      : width(row_atoms<A>(group_atoms)), dense_width(width + Vector<A>::lanes), stride(vectors * Vector<A>::lanes) {
    rows = reinterpret_cast<A*>(memory);
    values = reinterpret_cast<A*>(memory += row_bytes(group_atoms));
    dense = reinterpret_cast<A*>(memory += row_bytes(group_atoms));
    patches = reinterpret_cast<A*>(memory += row_bytes(dense_width));
    products = reinterpret_cast<A*>(memory += patch_bytes(vectors));
    chunk = reinterpret_cast<A*>(memory += patch_bytes(vectors));
    masks = reinterpret_cast<LaneMask<A>*>(memory += patch_bytes(chunk_vectors));
    first_entry = reinterpret_cast<int32_t*>(memory += align(vectors * sizeof(LaneMask<A>)));
    count = reinterpret_cast<int32_t*>(memory += align((group_atoms + 2) * sizeof(int32_t)));
    const int64_t most = block_pixels * group_atoms;
    atom = reinterpret_cast<int32_t*>(memory += align(block_pixels * sizeof(int32_t)));
    entry_pixel = reinterpret_cast<int32_t*>(memory += align(most * sizeof(int32_t)));
    entry_value = reinterpret_cast<int32_t*>(memory += align(most * sizeof(int32_t)));
    factor = reinterpret_cast<A*>(memory += align(most * sizeof(int32_t)));
    result = reinterpret_cast<A*>(memory + align((most + Vector<A>::lanes) * sizeof(A)));
    for (int64_t p = 0; p < block_pixels; ++p) copies[p] = p * stride;
  }

  void make_masks(const Patches& patches) {
    constexpr int64_t lanes = Vector<A>::lanes;
    const int64_t per_segment = patches.vectors / patches.segments;
    for (int64_t v = 0; v < patches.vectors; ++v)
      for (int64_t lane = 0; lane < lanes; ++lane)
        masks[v][lane] = patches.copied || v % per_segment * lanes + lane < patches.length ? -1 : 0;
  }
};

// v in the lanes of the mask, 0 in the others, whatever v is.
template <typename A>
DSC_HOST_DEVICE Lanes<A> masked(const Lanes<A>& v, const LaneMask<A>& mask) {
  return (Lanes<A>)((LaneMask<A>)v & mask);
}

template <typename A>
int64_t workspace_size(int64_t atoms, int64_t vectors) {
  return Workspace<A>::size(atoms, vectors);
}

DSC_HOST_DEVICE int64_t block_count(int64_t pixels) { return (pixels + block_pixels - 1) / block_pixels; }

DSC_HOST_DEVICE int64_t block_size(int64_t pixels, int64_t block) {
  const int64_t left = pixels - block * block_pixels;
  return left < block_pixels ? left : block_pixels;
}

// Asks for the values of the block after this one while this one is worked on: they begin in another page, where the
// hardware does not look ahead.
template <typename A>
DSC_HOST_DEVICE void prefetch_next(const PackedCodes<A>& codes, int64_t block, int64_t pixels) {
  if (!codes.places || block + 1 >= block_count(pixels)) return;
  const char* const values = reinterpret_cast<const char*>(codes.values + codes.places[block + 1].first);
  const int64_t bytes = codes.places[block + 1].count * sizeof(A);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(values + i, 0, 2);
}

// Lists the non-zeros of a block pixel by pixel.
template <typename A>
DSC_HOST_DEVICE void list_by_pixels(const uint8_t* support, int64_t bytes, int64_t pixels, const Workspace<A>& work) {
  int32_t* out = work.atom;
  for (int64_t t = 0; t < pixels; ++t) {
    const int32_t* const first = out;
    for_each_nonzero(support + t * bytes, bytes, [&](int64_t atom) { *out++ = static_cast<int32_t>(atom); });
    work.count[t] = static_cast<int32_t>(out - first);
  }
}

// Sorts that list by atoms, with the values of the non-zeros as factors.
template <typename A>
DSC_HOST_DEVICE void list_by_atoms(int64_t pixels, int64_t atoms, const A* values, const Workspace<A>& work) {
  int32_t* const next = work.first_entry + 1;  // counts, then where the next entry of each atom goes
  for (int64_t m = -1; m <= atoms; ++m) next[m] = 0;
  const int32_t* atom = work.atom;
  for (int64_t t = 0; t < pixels; ++t)
    for (int32_t i = work.count[t]; i > 0; --i) ++next[*atom++ + 1];
  for (int64_t m = 1; m <= atoms; ++m) next[m] += next[m - 1];
  const int32_t total = static_cast<int32_t>(atom - work.atom);
  int32_t value = 0;
  for (int64_t t = 0; t < pixels; ++t)
    for (int32_t i = work.count[t]; i > 0; --i, ++value) {
      const int32_t entry = next[work.atom[value]]++;
      work.entry_pixel[entry] = static_cast<int32_t>(t);
      work.entry_value[entry] = value;
    }
  for (int32_t entry = 0; entry < total; ++entry) work.factor[entry] = values[work.entry_value[entry]];
}

// Calls body(first pixel of the run, pixels, where it begins in a plane of the dense code) for each run of the block's
// pixels that lie in one image.
template <typename Body>
DSC_HOST_DEVICE void for_each_run(int64_t first, int64_t count, int64_t image_pixels, int64_t image_size,
                                  const Body& body) {
  for (int64_t t = 0; t < count;) {
    const int64_t image = (first + t) / image_pixels, pixel = (first + t) % image_pixels;
    const int64_t left = image_pixels - pixel, run = left < count - t ? left : count - t;
    body(t, run, image * image_size + pixel);
    t += run;
  }
}

// The memory in which the sparse products of a block find the patches: the plane itself, or copies.
template <typename A>
struct Block {
  A* memory;
  const int64_t* base;  // of each pixel's patch
};

template <typename A>
DSC_HOST_DEVICE Block<const A> patches_of(const Patches& patches, const A* plane, const int64_t* base, int64_t pixels,
                                          const Workspace<A>& work) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  if (!patches.copied) return {plane, base};
  for (int64_t p = 0; p < pixels; ++p) {
    A* out = work.patches + p * work.stride;
    for (int64_t s = 0; s < patches.segments; ++s, out += patches.length) {
      const A* const in = plane + base[p] + patches.segment[s];
      for (int64_t i = 0; i < patches.length; i += lanes)  // what is too much the next run or the zeros overwrite
        *reinterpret_cast<V*>(out + i) = *reinterpret_cast<const V*>(in + i);
    }
    *reinterpret_cast<V*>(out) = V{};
  }
  return {work.patches, work.copies};
}

// Where to add sums to the patches; add_products brings them to the plane.
template <typename A>
DSC_HOST_DEVICE Block<A> products_for(const Patches& patches, A* plane, const int64_t* base, int64_t pixels,
                                      const Workspace<A>& work) {
  if (!patches.copied) return {plane, base};
  memset(work.products, 0, pixels * work.stride * sizeof(A));
  return {work.products, work.copies};
}

template <typename A>
DSC_HOST_DEVICE void add_products(const Patches& patches, A* plane, const int64_t* base, int64_t pixels,
                                  const Workspace<A>& work) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  if (!patches.copied) return;
  const int64_t whole = patches.length / lanes * lanes;
  LaneMask<A> mask = {};
  for (int64_t i = 0; i < patches.length - whole; ++i) mask[i] = -1;
  for (int64_t p = 0; p < pixels; ++p) {
    const A* in = work.products + p * work.stride;
    for (int64_t s = 0; s < patches.segments; ++s, in += patches.length) {
      A* const out = plane + base[p] + patches.segment[s];
      for (int64_t i = 0; i < whole; i += lanes) *reinterpret_cast<V*>(out + i) += *reinterpret_cast<const V*>(in + i);
      if (whole < patches.length)
        *reinterpret_cast<V*>(out + whole) += masked<A>(*reinterpret_cast<const V*>(in + whole), mask);
    }
  }
}

// Calls f.template run<vectors>(table offset, first vector) for each chunk of a table of atoms.
template <typename A, typename F>
DSC_HOST_DEVICE void for_each_chunk(const Patches& patches, int64_t atoms, const F& f) {
  for (int64_t c = 0, first = 0; c < patches.chunks; first += patches.chunk_vectors[c++]) {
    const int64_t offset = atoms * first * Vector<A>::lanes;
    switch (patches.chunk_vectors[c]) {
#define DSC_CHUNK(n)                                                    \
  case n:                                                               \
    if constexpr (n <= chunk_vectors) f.template run<n>(offset, first); \
    break;
      DSC_CHUNK(1)
      DSC_CHUNK(2)
      DSC_CHUNK(3)
      DSC_CHUNK(4)
      DSC_CHUNK(5)
      DSC_CHUNK(6)
      DSC_CHUNK(7)
      DSC_CHUNK(8)
#undef DSC_CHUNK
    }
  }
}

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
      with_window(p.patches,
                  SlideSums<A>{p.patches, p.base + first, first, block_size(p.pixels, block),
                               p.codes.masks + first * bytes, bytes, p.codes.values + p.codes.places[block].first,
                               p.table, p.plane, nullptr, nullptr, nullptr, nullptr});
      continue;
    }
#endif
    add_block(p.patches, p.codes.masks + first * bytes, bytes, p.codes.values + p.codes.places[block].first,
              p.codes.places[block].count, p.table, p.plane, p.base + first, block_size(p.pixels, block), p.atoms,
              work);
  }
}

// --- analysis -------------------------------------------------------------------------------------------------------

// What a tap and the weights of a vector of atoms add to a sum. bf16_kernels.h has another, for pairs of taps.
struct SingleTaps {
  static constexpr int64_t per_range = taps_per_range;
  template <typename A>
  DSC_HOST_DEVICE static void add(Lanes<A>& sum, A tap, const Lanes<A>& weight) {
    sum += tap * weight;
  }
};

// sum[t] += products of pixel t's taps [from, to) with `vectors` vectors of atoms.
template <int vectors, typename Taps, typename A>
DSC_HOST_DEVICE void multiply_pixels(const Patches& patches, int64_t from, int64_t to, const A* weight,
                                     const A* const* pixel, Lanes<A> (&sum)[tile_pixels][vectors]) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t segment = from / patches.length, i = from % patches.length;
  for (int64_t left = to - from; left > 0; ++segment, i = 0) {
    const int64_t stop = patches.length - i < left ? patches.length : i + left;
    left -= stop - i;
    const A* tap[tile_pixels];
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; ++t) tap[t] = pixel[t] + patches.segment[segment];
    for (; i < stop; ++i, weight += vectors * lanes) {
      V w[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) w[v] = *reinterpret_cast<const V*>(weight + v * lanes);
#pragma GCC unroll 8
      for (int t = 0; t < tile_pixels; ++t) {
        const A x = tap[t][i];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) Taps::template add<A>(sum[t][v], x, w[v]);
      }
    }
  }
}

// The same with rows of atoms in memory, which are written where the taps are the first.
template <int vectors, typename Taps, typename A>
DSC_HOST_DEVICE void multiply_rows(const Patches& patches, int64_t from, int64_t to, const A* weight,
                                   const A* const* pixel, A* u, int64_t width) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  V sum[tile_pixels][vectors] = {};
  if (from > 0)
    for (int t = 0; t < tile_pixels; ++t)
      for (int v = 0; v < vectors; ++v) sum[t][v] = *reinterpret_cast<const V*>(u + t * width + v * lanes);
  multiply_pixels<vectors, Taps>(patches, from, to, weight, pixel, sum);
  for (int t = 0; t < tile_pixels; ++t)
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(u + t * width + v * lanes) = sum[t][v];
}

// work.rows = A_W of up to product_pixels pixels. The weights are packed [range of taps][tile of atoms][tap][atom in
// the tile].
template <typename Taps, typename A>
DSC_HOST_DEVICE void multiply_block(const Patches& patches, const A* weight, const A* plane, const int64_t* base,
                                    int64_t pixels, const Workspace<A>& work) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const A* pixel[product_pixels];
  for (int64_t t = 0; t < product_pixels; ++t) pixel[t] = plane + base[t < pixels ? t : 0];
  for (int64_t from = 0; from < patches.size; from += Taps::per_range) {
    const int64_t to = from + Taps::per_range < patches.size ? from + Taps::per_range : patches.size;
    for (int64_t atom = 0; atom < work.width;) {
      const int64_t vectors = tile_vectors_of(tile_vectors, (work.width - atom) / lanes);
      for (int64_t t = 0; t < pixels; t += tile_pixels) {
        A* const u = work.rows + t * work.width + atom;
        if (vectors == 4)
          multiply_rows<4, Taps>(patches, from, to, weight, pixel + t, u, work.width);
        else if (vectors == 2)
          multiply_rows<2, Taps>(patches, from, to, weight, pixel + t, u, work.width);
        else
          multiply_rows<1, Taps>(patches, from, to, weight, pixel + t, u, work.width);
      }
      weight += vectors * lanes * (to - from);
      atom += vectors * lanes;
    }
  }
}

template <typename T>
DSC_HOST_DEVICE Lanes<accumulate_t<T>> rounded_lanes(Lanes<accumulate_t<T>> v) {
  using A = accumulate_t<T>;
  if constexpr (sizeof(T) != sizeof(A))
    for (int i = 0; i < Vector<A>::lanes; ++i) v[i] = load(store<T>(v[i]));
  return v;
}

// As Store<bfloat16> in core/scalar.h, of whose branches on a single value the compiler makes no vectors here.
template <>
DSC_HOST_DEVICE Lanes<float> rounded_lanes<bfloat16>(Lanes<float> v) {
  typedef uint32_t Bits __attribute__((vector_size(vector_bytes)));
  const Bits bits = (Bits)v, rounded = bits + 0x7fffu + (bits >> 16 & 1u), nan = bits | 0x00400000u;
  return (Lanes<float>)(((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded) & 0xffff0000u);
}

#if defined(__AVX512F__)
template <>
DSC_HOST_DEVICE Lanes<float> rounded_lanes<float16>(Lanes<float> v) {
  return (Lanes<float>)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
template <>
DSC_HOST_DEVICE Lanes<float> rounded_lanes<float16>(Lanes<float> v) {
  return (Lanes<float>)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

// T of a vector of atoms, rounded to what a code's values are; for theta >= 0 in fewer operations, u less its part in
// [-theta, theta].
template <bool one_sided, bool nonnegative, typename T>
DSC_HOST_DEVICE Lanes<accumulate_t<T>> thresholded(const Lanes<accumulate_t<T>>& u,
                                                   const Lanes<accumulate_t<T>>& theta) {
  if constexpr (!nonnegative || one_sided)
    return rounded_lanes<T>(soft_threshold<one_sided>(u, theta));
  else
    return rounded_lanes<T>(u - clamped<accumulate_t<T>>(u, theta));
}

// rows += the packed values of as many pixels. In a pass of its own: where reading and compressing alternate, a load
// has to wait until the address of the store before it is known, which takes twice as long.
template <typename A>
DSC_HOST_DEVICE void add_codes(Reader<A>& reader, int64_t bytes, int64_t pixels, const Workspace<A>& work) {
  A* row = work.rows;
  for (int64_t t = 0; t < pixels; ++t, row += work.width, reader.mask += bytes)
    for (int64_t v = 0; v < work.width / Vector<A>::lanes; ++v) reinterpret_cast<Lanes<A>*>(row)[v] += reader.next(v);
}

// Packs T of the rows of as many pixels; returns the place after their values.
template <bool one_sided, bool nonnegative, typename T>
DSC_HOST_DEVICE accumulate_t<T>* pack_rows(const PackedAnalysis<T>& p, uint8_t* mask, int64_t pixels,
                                           const Workspace<accumulate_t<T>>& work, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  const int64_t bytes = mask_bytes(p.atoms), width = work.width;
  const V* const theta = reinterpret_cast<const V*>(p.theta);
  A* row = work.rows;
  for (int64_t t = 0; t < pixels; ++t, row += width, mask += bytes) {
    for (int64_t m = p.atoms; m < width; ++m) row[m] = A(0);  // not even 0 times a NaN
    Packer<A> packer(mask, bytes, width, out);
    for (int64_t v = 0; v < width / Vector<A>::lanes; ++v) {
      const V u = reinterpret_cast<const V*>(row)[v];
      packer.add(v, thresholded<one_sided, nonnegative, T>(u, theta[v]));
    }
    out = packer.values;
  }
  return out;
}

// Writes the block's `count` values, which stand in work.values, to the arena.
template <typename A>
DSC_HOST_DEVICE void keep_values(const Workspace<A>& work, int64_t count, const PackedCodes<A>& codes, int64_t block,
                                 int64_t* used) {
  const int64_t first = __atomic_fetch_add(used, count, __ATOMIC_RELAXED);
  codes.places[block] = {first, count};
  memcpy(codes.values + first, work.values, count * sizeof(A));
}

// Packs a tile of pixels straight from the registers, where a row of atoms is one tile wide; returns the place after
// their values. Not inline, or else what the caller has in registers leaves too few for the sums.
template <int vectors, typename Taps, bool one_sided, bool nonnegative, typename T>
__attribute__((noinline)) accumulate_t<T>* analyze_tile(const PackedAnalysis<T>& p, Reader<accumulate_t<T>>& start,
                                                        const int64_t* base, uint8_t* mask, accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  constexpr int64_t width = vectors * Vector<A>::lanes, bytes = (width + 63) / 64 * 8;
  V sum[tile_pixels][vectors] = {};
  if (start.mask) {
    Reader<A> reader = start;
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; ++t, reader.mask += bytes)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[t][v] = reader.next(v);
    start = reader;
  }
  const A* pixel[tile_pixels];
#pragma GCC unroll 8
  for (int t = 0; t < tile_pixels; ++t) pixel[t] = p.plane + base[t];
  multiply_pixels<vectors, Taps>(p.patches, 0, p.patches.size, p.weight, pixel, sum);
  const V* const theta = reinterpret_cast<const V*>(p.theta);
#pragma GCC unroll 8
  for (int t = 0; t < tile_pixels; ++t, mask += bytes) {
    Packer<A> packer(mask, bytes, width, out);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) packer.add(v, thresholded<one_sided, nonnegative, T>(sum[t][v], theta[v]));
    out = packer.values;
  }
  return out;
}

template <typename Taps, bool one_sided, bool nonnegative, typename T>
DSC_HOST_DEVICE accumulate_t<T>* analyze_block(const PackedAnalysis<T>& p, int64_t block,
                                               const Workspace<accumulate_t<T>>& work) {
  using A = accumulate_t<T>;
  const int64_t bytes = mask_bytes(p.atoms), first = block * block_pixels, last = first + block_size(p.pixels, block);
  Reader<A> start{p.start.masks, nullptr};
  if (start.mask) start = {p.start.masks + first * bytes, p.start.values + p.start.places[block].first};
  A* out = work.values;
  int64_t t = first;
  if constexpr (tile_vectors == 4)  // with fewer registers it is no faster
    if (p.atoms == tile_vectors * Vector<A>::lanes) {
      for (; t + tile_pixels <= last; t += tile_pixels)
        out = analyze_tile<tile_vectors, Taps, one_sided, nonnegative>(p, start, p.base + t, p.codes.masks + t * bytes,
                                                                       out);
    }
  for (; t < last; t += product_pixels) {
    const int64_t pixels = last - t < product_pixels ? last - t : product_pixels;
    multiply_block<Taps>(p.patches, p.weight, p.plane, p.base + t, pixels, work);
    if (start.mask) add_codes(start, bytes, pixels, work);
    out = pack_rows<one_sided, nonnegative>(p, p.codes.masks + t * bytes, pixels, work, out);
  }
  return out;
}

template <typename T, typename Taps = SingleTaps>
void packed_analysis(const PackedAnalysis<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  const Workspace<A> work(p.atoms, 1, scratch);
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    prefetch_next(p.start, block, p.pixels);
    const A* const out = p.one_sided     ? analyze_block<Taps, true, false>(p, block, work)
                         : p.nonnegative ? analyze_block<Taps, false, true>(p, block, work)
                                         : analyze_block<Taps, false, false>(p, block, work);
    keep_values(work, out - work.values, p.codes, block, p.used);
  }
}

// Writes or adds a row of atoms to a dense code of a single pixel.
template <typename T>
DSC_HOST_DEVICE void write_row(const accumulate_t<T>* row, int64_t atoms, bool add, T* dense) {
  if (add)
    for (int64_t m = 0; m < atoms; ++m) dense[m] = store<T>(load(dense[m]) + row[m]);
  else
    for (int64_t m = 0; m < atoms; ++m) dense[m] = store<T>(row[m]);
}

// Writes or adds `pixels` rows of atoms to as many neighbours in the planes of a dense code.
template <typename T>
DSC_HOST_DEVICE void write_rows(const accumulate_t<T>* rows, int64_t width, int64_t pixels, int64_t atoms, bool add,
                                int64_t image_pixels, T* dense) {
  using A = accumulate_t<T>;
  for (int64_t m = 0; m < atoms; m += 8)
    for (int64_t t = 0; t < pixels; t += 8) {
      A turned[8][8];
      const int64_t last_atom = atoms - m < 8 ? atoms - m : 8, last = pixels - t < 8 ? pixels - t : 8;
      const A* const in = rows + t * width + m;
      T* const out = dense + m * image_pixels + t;
      if (last == 8) {
        turn(in, width, turned);
      } else {
        for (int64_t i = 0; i < last; ++i)
          for (int64_t j = 0; j < last_atom; ++j) turned[j][i] = in[i * width + j];
      }
      for (int64_t j = 0; j < last_atom; ++j) {
        T* const row = out + j * image_pixels;
        if (add) {
          for (int64_t i = 0; i < last; ++i) row[i] = store<T>(load(row[i]) + turned[j][i]);
        } else if (last == 8) {
          for (int64_t i = 0; i < 8; ++i) row[i] = store<T>(turned[j][i]);
        } else {
          for (int64_t i = 0; i < last; ++i) row[i] = store<T>(turned[j][i]);
        }
      }
    }
}

// rows = T(rows + bias)
template <bool one_sided, typename A>
DSC_HOST_DEVICE void threshold_rows(const A* bias, const A* theta, int64_t pixels, const Workspace<A>& work) {
  using V = Lanes<A>;
  V* row = reinterpret_cast<V*>(work.rows);
  for (int64_t t = 0; t < pixels; ++t)
    for (int64_t v = 0; v < work.width / Vector<A>::lanes; ++v, ++row) {
      const V u = bias ? *row + reinterpret_cast<const V*>(bias)[v] : *row;
      *row = soft_threshold<one_sided>(u, reinterpret_cast<const V*>(theta)[v]);
    }
}

// The same as a dense code.
template <typename T, typename Taps = SingleTaps>
void dense_analysis(const DenseAnalysis<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  const Workspace<A> work(p.atoms, 1, scratch);
  const int64_t bytes = mask_bytes(p.atoms), width = work.width;
  Reader<A> start{p.start.masks, nullptr};
  for (int64_t t = 0; t < p.pixels; t += product_pixels) {
    const int64_t pixels = p.pixels - t < product_pixels ? p.pixels - t : product_pixels;
    multiply_block<Taps>(p.patches, p.weight, p.plane, p.base + t, pixels, work);
    if (start.mask) {
      if (t % block_pixels == 0) start.values = p.start.values + p.start.places[t / block_pixels].first;
      add_codes(start, bytes, pixels, work);
    }
    if (p.theta)
      p.one_sided ? threshold_rows<true>(p.bias, p.theta, pixels, work)
                  : threshold_rows<false>(p.bias, p.theta, pixels, work);
    if (p.scale != A(1))
      for (int64_t i = 0; i < pixels * width; ++i) work.rows[i] *= p.scale;
    for_each_run(p.first + t, pixels, p.image_pixels, p.image_size, [&](int64_t i, int64_t run, int64_t offset) {
      const A* const rows = work.rows + i * width;
      if (p.image_pixels == 1)
        write_row<T>(rows, p.atoms, p.add, p.dense + offset);
      else
        write_rows<T>(rows, width, run, p.atoms, p.add, p.image_pixels, p.dense + offset);
    });
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// Adds to each pixel's patch of `sums` the sum of g * atom, and to the gradient of each atom g * patch.
template <typename A>
struct SumAtomsAndGradient {
  const LaneMask<A>* masks;
  const int64_t* vector;
  const uint8_t* support;
  int64_t bytes;
  const A* values;
  const A* table;
  A* gradient;
  Block<const A> patches;
  Block<A> sums;
  int64_t pixels;

  template <int vectors>
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    const A* const chunk = table + offset;
    A* const gradient_chunk = gradient + offset;
    const A* value = values;
    const uint8_t* mask = support;
    for (int64_t p = 0; p < pixels; ++p, mask += bytes) {
      if (!any_nonzero(mask, bytes)) continue;
      V sum[vectors] = {}, patch[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        patch[v] = *reinterpret_cast<const V*>(patches.memory + patches.base[p] + vector[first + v]);
      for_each_nonzero(mask, bytes, [&](int64_t atom) {
        const V* const row = reinterpret_cast<const V*>(chunk + atom * (vectors * Vector<A>::lanes));
        V* const out = reinterpret_cast<V*>(gradient_chunk + atom * (vectors * Vector<A>::lanes));
        const A scale = *value++;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          sum[v] += scale * row[v];
          out[v] += scale * patch[v];
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
  const int64_t bytes = mask_bytes(p.atoms);
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
#if defined(__AVX512F__)
    if (p.patches.slides && p.plane && p.gradient) {
      A* const signed_sums = p.grad_theta ? work.rows : nullptr;
      for (int64_t m = 0; signed_sums && m < p.atoms; ++m) signed_sums[m] = A(0);
      with_window(p.patches, SlideSums<A>{p.patches, base, first, pixels, support, bytes, grad, p.table, p.plane,
                                          p.gradient, p.residual, x, signed_sums});
      for (int64_t m = 0; signed_sums && m < p.atoms; ++m) p.grad_theta[m] -= signed_sums[m];
      continue;
    }
#endif
    if (p.grad_theta) add_sums_by_atom(support, bytes, pixels, count, p.atoms, x, grad, work, p.grad_theta);
#if defined(__AVX512F__)
    if (p.patches.slides) {
      if (p.plane || p.gradient)
        with_window(p.patches, SlideSums<A>{p.patches, base, first, pixels, support, bytes, grad, p.table, p.plane,
                                            p.gradient, p.residual, x, nullptr});
      continue;
    }
#endif
    const bool together = p.plane && p.gradient && !p.patches.by_atoms;
    if (together) {
      const Block<A> sums = products_for(p.patches, p.plane, base, pixels, work);
      for_each_chunk<A>(p.patches, p.atoms,
                        SumAtomsAndGradient<A>{work.masks, p.patches.vector, support, bytes, grad, p.table, p.gradient,
                                               patches_of(p.patches, p.residual, base, pixels, work), sums, pixels});
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
  DSC_HOST_DEVICE void run(int64_t offset, int64_t first) const {
    using V = Lanes<A>;
    const A* const chunk = table + offset;
    A* const gradient_chunk = gradient + offset;
    const A* value = values;
    A* grad_value = grad;
    const uint8_t* mask = support;
    for (int64_t p = 0; p < pixels; ++p, mask += bytes) {
      if (!any_nonzero(mask, bytes)) continue;
      V patch[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        patch[v] = masked<A>(*reinterpret_cast<const V*>(patches.memory + patches.base[p] + vector[first + v]),
                             masks[first + v]);
      for_each_nonzero(mask, bytes, [&](int64_t atom) {
        const V* const row = reinterpret_cast<const V*>(chunk + atom * (vectors * Vector<A>::lanes));
        V dot = patch[0] * row[0];
#pragma GCC unroll 8
        for (int v = 1; v < vectors; ++v) dot += patch[v] * row[v];
        if (with_gradient) {
          V* const out = reinterpret_cast<V*>(gradient_chunk + atom * (vectors * Vector<A>::lanes));
          const A scale = *value++;
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) out[v] -= scale * patch[v];
        }
        *grad_value++ -= sum_of_lanes<A>(dot);
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
      with_window(p.patches, SlideDots<A>{p.patches, p.base + first, first, pixels, support, bytes, atom_vectors,
                                          values, reader, result, p.table, p.gradient, p.plane});
      continue;
    }
#endif
    // The gradient of u, moved from the support of the step's result to that of its start; with the dense products
    // where the block takes those.
    const bool dense = is_dense<A>(p.patches, count, pixels, p.atoms);
    Picker<A> picker{support, result};
    for (int64_t t = 0; t < pixels && !dense; ++t, reader.mask += bytes, picker.mask += bytes)
      move_pixel(reader, picker, bytes, atom_vectors);
    for (int64_t from = 0; dense && from < pixels; from += product_pixels) {
      const int64_t part = pixels - from < product_pixels ? pixels - from : product_pixels;
      multiply_block<SingleTaps>(p.patches, p.weight, p.plane, p.base + first + from, part, work);
      const Lanes<A>* row = reinterpret_cast<const Lanes<A>*>(work.rows);
      for (int64_t t = 0; t < part; ++t, reader.mask += bytes, picker.mask += bytes)
        for (int64_t v = 0; v < atom_vectors; ++v, ++row) picker.add(v, reader.next(v) + *row);
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

inline int64_t count_bits(const uint8_t* masks, int64_t bytes) {
  int64_t count = 0;
  for (int64_t b = 0; b < bytes; b += 8) {
    uint64_t word;
    memcpy(&word, masks + b, 8);
    count += bit_count(word);
  }
  return count;
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
      if (pixels == line)
        memcpy(tile + atom * line, dense + atom * image_pixels, 64);
      else
        memcpy(tile + atom * line, dense + atom * image_pixels, pixels * sizeof(T));
    }
  }
  for (int64_t i = 0; i < pixels; ++i)
    for_each_nonzero(on + i * bytes, bytes, [&](int64_t atom) { *out++ = load(tile[i + atom * line]); });
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
    if (p.on) {
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
        for (int64_t m = 0; m < p.atoms; ++m)
          for (int64_t i = 0; i < run; ++i)
            work.rows[(t + i) * width + m] = load(p.dense[offset + m * p.image_pixels + i]);
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
