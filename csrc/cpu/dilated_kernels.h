// 3x3 convolutions of any dilation d with padding d, on slices of channels as they lie in (N, C, H, W).
//
//   convolution  out[n, o, p] = base[n, o, p] + sum of W[o, c, t] x[n, c, p + d t]      F x, and with -d: F^T z
//   correlation  G[o, c, t]   = sum of z[n, o, p] x[n, c, p + d t]                      the gradient of F
//
// Vectors go along the pixels of a plane as one row. Of a channel three copies are made, one for each column of the
// kernel, with zeros where that column is outside the picture, and rows of zeros above and below: then a tap is one
// address, no lane is wasted at the ends of rows, and three copies serve 9 x outputs multiplications. A register tile
// has the sums of several outputs and vectors of pixels, over some channels, whose part of the copies stays in the
// nearest cache. Groups of outputs that read so few channels alone share the copies.
// Where a row of the kernel meets nothing but zeros it is left out.
//
// Rows h and h + d are a pair: Winograd's F(2, 3) makes both of four products where the definition has six, for each
// column of the kernel. With r_0 .. r_3 the rows h - d, h, h + d, h + 2 d of a copy, and w_i those of the kernel,
//
//   m_0 = (r_0 - r_2) w_0                      m_1 = (r_1 + r_2) (w_0 + w_1 + w_2) / 2    out[h] = m_0 + m_1 + m_2
//   m_2 = (r_2 - r_1) (w_0 - w_1 + w_2) / 2    m_3 = (r_1 - r_3) w_2                      out[h + d] = m_1 - m_2 - m_3
//
// so there are four tiles in the place of one, of half the pixels. A picture of few rows has too few pairs.
//
// The gradient's tile has a vector of partial sums for each of several taps of z and channels of x, whose lanes are
// added up after many pixels.
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t dilated_vectors = 4;  // of pixels, with 6 outputs
constexpr int64_t dilated_sources = 2;  // channels of z, 3 taps each, with 4 channels of x
#else
constexpr int64_t dilated_vectors = 2;
constexpr int64_t dilated_sources = 1;
#endif
constexpr int64_t dilated_outputs = 6;
constexpr int64_t dilated_channels = 36;  // whose copies are multiplied at a time

// Copies of a strip of a plane, at one instruction set level.
template <typename A>
struct ShiftedColumns {
  using Mask = LaneMask<A>;
  static constexpr int64_t lanes = Vector<A>::lanes;

  const Dilation& d;
  int64_t pixels, padded_pixels;  // of a strip
  int64_t halo;                   // pixels of the rows above, and of those below
  int64_t copy;                   // distance of copies
  int64_t guard;                  // pixels that are read before and after a plane
  A* line;
  Mask* masks;

  explicit ShiftedColumns(const Dilation& d_)
      : d(d_),
        pixels(d.rows * d.length),
        padded_pixels(padded(pixels, lanes)),
        halo(d.row_reach() * d.length),
        copy(padded(padded_pixels + 2 * halo, 16) + 16),
        guard(padded(d.column_reach(), lanes) + lanes) {}

  int64_t line_vectors() const { return padded(pixels + 2 * halo, lanes) / lanes; }
  int64_t size() const { return (line_vectors() * 3 * lanes + 2 * guard) * static_cast<int64_t>(sizeof(A)) + 64; }

  // Takes its memory, size() bytes.
  char* use(char* scratch) {
    masks = reinterpret_cast<Mask*>(scratch);
    A* const columns = reinterpret_cast<A*>(scratch);
    using I = typename MaskElement<A>::type;
    I* const bits = reinterpret_cast<I*>(columns);
    const int64_t run = line_vectors() * lanes, reach = d.column_reach();
    for (int side = 0; side < 2; ++side)
      for (int64_t p = 0; p < run; p += d.length) {
        const int64_t length = p + d.length < run ? d.length : run - p;
        for (int64_t w = 0; w < length; ++w)
          bits[side * run + p + w] = -I(side == 0 ? w >= reach : w + reach < d.length);
      }
    line = columns + 2 * run;
    return scratch + padded(size(), 64);
  }

