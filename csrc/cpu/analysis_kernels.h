// x = T(z + A_W(r)) for blocks of pixels, packed or dense: a matrix product in register tiles of pixels and atoms, the
// only dense work of lista's steps.
#pragma once

#include "block_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// --- tiles of pixels ------------------------------------------------------------------------------------------------

// Where the factors of a tile's pixels begin, and which of its places have a pixel of the block.
template <typename A>
struct Tile {
  const A* pixel[tile_pixels];
  unsigned filled;
  DSC_HOST_DEVICE bool has(int t) const { return filled >> t & 1; }
};

// Those of a block, in the order of its pixels. A pair has at least one.
template <typename A>
struct Tiles {
  Tile<A> tile[2 * block_pixels / tile_pixels];
  int64_t count = 0;

  // The tiles of neighbours whose factors begin at begin(t).
  template <typename Begin>
  DSC_HOST_DEVICE void fill(int64_t pixels, const Begin& begin) {
    for (int64_t t = 0; t < pixels; t += tile_pixels) {
      Tile<A>& next = tile[count++];
      const int64_t filled = pixels - t < tile_pixels ? pixels - t : tile_pixels;
      for (int64_t i = 0; i < tile_pixels; ++i) next.pixel[i] = begin(t + (i < filled ? i : 0));
      next.filled = (1u << filled) - 1;
    }
  }
};

// --- products -------------------------------------------------------------------------------------------------------
// In what way tiles are multiplied by weights. Each has
//   place       the tiles of a block, and what they read if that is not a plane
//   multiply    the products of a tile and some of the weights: sum = start + products, where start(sum) adds the start
//   size        of what is cut into ranges, whose weights are to stay in the first-level cache, and of a range
//   weights     how many weights each of these has for an atom
//   at_once     whether weights lie in the same order if there is one range alone

// Products of so many values in memory, one after the other, with as many weights.
template <int vectors, typename Taps, typename A>
DSC_HOST_DEVICE void multiply_run(const A* const* factor, int64_t length, const A*& weight,
                                  Lanes<A> (&sum)[tile_pixels][vectors]) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t i = 0; i < length; ++i, weight += vectors * lanes) {
    V w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = *reinterpret_cast<const V*>(weight + v * lanes);
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; ++t) {
      const A x = factor[t][i];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) Taps::template add<A>(sum[t][v], x, w[v]);
    }
  }
}

// Tap by tap, from the plane.
struct SingleTaps {
  static int64_t size(const Patches& patches) { return patches.size; }
  static int64_t range(const Patches&) { return taps_per_range; }
  static int64_t weights(const Patches&) { return 1; }
  static bool at_once(const Patches&) { return true; }

  template <typename A>
  static void place(const Patches&, const A* plane, const int64_t* base, int64_t, int64_t pixels, char*,
                    Tiles<A>& tiles) {
    tiles.fill(pixels, [&](int64_t t) { return plane + base[t]; });
  }

  template <typename A>
  DSC_HOST_DEVICE static void add(Lanes<A>& sum, A tap, const Lanes<A>& weight) {
    sum += tap * weight;
  }

  template <int vectors, typename A, typename Start>
  DSC_HOST_DEVICE static void multiply(const Patches& patches, int64_t from, int64_t to, const A* weight,
                                       const A* const* pixel, Lanes<A> (&sum)[tile_pixels][vectors],
                                       const Start& start) {
    start(sum);
    int64_t segment = from / patches.length, i = from % patches.length;
    for (int64_t left = to - from; left > 0; ++segment, i = 0) {
      const int64_t run = patches.length - i < left ? patches.length - i : left;
      left -= run;
      const A* tap[tile_pixels];
#pragma GCC unroll 8
      for (int t = 0; t < tile_pixels; ++t) tap[t] = pixel[t] + patches.segment[segment] + i;
      multiply_run<vectors, SingleTaps>(tap, run, weight, sum);
    }
  }
};

