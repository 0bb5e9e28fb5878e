// 3x3 convolutions with padding 1 by Winograd's minimal filtering F(2x2, 3x3), and their gradient: 16 multiplications
// for each pair of channels and 2 x 2 pixels, where the definition has 36. Channels come last, and fill vectors.
//
//   convolution  Y = A^T [(G w G^T) * (B^T x B)] A    x the 4 x 4 pixels around a tile, Y its 2 x 2, * by point
//   correlation  g = G^T [(B^T x B) * (A z A^T)] G    the same form, with respect to w
//
//   B^T = 1  0 -1  0    G = 1    0    0    A^T = 1 1  1  0
//         0  1  1  0       1/2  1/2  1/2         0 1 -1 -1
//         0 -1  1  0       1/2 -1/2  1/2
//         0  1  0 -1        0    0    1
//
// At each of the 16 points the channels of some tiles are a matrix, which is multiplied by the filters', or by the
// other side's: few tiles, so that what is transformed and what is made of it stay in the cache that also has the
// filters. Source: Lavin, Gray (CVPR 2016).
#pragma once

#include "vectors.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int winograd_rows = 12;  // tiles of a register tile, with 2 vectors of outputs
constexpr int winograd_inputs = 8;
#else
constexpr int winograd_rows = 6;
constexpr int winograd_inputs = 4;
#endif
constexpr int64_t winograd_long_chunk = 48;  // tiles whose products are added up in registers
static_assert(winograd_tiles % winograd_rows == 0 && winograd_channels % (2 * winograd_inputs) == 0);

template <typename A>
DSC_HOST_DEVICE Lanes<A>& vector_of(A* values) {
  return *reinterpret_cast<Lanes<A>*>(values);
}
template <typename A>
DSC_HOST_DEVICE const Lanes<A>& vector_of(const A* values) {
  return *reinterpret_cast<const Lanes<A>*>(values);
}

// Where a tile is; tiles follow each other along rows.
struct TilePlace {
  const Tiling& tiling;
  int64_t column, row, image;

  TilePlace(const Tiling& tiling_, int64_t tile)
      : tiling(tiling_),
        column(tile % tiling.columns()),
        row(tile / tiling.columns() % tiling.rows()),
        image(tile / tiling.columns() / tiling.rows()) {}
  int64_t first_value() const {
    return ((image * tiling.height + 2 * row) * tiling.width + 2 * column) * tiling.channels;
  }
  bool has_right() const { return 2 * column + 1 < tiling.width; }
  bool has_below() const { return 2 * row + 1 < tiling.height; }
  void next() {
    if (++column < tiling.columns()) return;
    column = 0;
    if (++row < tiling.rows()) return;
    row = 0;
    ++image;
  }
};

// out[point][tile][channel] = B^T x B of `count` tiles; zeros has a pixel of zeros. Points are `room` tiles apart.
template <typename A>
void winograd_around(const Tiling& tiling, const A* x, const A* zeros, int64_t first, int64_t count, int64_t room,
                     A* out) {
  const int64_t channels = tiling.channels, line = tiling.width * channels, point = room * channels;
  TilePlace place(tiling, first);
  for (int64_t t = 0; t < count; ++t, place.next(), out += channels) {
    const A* from[4][4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t h = 2 * place.row + i - 1;
      const A* const middle = x + place.first_value() + (i - 1) * line;
      const bool there = h >= 0 && h < tiling.height;
      from[i][0] = there && place.column > 0 ? middle - channels : zeros;
      from[i][1] = there ? middle : zeros;
      from[i][2] = there && place.has_right() ? middle + channels : zeros;
      from[i][3] = there && 2 * place.column + 2 < tiling.width ? middle + 2 * channels : zeros;
    }
    for (int64_t c = 0; c < channels; c += Vector<A>::lanes) {
      Lanes<A> d[4][4];
      for (int j = 0; j < 4; ++j) {
        const Lanes<A> x0 = vector_of(from[0][j] + c), x1 = vector_of(from[1][j] + c);
        const Lanes<A> x2 = vector_of(from[2][j] + c), x3 = vector_of(from[3][j] + c);
        d[0][j] = x0 - x2;
        d[1][j] = x1 + x2;
        d[2][j] = x2 - x1;
        d[3][j] = x1 - x3;
      }
      for (int i = 0; i < 4; ++i) {
        A* const to = out + c + 4 * i * point;
        vector_of(to) = d[i][0] - d[i][2];
        vector_of(to + point) = d[i][1] + d[i][2];
        vector_of(to + 2 * point) = d[i][2] - d[i][1];
        vector_of(to + 3 * point) = d[i][1] - d[i][3];
      }
    }
  }
}