  // The three copies of the strip that begins with row `first`; where no row is, `copies` has zeros already.
  template <typename T>
  DSC_HOST_DEVICE void make(const T* plane, int64_t first, A* copies) const {
    const int64_t reach = d.row_reach();
    const int64_t from = first - reach > 0 ? first - reach : 0;
    const int64_t to = first + d.rows + reach < d.height ? first + d.rows + reach : d.height;
    const int64_t count = (to - from) * d.length, at = (from - first + reach) * d.length;
    const T* const source = plane + from * d.length;
    const int64_t vectors = padded(count, lanes) / lanes;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(A)) {
      // Masked loads read nothing but the plane.
      const int64_t whole = count / lanes;
      const unsigned rest = (1u << (count - whole * lanes)) - 1;
      for (int column = 0; column < 3; ++column) {
        A* const to_copy = copies + column * copy + at;
        const int64_t side = d.backward ? 2 - column : column;
        const T* const read = source + (side - 1) * d.column_reach();
        const Mask* const mask = masks_of(side);
        const auto move = [=](int64_t v, unsigned lanes_there) {
          const unsigned bits = side == 1 ? lanes_there : lanes_there & nonzero_lanes<A>((Lanes<A>)mask[v]);
          vector_at(to_copy + v * lanes) = load_lanes<A>(Lanes<A>{}, bits, read + v * lanes);
        };
        for (int64_t v = 0; v < whole; ++v) move(v, ~0u);
        if (rest) move(whole, rest);
      }
      return;
    }
#endif
    A* const middle = line + guard;
    for (int64_t i = 0; i < count; ++i) middle[i] = load(source[i]);
    for (int column = 0; column < 3; ++column) {
      A* const to_copy = copies + column * copy + at;
      const int64_t side = d.backward ? 2 - column : column;
      const A* const read = middle + (side - 1) * d.column_reach();
      const Mask* const mask = masks_of(side);
      if (side == 1)
        for (int64_t v = 0; v < vectors; ++v) vector_at(to_copy + v * lanes) = vector_at(read + v * lanes);
      else
        for (int64_t v = 0; v < vectors; ++v)
          vector_at(to_copy + v * lanes) = (Lanes<A>)((Mask)vector_at(read + v * lanes) & mask[v]);
      vector_at(to_copy + count) = Lanes<A>{};  // the last vector had too much
    }
  }

  // Of the column that is read on the left (0) or on the right (2) of a pixel: where there is one.
  DSC_HOST_DEVICE const Mask* masks_of(int64_t side) const { return masks + (side == 0 ? 0 : line_vectors()); }

  // Whether a vector of a strip, moved to a row of the kernel, meets any row of the picture.
  DSC_HOST_DEVICE bool meets(int64_t strip, int64_t pixel, int64_t tap) const {
    const int64_t read = strip * pixels + pixel + row(tap) - halo;
    return read + lanes > 0 && read < d.height * d.length;
  }

  DSC_HOST_DEVICE bool meets_alike(int64_t strip, int64_t pixel, int64_t other) const {
    bool alike = true;
    for (int64_t tap = 0; tap < 3; ++tap) alike = alike && meets(strip, pixel, tap) == meets(strip, other, tap);
    return alike;
  }

  // Where the row of a kernel begins in a copy.
  DSC_HOST_DEVICE int64_t row(int64_t tap) const { return (d.backward ? 2 - tap : tap) * halo; }

  DSC_HOST_DEVICE static Lanes<A>& vector_at(A* p) { return *reinterpret_cast<Lanes<A>*>(p); }
  DSC_HOST_DEVICE static const Lanes<A>& vector_at(const A* p) { return *reinterpret_cast<const Lanes<A>*>(p); }
};