// Two neighbours at a time by F(2, 3) (Winograd 1980): of three columns of taps g0, g1, g2 and the four columns d0 ..
// d3 that two neighbours meet with them,
//
//   a = (d1 + d2) (g0 + g1 + g2) / 2      b = (d2 - d1) (g0 - g1 + g2) / 2
//   first = a + b + (d0 - d2) g0          second = a - b - (d1 - d3) g2
//
// four products in the place of six. A kernel of seven columns is 3 + 3 + 1: ten for fourteen; with a stride of s its
// columns fall into s such kernels. Sums of all a and b come first. The differences and sums of columns are planes of
// their own (sum_columns in plane_kernels.h). Pairs begin at even places of a row, so results do not depend on how rows
// are cut into blocks.
struct PairsOfPixels {
  static int64_t size(const Patches& patches) { return patches.pairs.length; }
  static int64_t range(const Patches& patches) { return patches.pairs.range; }
  static int64_t weights(const Patches& patches) { return patches.pairs.weights(); }
  static bool at_once(const Patches& patches) { return range(patches) >= size(patches); }

  template <typename A>
  static void place(const Patches& patches, const A* plane, const int64_t* base, int64_t first, int64_t pixels, char*,
                    Tiles<A>& tiles) {
    const int64_t row = patches.pairs.row;
    int64_t place = tile_pixels, w = first % row;  // in the last tile, in the row
    const auto add = [&](const A* pixel, unsigned neighbours) __attribute__((always_inline)) {
      if (place == tile_pixels) {
        tiles.tile[tiles.count++].filled = 0;
        place = 0;
      }
      Tile<A>& tile = tiles.tile[tiles.count - 1];
      tile.pixel[place] = tile.pixel[place + 1] = pixel;
      tile.filled |= neighbours << place;
      place += 2;
    };
    for (int64_t t = 0; t < pixels; w = 0) {
      const int64_t stop = row - w < pixels - t ? t + row - w : pixels;
      if (w % 2 != 0) add(plane + base[t++] - patches.pairs.step, 2);
      for (; t + 1 < stop; t += 2) add(plane + base[t], 3);
      if (t < stop) add(plane + base[t++], 1);
    }
    for (; place < tile_pixels; ++place) tiles.tile[tiles.count - 1].pixel[place] = plane + base[0];
  }

  // Products with weights of two kinds, for the first and the second place of each pair.
  template <int vectors, typename A>
  DSC_HOST_DEVICE static void add(const int64_t* offset, int64_t products, int64_t from, int64_t to, const A*& weight,
                                  const A* const* pixel, Lanes<A> (&sum)[tile_pixels][vectors]) {
    using V = Lanes<A>;
    constexpr int64_t lanes = Vector<A>::lanes;
    for (; products > 0; --products, offset += 2) {
      const A* factor[tile_pixels];
#pragma GCC unroll 8
      for (int t = 0; t < tile_pixels; ++t) factor[t] = pixel[t] + offset[t % 2] + from;
      for (int64_t i = 0; i < to - from; ++i) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half, weight += vectors * lanes) {
          V w[vectors];
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) w[v] = in_register<A>(*reinterpret_cast<const V*>(weight + v * lanes));
#pragma GCC unroll 8
          for (int t = half; t < tile_pixels; t += 2) {
            const A x = factor[t][i];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) sum[t][v] += x * w[v];
          }
        }
      }
    }
  }

  template <int vectors, typename A, typename Start>
  DSC_HOST_DEVICE static void multiply(const Patches& patches, int64_t from, int64_t to, const A* weight,
                                       const A* const* pixel, Lanes<A> (&sum)[tile_pixels][vectors],
                                       const Start& start) {
    const PixelPairs& p = patches.pairs;
    add<vectors>(p.offset, p.threes, from, to, weight, pixel, sum);
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; t += 2)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const Lanes<A> a = sum[t][v], b = sum[t + 1][v];
        sum[t][v] = a + b;
        sum[t + 1][v] = a - b;
      }
    start(sum);
    add<vectors>(p.offset + 2 * p.threes, p.threes + p.ones, from, to, weight, pixel, sum);
  }
};

// work.rows = A_W of the pixels of up to product_pixels / tile_pixels tiles, of which there are so many. The weights
// are packed [range][tile of atoms][weight][atom in the tile].
template <int vectors, typename Products, typename A>
DSC_HOST_DEVICE void multiply_rows(const Patches& patches, int64_t from, int64_t to, const A* weight,
                                   const Tile<A>& tile, A*& row, A* unused, int64_t width) {
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes;
  A* u[tile_pixels];
  for (int t = 0; t < tile_pixels; ++t) {
    u[t] = tile.has(t) ? row : unused;
    if (tile.has(t)) row += width;
  }
  V sum[tile_pixels][vectors] = {};
  Products::template multiply<vectors>(patches, from, to, weight, tile.pixel, sum, [&](auto& start) {
    if (from == 0) return;
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) start[t][v] += *reinterpret_cast<const V*>(u[t] + v * lanes);
  });