// out[point][tile][channel] = A z A^T.
template <typename A>
void winograd_spread(const Tiling& tiling, const A* z, const A* zeros, int64_t first, int64_t count, int64_t room,
                     A* out) {
  const int64_t channels = tiling.channels, line = tiling.width * channels, point = room * channels;
  TilePlace place(tiling, first);
  for (int64_t t = 0; t < count; ++t, place.next(), out += channels) {
    const A* const upper = z + place.first_value();
    const A* const lower = place.has_below() ? upper + line : zeros;
    const int64_t right = place.has_right() ? channels : 0;
    const A* const from[2][2] = {{upper, right ? upper + right : zeros},
                                 {lower, right && place.has_below() ? lower + right : zeros}};
    for (int64_t c = 0; c < channels; c += Vector<A>::lanes) {
      Lanes<A> d[4][2];
      for (int j = 0; j < 2; ++j) {
        const Lanes<A> z0 = vector_of(from[0][j] + c), z1 = vector_of(from[1][j] + c);
        d[0][j] = z0;
        d[1][j] = z0 + z1;
        d[2][j] = z0 - z1;
        d[3][j] = -z1;
      }
      for (int i = 0; i < 4; ++i) {
        A* const to = out + c + 4 * i * point;
        vector_of(to) = d[i][0];
        vector_of(to + point) = d[i][0] + d[i][1];
        vector_of(to + 2 * point) = d[i][0] - d[i][1];
        vector_of(to + 3 * point) = -d[i][1];
      }
    }
  }
}

// --- filters ---------------------------------------------------------------------------------------------------------

template <typename A>
void winograd_filters(const WinogradFilters<A>& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t point = p.channels * p.channels;
  for (int64_t input = begin; input < end; ++input)
    for (int64_t output = 0; output < p.channels; output += lanes) {
      A taps[9][lanes];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const A* const from = p.weight + input * p.weight_input + (p.backward ? 8 - tap : tap);
        for (int64_t lane = 0; lane < lanes; ++lane) taps[tap][lane] = from[(output + lane) * p.weight_output];
      }
      Lanes<A> d[4][3];
      for (int j = 0; j < 3; ++j) {
        const Lanes<A> w0 = vector_of(taps[j]), w1 = vector_of(taps[3 + j]), w2 = vector_of(taps[6 + j]);
        d[0][j] = w0;
        d[1][j] = (w0 + w1 + w2) * A(0.5);
        d[2][j] = (w0 - w1 + w2) * A(0.5);
        d[3][j] = w2;
      }
      for (int i = 0; i < 4; ++i) {
        A* const to = p.filters + 4 * i * point + input * p.channels + output;
        vector_of(to) = d[i][0];
        vector_of(to + point) = (d[i][0] + d[i][1] + d[i][2]) * A(0.5);
        vector_of(to + 2 * point) = (d[i][0] - d[i][1] + d[i][2]) * A(0.5);
        vector_of(to + 3 * point) = d[i][2];
      }
    }
}

// --- convolution -----------------------------------------------------------------------------------------------------