// --- convolution -----------------------------------------------------------------------------------------------------

template <typename A>
struct DilatedTile {
  const A* copies;              // of the first channel, at the tile's first pixel
  int64_t copy, row, next_row;  // where the rows of the kernel are in a copy
  int64_t first_tap, last_tap;  // the rows of the kernel that meet the picture
  int64_t channels;
  const A* weight;
  int64_t weight_output, weight_input;
  A* sums;
  int64_t sums_output;
  bool first;
};

template <int outputs, int vectors, typename A>
void dilated_tile(const DilatedTile<A>& t) {
  constexpr int64_t lanes = Vector<A>::lanes;
  using V = Lanes<A>;
  V sums[outputs][vectors];
  for (int o = 0; o < outputs; ++o)
    for (int v = 0; v < vectors; ++v)
      sums[o][v] = t.first ? V{} : *reinterpret_cast<const V*>(t.sums + o * t.sums_output + v * lanes);
  const A* x = t.copies;
  const A* weight = t.weight;
  for (int64_t c = 0; c < t.channels; ++c, x += 3 * t.copy, weight += t.weight_input) {
    const A* from = x + t.row + t.first_tap * t.next_row;
    for (int64_t i = t.first_tap; i < t.last_tap; ++i, from += t.next_row)
      for (int j = 0; j < 3; ++j) {
        V in[vectors];
        for (int v = 0; v < vectors; ++v) in[v] = *reinterpret_cast<const V*>(from + j * t.copy + v * lanes);
        for (int o = 0; o < outputs; ++o) {
          const A w = weight[o * t.weight_output + 3 * i + j];
          for (int v = 0; v < vectors; ++v) sums[o][v] += in[v] * w;
        }
      }
  }
  for (int o = 0; o < outputs; ++o)
    for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(t.sums + o * t.sums_output + v * lanes) = sums[o][v];
}

template <int vectors, typename A>
void dilated_tile_of(int64_t outputs, const DilatedTile<A>& t) {
  switch (outputs) {
    case 1:
      return dilated_tile<1, vectors>(t);
    case 2:
      return dilated_tile<2, vectors>(t);
    case 3:
      return dilated_tile<3, vectors>(t);
    case 4:
      return dilated_tile<4, vectors>(t);
    case 5:
      return dilated_tile<5, vectors>(t);
    default:
      return dilated_tile<6, vectors>(t);
  }
}

// Pixels of the first rows of the pairs of a strip, and some that are written beyond them.
template <typename A>
int64_t pairs_of(const ShiftedColumns<A>& columns) {
  return padded(columns.pixels / 2, Vector<A>::lanes) + Vector<A>::lanes;
}

template <typename T>
int64_t dilated_convolution_scratch(const DilatedConvolution<T>& p) {
  using A = accumulate_t<T>;
  const ShiftedColumns<A> columns(p.dilation);
  if (p.in_pairs)
    return padded(columns.size(), 64) +
           (3 * columns.copy + (3 * dilated_channels + p.group()) * 4 * pairs_of(columns)) *
               static_cast<int64_t>(sizeof(A));
  return padded(columns.size(), 64) +
         (dilated_channels * 3 * columns.copy + p.group() * columns.padded_pixels) * static_cast<int64_t>(sizeof(A));
}

template <typename T>
DSC_HOST_DEVICE void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

// The four mixtures of rows of a copy, so far apart.
template <typename A>
void mix_rows(const Dilation& d, const A* copy, int64_t mixture, A* mixed) {
  using V = Lanes<A>;
  const int64_t run = d.dilation * d.length;
  for (int64_t first = 0; first < d.rows * d.length; first += 2 * run, copy += 2 * run, mixed += run)
    for (int64_t i = 0; i < run; i += Vector<A>::lanes) {
      const auto row = [=](int64_t k) { return *reinterpret_cast<const V*>(copy + k * run + i); };
      const V r0 = row(0), r1 = row(1), r2 = row(2), r3 = row(3);
      const V mixtures[4] = {r0 - r2, r1 + r2, r2 - r1, r1 - r3};
      for (int k = 0; k < 4; ++k) *reinterpret_cast<V*>(mixed + k * mixture + i) = mixtures[k];
    }
}