#pragma GCC unroll 8
  for (int t = 0; t < tile_pixels; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(u[t] + v * lanes) = sum[t][v];
}

template <typename Products, typename A>
DSC_HOST_DEVICE void multiply_tiles(const Patches& patches, const A* weight, const Tile<A>* tile, int64_t tiles,
                                    const Workspace<A>& work) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t size = Products::size(patches), range = Products::range(patches);
  A* const unused = work.rows + product_pixels * work.width;
  for (int64_t from = 0; from < size; from += range) {
    const int64_t to = from + range < size ? from + range : size;
    for (int64_t atom = 0; atom < work.width;) {
      const int64_t vectors = tile_vectors_of(tile_vectors, (work.width - atom) / lanes);
      A* row = work.rows + atom;
      for (int64_t i = 0; i < tiles; ++i) {
        if (vectors == 4)
          multiply_rows<4, Products>(patches, from, to, weight, tile[i], row, unused, work.width);
        else if (vectors == 2)
          multiply_rows<2, Products>(patches, from, to, weight, tile[i], row, unused, work.width);
        else
          multiply_rows<1, Products>(patches, from, to, weight, tile[i], row, unused, work.width);
      }
      weight += vectors * lanes * (to - from) * Products::weights(patches);
      atom += vectors * lanes;
    }
  }
}

// Calls body(first pixel, pixels) for parts of a block whose products stand in work.rows.
template <typename Products, typename A, typename Body>
DSC_HOST_DEVICE void multiply_block(const Patches& patches, const A* weight, const Tiles<A>& tiles,
                                    const Workspace<A>& work, const Body& body) {
  constexpr int64_t most = product_pixels / tile_pixels;
  for (int64_t i = 0, first = 0; i < tiles.count; i += most) {
    const int64_t count = tiles.count - i < most ? tiles.count - i : most;
    int64_t pixels = 0;
    for (int64_t j = i; j < i + count; ++j) pixels += bit_count(tiles.tile[j].filled);
    multiply_tiles<Products>(patches, weight, tiles.tile + i, count, work);
    body(first, pixels);
    first += pixels;
  }
}

// --- packed and dense results ---------------------------------------------------------------------------------------

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

// Packs a tile of pixels straight from the registers, where a row of atoms is one tile wide; returns the place after
// their values. Not inline, or else what the caller has in registers leaves too few for the sums.
template <int vectors, typename Products, bool one_sided, bool nonnegative, typename T>
__attribute__((noinline)) accumulate_t<T>* analyze_tile(const PackedAnalysis<T>& p, Reader<accumulate_t<T>>& start,
                                                        const Tile<accumulate_t<T>>& tile, uint8_t*& mask,
                                                        accumulate_t<T>* out) {
  using A = accumulate_t<T>;
  using V = Lanes<A>;
  constexpr int64_t lanes = Vector<A>::lanes, bytes = 8;
  static_assert(vectors * lanes <= 64);
  V sum[tile_pixels][vectors] = {};
  Products::template multiply<vectors>(p.patches, 0, Products::size(p.patches), p.weight, tile.pixel, sum,
                                       [&](auto& first) {
                                         if (!start.mask) return;
                                         Reader<A> reader = start;
#pragma GCC unroll 8
                                         for (int t = 0; t < tile_pixels; ++t) {
                                           if (!tile.has(t)) continue;
                                           if (any_nonzero(reader.mask, bytes)) {
#pragma GCC unroll 8
                                             for (int v = 0; v < vectors; ++v) first[t][v] += reader.next(v);
                                           }
                                           reader.mask += bytes;
                                         }
                                         start = reader;
                                       });
  const V* const theta = reinterpret_cast<const V*>(p.theta);
  uint8_t* next = mask;
#pragma GCC unroll 8
  for (int t = 0; t < tile_pixels; ++t) {
    if (!tile.has(t)) continue;
    uint64_t word = 0;
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sum[t][v] = thresholded<one_sided, nonnegative, T>(sum[t][v], theta[v]);
      word |= uint64_t{nonzero_lanes<A>(sum[t][v])} << v * lanes;
    }
    memcpy(next, &word, bytes);
    next += bytes;
    if (word == 0) continue;  // many pixels have no non-zeros, and those lie together
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const unsigned bits = word >> v * lanes & ((1u << lanes) - 1);
      compress(bits, sum[t][v], out);
      out += bit_count(bits);
    }
  }
  mask = next;
  return out;
}

