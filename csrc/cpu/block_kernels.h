// What the products on packed codes have in common: constants, the working memory of a thread, and how a block of
// pixels finds its patches in a plane.
#pragma once

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

// Writes the block's `count` values, which stand in work.values, to the arena.
template <typename A>
DSC_HOST_DEVICE void keep_values(const Workspace<A>& work, int64_t count, const PackedCodes<A>& codes, int64_t block,
                                 int64_t* used) {
  const int64_t first = __atomic_fetch_add(used, count, __ATOMIC_RELAXED);
  codes.places[block] = {first, count};
  memcpy(codes.values + first, work.values, count * sizeof(A));
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

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