template <typename T>
void dilated_convolution_in_pairs(const DilatedConvolution<T>& p, int64_t begin, int64_t end, char* scratch) {
  using A = accumulate_t<T>;
  constexpr int64_t lanes = Vector<A>::lanes;
  ShiftedColumns<A> columns(p.dilation);
  const Dilation& d = p.dilation;
  const int64_t pairs = pairs_of(columns), groups = p.groups(), strips = d.strips();
  const int64_t plane = d.height * d.length, run = d.dilation * d.length;
  A* const copies = reinterpret_cast<A*>(columns.use(scratch));
  const int64_t mixture = dilated_channels * 3 * pairs, products = p.group() * pairs;
  A* const mixed = copies + 3 * columns.copy;  // [mixture][channel][column][pixel]
  A* const sums = mixed + 4 * mixture;         // [mixture][output][pixel]
  int64_t before = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % groups, strip = task / groups % strips, image = task / groups / strips;
    const int64_t first_output = p.outputs * group / groups, outputs = p.outputs * (group + 1) / groups - first_output;
    const int64_t blocks = (outputs + dilated_outputs - 1) / dilated_outputs;
    if (strip != before) memset(copies, 0, 3 * columns.copy * sizeof(A));
    before = strip;
    const bool shared = p.inputs <= dilated_channels && group > 0 && task > begin;
    if (p.inputs == 0) memset(sums, 0, 4 * products * sizeof(A));
    for (int64_t c = 0; c < p.inputs; c += dilated_channels) {
      const int64_t channels = c + dilated_channels < p.inputs ? dilated_channels : p.inputs - c;
      for (int64_t i = 0; i < channels && !shared; ++i) {
        columns.make(p.x.plane(image, c + i), strip * d.rows, copies);
        for (int64_t column = 0; column < 3; ++column)
          mix_rows(d, copies + column * columns.copy, mixture, mixed + (3 * i + column) * pairs);
      }
      for (int64_t k = 0; k < 4; ++k)
        for (int64_t pixel = 0; pixel < pairs - lanes;) {
          const int64_t vectors = tile_vectors_of(dilated_vectors, (pairs - lanes - pixel) / lanes);
          for (int64_t block = 0; block < blocks; ++block) {
            const int64_t o = outputs * block / blocks, size = outputs * (block + 1) / blocks - o;
            const A* const weight =
                p.weight + k * p.outputs * p.weight_output + (first_output + o) * p.weight_output + c * p.weight_input;
            A* const to = sums + k * products + o * pairs + pixel;
            const DilatedTile<A> tile = {mixed + k * mixture + pixel,
                                         pairs,
                                         0,
                                         0,
                                         0,
                                         1,
                                         channels,
                                         weight,
                                         p.weight_output,
                                         p.weight_input,
                                         to,
                                         pairs,
                                         c == 0};
            if (vectors == 4)
              dilated_tile_of<dilated_vectors>(size, tile);
            else if (vectors == 2)
              dilated_tile_of<2>(size, tile);
            else
              dilated_tile_of<1>(size, tile);
          }
          pixel += vectors * lanes;
        }
    }
    const int64_t from = strip * columns.pixels;
    const int64_t pixels = columns.pixels < plane - from ? columns.pixels : plane - from;
    for (int64_t o = 0; o < outputs; ++o) {
      const T* const base = p.base.values ? p.base.plane(image, first_output + o) + from : nullptr;
      T* const out = p.out + image * p.out_stride + (first_output + o) * plane + from;
      const A* m = sums + o * pairs;
      for (int64_t first = 0; first < pixels; first += 2 * run, m += run) {
        // Of both rows, as far as the picture goes.
        const auto put = [&](int64_t at, auto sum) {
          const int64_t count = pixels - at < run ? pixels - at : run;
          if (base)
            for (int64_t i = 0; i < count; ++i) out[at + i] = store<T>(load(base[at + i]) + sum(i));
          else
            for (int64_t i = 0; i < count; ++i) out[at + i] = store<T>(sum(i));
        };
        put(first, [=](int64_t i) { return m[i] + m[products + i] + m[2 * products + i]; });
        put(first + run, [=](int64_t i) { return m[products + i] - m[2 * products + i] - m[3 * products + i]; });
      }
    }
  }
}