template <typename Products, bool one_sided, bool nonnegative, typename T>
DSC_HOST_DEVICE accumulate_t<T>* analyze_block(const PackedAnalysis<T>& p, int64_t block,
                                               const Tiles<accumulate_t<T>>& tiles,
                                               const Workspace<accumulate_t<T>>& work) {
  using A = accumulate_t<T>;
  const int64_t bytes = mask_bytes(p.atoms), first = block * block_pixels;
  Reader<A> start{p.start.masks, nullptr};
  if (start.mask) start = {p.start.masks + first * bytes, p.start.values + p.start.places[block].first};
  uint8_t* mask = p.codes.masks + first * bytes;
  A* out = work.values;
  if constexpr (tile_vectors == 4)  // with fewer registers it is no faster
    if (p.atoms == tile_vectors * Vector<A>::lanes && Products::at_once(p.patches)) {
      for (int64_t i = 0; i < tiles.count; ++i)
        out = analyze_tile<tile_vectors, Products, one_sided, nonnegative>(p, start, tiles.tile[i], mask, out);
      return out;
    }
  multiply_block<Products>(p.patches, p.weight, tiles, work, [&](int64_t, int64_t pixels) {
    if (start.mask) add_codes(start, bytes, pixels, work);
    out = pack_rows<one_sided, nonnegative>(p, mask, pixels, work, out);
    mask += pixels * bytes;
  });
  return out;
}

template <typename Products, typename T>
void packed_analysis_by(const PackedAnalysis<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  const Workspace<A> work(p.atoms, 1, scratch + p.patches.copies);
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t first = block * block_pixels;
    prefetch_next(p.start, block, p.pixels);
    Tiles<A> tiles;
    Products::place(p.patches, p.plane, p.base + first, first, block_size(p.pixels, block), scratch, tiles);
    const A* const out = p.one_sided     ? analyze_block<Products, true, false>(p, block, tiles, work)
                         : p.nonnegative ? analyze_block<Products, false, true>(p, block, tiles, work)
                                         : analyze_block<Products, false, false>(p, block, tiles, work);
    keep_values(work, out - work.values, p.codes, block, p.used);
  }
}

template <typename T>
void packed_analysis(const PackedAnalysis<T>& p, char* scratch) {
  p.patches.products == TileProducts::pairs_of_pixels ? packed_analysis_by<PairsOfPixels>(p, scratch)
                                                      : packed_analysis_by<SingleTaps>(p, scratch);
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
template <typename Products, typename T>
void dense_analysis_by(const DenseAnalysis<T>& p, char* scratch) {
  using A = accumulate_t<T>;
  const Workspace<A> work(p.atoms, 1, scratch + p.patches.copies);
  const int64_t bytes = mask_bytes(p.atoms), width = work.width;
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t first = block * block_pixels;
    Reader<A> start{p.start.masks, nullptr};
    if (start.mask) start = {p.start.masks + first * bytes, p.start.values + p.start.places[block].first};
    Tiles<A> tiles;
    Products::place(p.patches, p.plane, p.base + first, first, block_size(p.pixels, block), scratch, tiles);
    multiply_block<Products>(p.patches, p.weight, tiles, work, [&](int64_t t, int64_t pixels) {
      if (start.mask) add_codes(start, bytes, pixels, work);
      if (p.theta)
        p.one_sided ? threshold_rows<true>(p.bias, p.theta, pixels, work)
                    : threshold_rows<false>(p.bias, p.theta, pixels, work);
      if (p.scale != A(1))
        for (int64_t i = 0; i < pixels * width; ++i) work.rows[i] *= p.scale;
      for_each_run(p.first + first + t, pixels, p.image_pixels, p.image_size,
                   [&](int64_t i, int64_t run, int64_t offset) {
                     const A* const rows = work.rows + i * width;
                     if (p.image_pixels == 1)
                       write_row<T>(rows, p.atoms, p.add, p.dense + offset);
                     else
                       write_rows<T>(rows, width, run, p.atoms, p.add, p.image_pixels, p.dense + offset);
                   });
    });
  }
}

template <typename T>
void dense_analysis(const DenseAnalysis<T>& p, char* scratch) {
  p.patches.products == TileProducts::pairs_of_pixels ? dense_analysis_by<PairsOfPixels>(p, scratch)
                                                      : dense_analysis_by<SingleTaps>(p, scratch);
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