// products[tile][output] = sum over inputs of x[tile][input] filters[input][output], for `vectors` vectors of outputs.
template <int vectors, typename A>
void winograd_products(int64_t channels, const A* x, const A* filters, A* products) {
  constexpr int64_t lanes = Vector<A>::lanes;
  Lanes<A> sums[winograd_rows][vectors] = {};
  for (int64_t c = 0; c < channels; ++c, filters += channels) {
    Lanes<A> w[vectors];
    for (int v = 0; v < vectors; ++v) w[v] = vector_of(filters + v * lanes);
    for (int t = 0; t < winograd_rows; ++t)
      for (int v = 0; v < vectors; ++v) sums[t][v] += w[v] * x[t * channels + c];
  }
  for (int t = 0; t < winograd_rows; ++t)
    for (int v = 0; v < vectors; ++v) vector_of(products + t * channels + v * lanes) = sums[t][v];
}

template <typename A>
int64_t winograd_convolution_scratch(const WinogradConvolution<A>& p) {
  return (2 * 16 * winograd_tiles + 1) * p.tiling.channels * static_cast<int64_t>(sizeof(A));
}

template <typename A>
void winograd_convolution(const WinogradConvolution<A>& p, int64_t begin, int64_t end, char* scratch) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const Tiling& tiling = p.tiling;
  const int64_t channels = tiling.channels, point = winograd_tiles * channels;
  A* const around = reinterpret_cast<A*>(scratch);
  A* const products = around + 16 * point;
  A* const zeros = products + 16 * point;
  memset(around, 0, 16 * point * sizeof(A));  // the last task may have fewer tiles
  memset(zeros, 0, channels * sizeof(A));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * winograd_tiles, left = tiling.tiles() - first;
    const int64_t count = left < winograd_tiles ? left : winograd_tiles;
    winograd_around(tiling, p.x, zeros, first, count, winograd_tiles, around);
    for (int64_t k = 0; k < 16; ++k) {
      const A* const x = around + k * point;
      const A* const filters = p.filters + k * channels * channels;
      A* const to = products + k * point;
      for (int64_t o = 0; o < channels;) {
        const bool two = o + 2 * lanes <= channels;
        for (int64_t t = 0; t < winograd_tiles * channels; t += winograd_rows * channels)
          if (two)
            winograd_products<2>(channels, x + t, filters + o, to + t + o);
          else
            winograd_products<1>(channels, x + t, filters + o, to + t + o);
        o += two ? 2 * lanes : lanes;
      }
    }
    TilePlace place(tiling, first);
    for (int64_t t = 0; t < count; ++t, place.next()) {
      const int64_t at = place.first_value();
      for (int64_t c = 0; c < channels; c += lanes) {
        const A* const from = products + t * channels + c;
        Lanes<A> s[2][4];
        for (int j = 0; j < 4; ++j) {
          const Lanes<A> m0 = vector_of(from + j * point), m1 = vector_of(from + (4 + j) * point);
          const Lanes<A> m2 = vector_of(from + (8 + j) * point), m3 = vector_of(from + (12 + j) * point);
          s[0][j] = m0 + m1 + m2;
          s[1][j] = m1 - m2 - m3;
        }
        const auto put = [&](int64_t value, const Lanes<A>& sum) {
          const Lanes<A> of_base = p.base ? vector_of(p.base + value) : Lanes<A>{};
          vector_of(p.out + value) = of_base + p.factor * sum;
        };
        for (int i = 0; i < 2 && (i == 0 || place.has_below()); ++i) {
          const int64_t value = at + i * tiling.width * channels + c;
          put(value, s[i][0] + s[i][1] + s[i][2]);
          if (place.has_right()) put(value + channels, s[i][1] - s[i][2] - s[i][3]);
        }
      }
    }
  }
}

// --- correlation -----------------------------------------------------------------------------------------------------