// Tasks: images x strips x groups of outputs.
template <typename T>
void dilated_convolution(const DilatedConvolution<T>& p, int64_t begin, int64_t end, char* scratch) {
  if (p.in_pairs) return dilated_convolution_in_pairs(p, begin, end, scratch);
  using A = accumulate_t<T>;
  constexpr int64_t lanes = Vector<A>::lanes;
  ShiftedColumns<A> columns(p.dilation);
  A* const copies = reinterpret_cast<A*>(columns.use(scratch));
  A* const sums = copies + dilated_channels * 3 * columns.copy;
  const Dilation& d = p.dilation;
  const int64_t groups = p.groups(), strips = d.strips();
  int64_t before = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = task % groups, strip = task / groups % strips, image = task / groups / strips;
    const int64_t first_output = p.outputs * group / groups, outputs = p.outputs * (group + 1) / groups - first_output;
    const int64_t blocks = (outputs + dilated_outputs - 1) / dilated_outputs;
    if (strip != before) {
      memset(copies, 0, dilated_channels * 3 * columns.copy * sizeof(A));
      before = strip;
    }
    const bool shared = p.inputs <= dilated_channels && group > 0 && task > begin;
    if (p.inputs == 0) memset(sums, 0, outputs * columns.padded_pixels * sizeof(A));
    const int64_t plane = d.height * d.length, from = strip * columns.pixels;
    const int64_t pixels = columns.pixels < plane - from ? columns.pixels : plane - from;
    const T* const base = p.base.values ? p.base.plane(image, first_output) + from : nullptr;
    T* const out = p.out + image * p.out_stride + first_output * plane + from;
    for (int64_t c = 0; c < p.inputs; c += dilated_channels) {
      const int64_t channels = c + dilated_channels < p.inputs ? dilated_channels : p.inputs - c;
      for (int64_t i = 0; i < channels && !shared; ++i)
        columns.make(p.x.plane(image, c + i), strip * d.rows, copies + i * 3 * columns.copy);
      for (int64_t pixel = 0; pixel < columns.padded_pixels;) {
        // A tile has vectors that meet the picture in the same rows of the kernel.
        int64_t first_tap = 0, last_tap = 3, left = 1;
        while (first_tap < 3 && !columns.meets(strip, pixel, first_tap)) ++first_tap;
        while (last_tap > first_tap && !columns.meets(strip, pixel, last_tap - 1)) --last_tap;
        while (left < dilated_vectors && pixel + left * lanes < columns.padded_pixels &&
               columns.meets_alike(strip, pixel, pixel + left * lanes))
          ++left;
        const int64_t vectors = tile_vectors_of(dilated_vectors, left);
        // What is copied next comes from further away.
        for (int64_t i = 0; i < dilated_channels && c + channels + i < p.inputs; ++i)
          prefetch(p.x.plane(image, c + channels + i) + from + pixel, vectors * lanes);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t o = outputs * block / blocks, size = outputs * (block + 1) / blocks - o;
          const DilatedTile<A> tile = {copies + pixel,
                                       columns.copy,
                                       columns.row(0),
                                       columns.row(1) - columns.row(0),
                                       first_tap,
                                       last_tap,
                                       channels,
                                       p.weight + (first_output + o) * p.weight_output + c * p.weight_input,
                                       p.weight_output,
                                       p.weight_input,
                                       sums + o * columns.padded_pixels + pixel,
                                       columns.padded_pixels,
                                       c == 0};
          if (vectors == 4)
            dilated_tile_of<dilated_vectors>(size, tile);
          else if (vectors == 2)
            dilated_tile_of<2>(size, tile);
          else
            dilated_tile_of<1>(size, tile);
        }
        pixel += vectors * lanes;
      }
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const A* const sum = sums + o * columns.padded_pixels;
      T* const to = out + o * plane;
      if (base)
        for (int64_t i = 0; i < pixels; ++i) to[i] = store<T>(load(base[o * plane + i]) + sum[i]);
      else
        for (int64_t i = 0; i < pixels; ++i) to[i] = store<T>(sum[i]);
    }
  }
}

// --- correlation -----------------------------------------------------------------------------------------------------

constexpr int64_t correlated_channels = 4;  // of x in a tile

template <typename A>
struct CorrelationTile {
  int64_t pieces, vectors;  // of a piece
  const A* z;               // copies of a column of the kernel
  int64_t z_source, z_piece, row, last_row;
  const A* x;  // [channel][piece][pixel]
  int64_t x_channel, x_piece;
  A* sums;  // [source][row of the kernel][channel], so far apart
  int64_t sums_source, sums_row;
  int64_t begin[3], end[3];         // vectors of a piece that meet the picture in each row of the kernel
  int64_t first_whole, last_whole;  // and in all
};

template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

template <int sources, typename A>
void correlation_tile(const CorrelationTile<A>& t) {
  constexpr int64_t lanes = Vector<A>::lanes;
  using V = Lanes<A>;
  V sums[sources][3][correlated_channels] = {};
  for (int64_t piece = 0; piece < t.pieces; ++piece) {
    const A* z = t.z + piece * t.z_piece + t.row;
    const A* x = t.x + piece * t.x_piece;
    const auto add = [&](int64_t from, int64_t to, auto every) {
      for (int64_t v = from; v < to; ++v) {
        V in[correlated_channels];
        for (int c = 0; c < correlated_channels; ++c)
          in[c] = *reinterpret_cast<const V*>(x + c * t.x_channel + v * lanes);
        for (int i = 0; i < 3; ++i)
          if (decltype(every)::value || (v >= t.begin[i] && v < t.end[i]))
            for (int s = 0; s < sources; ++s) {
              const V tap = *reinterpret_cast<const V*>(z + s * t.z_source + i * t.last_row + v * lanes);
              for (int c = 0; c < correlated_channels; ++c) sums[s][i][c] += tap * in[c];
            }
      }
    };
    add(0, t.first_whole, Flag<false>());
    add(t.first_whole, t.last_whole, Flag<true>());
    add(t.last_whole, t.vectors, Flag<false>());
  }
  for (int s = 0; s < sources; ++s)
    for (int i = 0; i < 3; ++i) add_four_sums(sums[s][i], t.sums + s * t.sums_source + i * t.sums_row);
}

template <typename T>
int64_t dilated_correlation_scratch(const DilatedCorrelation<T>& p) {
  using A = accumulate_t<T>;
  const ShiftedColumns<A> columns(p.dilation);
  return padded(columns.size(), 64) + p.chunk *
                                          (p.group() * 3 * columns.copy + correlated_channels * columns.padded_pixels) *
                                          static_cast<int64_t>(sizeof(A));
}