// sums[c][o] += sum over tiles of x[tile][c] z[tile][o].
template <int inputs, int vectors, typename A>
void winograd_outer(int64_t count, int64_t channels, const A* x, const A* z, A* sums) {
  constexpr int64_t lanes = Vector<A>::lanes;
  Lanes<A> total[inputs][vectors];
  for (int c = 0; c < inputs; ++c)
    for (int v = 0; v < vectors; ++v) total[c][v] = vector_of(sums + c * channels + v * lanes);
  for (int64_t t = 0; t < count; ++t, x += channels, z += channels) {
    Lanes<A> w[vectors];
    for (int v = 0; v < vectors; ++v) w[v] = vector_of(z + v * lanes);
    for (int c = 0; c < inputs; ++c)
      for (int v = 0; v < vectors; ++v) total[c][v] += w[v] * x[c];
  }
  for (int c = 0; c < inputs; ++c)
    for (int v = 0; v < vectors; ++v) vector_of(sums + c * channels + v * lanes) = total[c][v];
}

template <typename A>
int64_t winograd_correlation_scratch(const WinogradCorrelation<A>& p) {
  return (2 * 16 * winograd_long_chunk + 1) * p.tiling.channels * static_cast<int64_t>(sizeof(A));
}

template <typename A>
void winograd_correlation(const WinogradCorrelation<A>& p, int64_t begin, int64_t end, char* scratch) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t channels = p.tiling.channels, point = winograd_long_chunk * channels, square = channels * channels;
  A* const around = reinterpret_cast<A*>(scratch);
  A* const spread = around + 16 * point;
  A* const zeros = spread + 16 * point;
  memset(zeros, 0, channels * sizeof(A));
  for (int64_t share = begin; share < end; ++share) {
    A* const sums = p.sums + share * 16 * square;
    memset(sums, 0, 16 * square * sizeof(A));
    const int64_t last = p.tiling.tiles() * (share + 1) / p.shares;
    for (int64_t first = p.tiling.tiles() * share / p.shares; first < last; first += winograd_long_chunk) {
      const int64_t count = last - first < winograd_long_chunk ? last - first : winograd_long_chunk;
      winograd_around(p.tiling, p.x, zeros, first, count, winograd_long_chunk, around);
      winograd_spread(p.tiling, p.z, zeros, first, count, winograd_long_chunk, spread);
      for (int64_t k = 0; k < 16; ++k)
        for (int64_t o = 0; o < channels;) {
          const A* const x = around + k * point;
          const A* const z = spread + k * point + o;
          A* const to = sums + k * square + o;
          const bool two = o + 2 * lanes <= channels;
          if (two)
            for (int64_t c = 0; c < channels; c += winograd_inputs)
              winograd_outer<winograd_inputs, 2>(count, channels, x + c, z, to + c * channels);
          else
            for (int64_t c = 0; c < channels; c += 2 * winograd_inputs)
              winograd_outer<2 * winograd_inputs, 1>(count, channels, x + c, z, to + c * channels);
          o += two ? 2 * lanes : lanes;
        }
    }
  }
}

template <typename A>
void winograd_gradient(const WinogradGradient<A>& p, int64_t begin, int64_t end) {
  constexpr int64_t lanes = Vector<A>::lanes;
  const int64_t channels = p.channels, square = channels * channels;
  for (int64_t input = begin; input < end; ++input)
    for (int64_t output = 0; output < channels; output += lanes) {
      Lanes<A> d[3][4];
      for (int j = 0; j < 4; ++j) {
        Lanes<A> u[4] = {};
        for (int64_t share = 0; share < p.shares; ++share)
          for (int i = 0; i < 4; ++i)
            u[i] += vector_of(p.sums + (16 * share + 4 * i + j) * square + input * channels + output);
        const Lanes<A> half = (u[1] + u[2]) * A(0.5);
        d[0][j] = u[0] + half;
        d[1][j] = (u[1] - u[2]) * A(0.5);
        d[2][j] = half + u[3];
      }
      for (int i = 0; i < 3; ++i) {
        const Lanes<A> half = (d[i][1] + d[i][2]) * A(0.5);
        const Lanes<A> taps[3] = {d[i][0] + half, (d[i][1] - d[i][2]) * A(0.5), half + d[i][3]};
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int j = 0; j < 3; ++j) p.gradient[((output + lane) * channels + input) * 9 + 3 * i + j] = taps[j][lane];
      }
    }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