// Tasks: shares x groups of channels of z. Sums are [share][channel of z][column][row][channel of x].
template <typename T>
void dilated_correlation(const DilatedCorrelation<T>& p, int64_t begin, int64_t end, char* scratch) {
  using A = accumulate_t<T>;
  ShiftedColumns<A> columns(p.dilation);
  const Dilation& d = p.dilation;
  const int64_t groups = p.groups(), strips = d.strips(), width = p.sums_width();
  A* const copies = reinterpret_cast<A*>(columns.use(scratch));
  A* const lines = copies + p.chunk * p.group() * 3 * columns.copy;
  const int64_t vectors = columns.padded_pixels / Vector<A>::lanes;
  int64_t begins[3] = {}, ends[3] = {vectors, vectors, vectors}, first_whole = 0, last_whole = vectors;
  for (int64_t tap = 0; strips == 1 && tap < 3; ++tap) {
    while (begins[tap] < vectors && !columns.meets(0, begins[tap] * Vector<A>::lanes, tap)) ++begins[tap];
    while (ends[tap] > begins[tap] && !columns.meets(0, (ends[tap] - 1) * Vector<A>::lanes, tap)) --ends[tap];
    first_whole = first_whole > begins[tap] ? first_whole : begins[tap];
    last_whole = last_whole < ends[tap] ? last_whole : ends[tap];
  }
  if (last_whole < first_whole) last_whole = first_whole;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t share = task / groups, group = task % groups;
    const int64_t first = p.outputs * group / groups, outputs = p.outputs * (group + 1) / groups - first;
    A* const sums = p.sums + (share * p.outputs + first) * 9 * width;
    memset(sums, 0, outputs * 9 * width * sizeof(A));
    const int64_t last = p.first_piece(share + 1);
    for (int64_t piece = p.first_piece(share); piece < last; piece += p.chunk) {
      const int64_t count = piece + p.chunk < last ? p.chunk : last - piece;
      memset(copies, 0, count * outputs * 3 * columns.copy * sizeof(A));
      for (int64_t o = 0; o < outputs; ++o)
        for (int64_t i = 0; i < count; ++i)
          columns.make(p.z.plane((piece + i) / strips, first + o), (piece + i) % strips * d.rows,
                       copies + (o * count + i) * 3 * columns.copy);
      for (int64_t c = 0; c < p.inputs; c += correlated_channels) {
        const bool in_place = sizeof(T) == sizeof(A) && strips == 1 && columns.padded_pixels == d.height * d.length &&
                              c + correlated_channels <= p.inputs;
        for (int64_t k = 0; !in_place && k < correlated_channels; ++k)
          for (int64_t i = 0; i < count; ++i) {
            A* const line = lines + (k * count + i) * columns.padded_pixels;
            const int64_t from = (piece + i) % strips * columns.pixels, rest = d.height * d.length - from;
            const int64_t pixels = c + k >= p.inputs ? 0 : columns.pixels < rest ? columns.pixels : rest;
            const T* const x = p.x.plane((piece + i) / strips, c + k < p.inputs ? c + k : 0) + from;
            for (int64_t j = 0; j < pixels; ++j) line[j] = load(x[j]);
            for (int64_t j = pixels; j < columns.padded_pixels; ++j) line[j] = 0;
          }
        const A* const x = in_place ? reinterpret_cast<const A*>(p.x.plane(piece, c)) : lines;
        for (int64_t o = 0; o < outputs;) {
          const int64_t sources = outputs - o < dilated_sources ? 1 : dilated_sources;
          for (int64_t column = 0; column < 3; ++column) {
            const CorrelationTile<A> tile = {count,
                                             vectors,
                                             copies + o * count * 3 * columns.copy + column * columns.copy,
                                             count * 3 * columns.copy,
                                             3 * columns.copy,
                                             columns.row(0),
                                             columns.row(1) - columns.row(0),
                                             x,
                                             in_place ? p.x.inner : count * columns.padded_pixels,
                                             in_place ? p.x.stride : columns.padded_pixels,
                                             sums + (o * 9 + column * 3) * width + c,
                                             9 * width,
                                             width,
                                             {begins[0], begins[1], begins[2]},
                                             {ends[0], ends[1], ends[2]},
                                             first_whole,
                                             last_whole};
            if (sources == 1)
              correlation_tile<1>(tile);
            else
              correlation_tile<dilated_sources>(tile);
          }
          o += sources;
        }
      }
    }
  }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
