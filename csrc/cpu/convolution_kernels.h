// Convolutions between signals and codes for every geometry, at one instruction set level (math.md section 4).
//
//   analysis     codes  = epilogue(alpha A_W(signal) + bias + residual)
//   synthesis    signal += alpha S_W(codes)
//   correlation  dW     = corr(signal, codes)
//
// Analysis gathers the patches of a block of code pixels, one row a tap, and multiplies them with the weights in tiles
// that stay in registers; all that strides, padding and dilation mean happens in the gather. Synthesis and correlation
// go from the code: the non-zeros of a pixel are listed, and each costs one product with a patch, so both take time in
// proportion to the non-zeros.
#pragma once

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
constexpr int64_t vector_tile_atoms = 8;  // 8 x 3 accumulators of the 32 registers
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
constexpr int64_t vector_tile_atoms = 4;  // 4 x 3 accumulators of the 16 registers
#else
constexpr int64_t vector_bytes = 16;
constexpr int64_t vector_tile_atoms = 4;
#endif

template <typename A>
struct Vector {
  // Unaligned and allowed to alias: it is loaded from anywhere in an array of A.
  typedef A type __attribute__((vector_size(vector_bytes), aligned(sizeof(A)), may_alias));
  static constexpr int64_t lanes = vector_bytes / sizeof(A);
};

template <typename A>
struct Tile {
  static constexpr int64_t atoms = vector_tile_atoms;
  static constexpr int64_t vectors = 3;
  static constexpr int64_t pixels = vectors * Vector<A>::lanes;
  static constexpr int64_t pixels_per_task = 2 * pixels;
};

// --- analysis -------------------------------------------------------------------------------------------------------

template <typename T>
int64_t analysis_scratch(const Geometry& g) {
  using A = accumulate_t<T>;
  return (g.patch() * Tile<A>::pixels_per_task + Tile<A>::atoms * Tile<A>::pixels) * sizeof(A);
}

// One row of the patch matrix: the signal under tap (kh, kw) of one channel, for code pixels [first, last) in row
// order.
template <typename A>
DSC_HOST_DEVICE void gather_tap(const Geometry& g, const A* channel, int64_t kh, int64_t kw, int64_t first,
                                int64_t last, A* out) {
  int64_t row = first / g.code_w, column = first % g.code_w;
  const int64_t shift = kw * g.dilation_w - g.padding_w;
  while (first < last) {
    const int64_t count = last - first < g.code_w - column ? last - first : g.code_w - column;
    const int64_t h = row * g.stride_h - g.padding_h + kh * g.dilation_h;
    // Columns [from, to) of this run lie inside the signal.
    int64_t from = 0, to = 0;
    if (h >= 0 && h < g.signal_h) {
      const int64_t start = column * g.stride_w + shift;  // signal column of the run's first pixel
      from = start >= 0 ? 0 : (-start + g.stride_w - 1) / g.stride_w;
      to = start >= g.signal_w ? 0 : (g.signal_w - start + g.stride_w - 1) / g.stride_w;
      to = to < count ? to : count;
      from = from < to ? from : to;
      const A* const source = channel + h * g.signal_w + start;
      if (g.stride_w == 1)
        for (int64_t i = from; i < to; ++i) out[i] = source[i];
      else
        for (int64_t i = from; i < to; ++i) out[i] = source[i * g.stride_w];
    }
    for (int64_t i = 0; i < from; ++i) out[i] = A(0);
    for (int64_t i = to; i < count; ++i) out[i] = A(0);
    out += count;
    first += count;
    column = 0;
    ++row;
  }
}

template <typename A>
DSC_HOST_DEVICE void gather_patches(const Geometry& g, const A* group_signal, int64_t first, int64_t last, A* patches) {
  constexpr int64_t width = Tile<A>::pixels_per_task;
  for (int64_t c = 0; c < g.group_signal_channels(); ++c)
    for (int64_t kh = 0; kh < g.kernel_h; ++kh)
      for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
        gather_tap(g, group_signal + c * g.signal_pixels(), kh, kw, first, last, patches);
        for (int64_t i = last - first; i < width; ++i) patches[i] = A(0);
        patches += width;
      }
}

// out[atom][pixel] = sum over taps of weight[tap][atom] patches[tap][pixel].
template <typename A>
DSC_HOST_DEVICE void multiply_tile(const A* weight, const A* patches, int64_t taps, A* out) {
  using V = typename Vector<A>::type;
  constexpr int64_t atoms = Tile<A>::atoms, vectors = Tile<A>::vectors, lanes = Vector<A>::lanes;
  V sum[atoms][vectors] = {};
  for (int64_t tap = 0; tap < taps; ++tap) {
    const V* const row = reinterpret_cast<const V*>(patches + tap * Tile<A>::pixels_per_task);
    V pixel[vectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) pixel[v] = row[v];
#pragma GCC unroll 8
    for (int64_t m = 0; m < atoms; ++m)
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) sum[m][v] += weight[tap * atoms + m] * pixel[v];
  }
  for (int64_t m = 0; m < atoms; ++m)
    for (int64_t v = 0; v < vectors; ++v) *reinterpret_cast<V*>(out + (m * vectors + v) * lanes) = sum[m][v];
}

// Finishes `count` pixels of one atom; `offset` is where they stand in the codes. `full`: count is that of a whole
// tile, known to the compiler, so that the loops need no remainder.
template <bool full, typename T>
DSC_HOST_DEVICE void finish_atom(const Analysis<T>& p, const accumulate_t<T>* sum, int64_t atom, int64_t offset,
                                 int64_t count) {
  using A = accumulate_t<T>;
  if (full) count = Tile<A>::pixels;
  const A bias = p.bias ? p.bias[atom] : A(0);
  const A theta = p.theta ? p.theta[atom * p.theta_stride] : A(0);
  T* const codes = p.codes + offset;
  A u[Tile<A>::pixels];
  for (int64_t i = 0; i < count; ++i) u[i] = p.alpha * sum[i] + bias;
  if (p.residual)
    for (int64_t i = 0; i < count; ++i) u[i] += load(p.residual[offset + i]);
  if (p.epilogue == Epilogue::soft_threshold)
    for (int64_t i = 0; i < count; ++i) u[i] = soft_threshold<false>(u[i], theta);
  if (p.epilogue == Epilogue::soft_threshold_one_sided)
    for (int64_t i = 0; i < count; ++i) u[i] = soft_threshold<true>(u[i], theta);
  for (int64_t i = 0; i < count; ++i) codes[i] = store<T>(u[i]);
}

template <typename T>
void analysis_tasks(const Analysis<T>& p, int64_t begin, int64_t end, char* scratch) {
  using A = accumulate_t<T>;
  using Tile = Tile<A>;
  const Geometry& g = p.geometry;
  const int64_t pixels = g.code_pixels(), blocks = (pixels + Tile::pixels_per_task - 1) / Tile::pixels_per_task;
  const int64_t group_atoms = g.group_code_channels(), tiles = (group_atoms + Tile::atoms - 1) / Tile::atoms;
  A* const patches = reinterpret_cast<A*>(scratch);
  A* const sums = patches + g.patch() * Tile::pixels_per_task;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task % blocks, group = task / blocks % g.groups, n = task / blocks / g.groups;
    const int64_t first = block * Tile::pixels_per_task;
    const int64_t last = first + Tile::pixels_per_task < pixels ? first + Tile::pixels_per_task : pixels;
    const int64_t channel = n * g.signal_channels + group * g.group_signal_channels();
    gather_patches(g, p.signal + channel * g.signal_pixels(), first, last, patches);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const A* const weight = p.weight + (group * tiles + tile) * g.patch() * Tile::atoms;
      const int64_t atoms =
          group_atoms - tile * Tile::atoms < Tile::atoms ? group_atoms - tile * Tile::atoms : Tile::atoms;
      for (int64_t pixel = first; pixel < last; pixel += Tile::pixels) {
        const int64_t count = last - pixel < Tile::pixels ? last - pixel : Tile::pixels;
        multiply_tile(weight, patches + (pixel - first), g.patch(), sums);
        for (int64_t m = 0; m < atoms; ++m) {
          const int64_t atom = group * group_atoms + tile * Tile::atoms + m;
          const int64_t offset = (n * g.code_channels + atom) * pixels + pixel;
          if (count == Tile::pixels)
            finish_atom<true>(p, sums + m * Tile::pixels, atom, offset, count);
          else
            finish_atom<false>(p, sums + m * Tile::pixels, atom, offset, count);
        }
      }
    }
  }
}

// --- from the code: lists of non-zeros ------------------------------------------------------------------------------

constexpr int64_t list_pixels = 32;  // neighbours in a row whose non-zeros are listed together

// The non-zeros of up to list_pixels code pixels, in rising order of atoms within the group.
template <typename A>
struct PixelLists {
  A* values;       // [list_pixels][group atoms]
  int32_t* atoms;  // likewise
  int32_t counts[list_pixels];
};

template <typename T>
int64_t pixel_list_scratch(const Geometry& g) {
  using A = accumulate_t<T>;
  const int64_t patch = padded(g.patch(), Vector<A>::lanes);
  return (list_pixels * g.group_code_channels() + patch) * sizeof(A) +
         list_pixels * g.group_code_channels() * sizeof(int32_t);
}

template <typename A>
DSC_HOST_DEVICE PixelLists<A> make_lists(const Geometry& g, char* scratch, A** patch) {
  *patch = reinterpret_cast<A*>(scratch);
  PixelLists<A> lists;
  lists.values = *patch + padded(g.patch(), Vector<A>::lanes);
  lists.atoms = reinterpret_cast<int32_t*>(lists.values + list_pixels * g.group_code_channels());
  return lists;
}

// `codes` points at the first pixel, in the group's first atom. One vector comparison tells eight pixels' non-zeros;
// only those are visited one by one.
template <typename T>
DSC_HOST_DEVICE void list_nonzeros(const Geometry& g, const T* codes, int64_t count,
                                   PixelLists<accumulate_t<T>>& lists) {
  using A = accumulate_t<T>;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lowest byte of a word is its first");
  const int64_t width = g.group_code_channels();
  for (int64_t i = 0; i < count; ++i) lists.counts[i] = 0;
  for (int64_t m = 0; m < width; ++m) {
    const T* const row = codes + m * g.code_pixels();
    uint8_t nonzero[list_pixels] = {};
    for (int64_t i = 0; i < count; ++i) nonzero[i] = load(row[i]) != A(0);
    for (int64_t start = 0; start < count; start += 8) {
      uint64_t word;
      memcpy(&word, nonzero + start, 8);
      for (; word; word &= word - 1) {
        const int64_t i = start + __builtin_ctzll(word) / 8;
        const int64_t slot = i * width + lists.counts[i]++;
        lists.values[slot] = load(row[i]);
        lists.atoms[slot] = static_cast<int32_t>(m);
      }
    }
  }
}

// patch[j] = sum over the pixel's non-zeros of value * weight[atom][j], `vectors` vectors of it at a time.
template <int vectors, typename A>
DSC_HOST_DEVICE void add_atoms(const A* weight, int64_t stride, const A* values, const int32_t* atoms, int64_t count,
                               A* patch) {
  using V = typename Vector<A>::type;
  V sum[vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const V* const row = reinterpret_cast<const V*>(weight + atoms[i] * stride);
    const A value = values[i];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] += value * row[v];
  }
  for (int v = 0; v < vectors; ++v) *reinterpret_cast<V*>(patch + v * Vector<A>::lanes) = sum[v];
}

template <typename A>
DSC_HOST_DEVICE void synthesize_patch(const A* weight, int64_t stride, const A* values, const int32_t* atoms,
                                      int64_t count, A* patch) {
  constexpr int64_t lanes = Vector<A>::lanes;
  int64_t j = 0;
  for (; j + 8 * lanes <= stride; j += 8 * lanes) add_atoms<8>(weight + j, stride, values, atoms, count, patch + j);
  for (; j + 4 * lanes <= stride; j += 4 * lanes) add_atoms<4>(weight + j, stride, values, atoms, count, patch + j);
  for (; j < stride; j += lanes) add_atoms<1>(weight + j, stride, values, atoms, count, patch + j);
}

// Calls body(signal offset from the group's first channel, first tap of the row, from, to) for each row of taps of the
// code pixel (h, w) that meets the signal; taps [from, to) of that row lie inside it.
template <typename Body>
DSC_HOST_DEVICE void for_each_tap_row(const Geometry& g, int64_t h, int64_t w, const Body& body) {
  const int64_t left = w * g.stride_w - g.padding_w, top = h * g.stride_h - g.padding_h;
  const int64_t from = left >= 0 ? 0 : (-left + g.dilation_w - 1) / g.dilation_w;
  int64_t to = left >= g.signal_w ? 0 : (g.signal_w - left + g.dilation_w - 1) / g.dilation_w;
  to = to < g.kernel_w ? to : g.kernel_w;
  if (from >= to) return;
  for (int64_t c = 0; c < g.group_signal_channels(); ++c)
    for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
      const int64_t row = top + kh * g.dilation_h;
      if (row >= 0 && row < g.signal_h)
        body((c * g.signal_h + row) * g.signal_w + left, (c * g.kernel_h + kh) * g.kernel_w, from, to);
    }
}

// --- synthesis ------------------------------------------------------------------------------------------------------

template <typename T>
void synthesis_tasks(const Synthesis<T>& p, int64_t begin, int64_t end, char* scratch) {
  using A = accumulate_t<T>;
  const Geometry& g = p.geometry;
  const int64_t stride = padded(g.patch(), Vector<A>::lanes), group_atoms = g.group_code_channels();
  const bool by_rows = g.code_h > 1;
  A* patch;
  PixelLists<A> lists = make_lists<A>(g, scratch, &patch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t strip = 2 * (task % p.strips) + p.parity;
    const int64_t group = task / p.strips % g.groups, n = task / p.strips / g.groups;
    const int64_t extent = by_rows ? g.code_h : g.code_w, first = strip * p.strip_extent;
    const int64_t last = first + p.strip_extent < extent ? first + p.strip_extent : extent;
    const int64_t row_from = by_rows ? first : 0, row_to = by_rows ? last : 1;
    const int64_t column_from = by_rows ? 0 : first, column_to = by_rows ? g.code_w : last;
    const T* const codes = p.codes + (n * g.code_channels + group * group_atoms) * g.code_pixels();
    A* const signal = p.signal + (n * g.signal_channels + group * g.group_signal_channels()) * g.signal_pixels();
    const A* const weight = p.weight + group * group_atoms * stride;
    for (int64_t h = row_from; h < row_to; ++h)
      for (int64_t start = column_from; start < column_to; start += list_pixels) {
        const int64_t count = column_to - start < list_pixels ? column_to - start : list_pixels;
        list_nonzeros(g, codes + h * g.code_w + start, count, lists);
        for (int64_t i = 0; i < count; ++i) {
          if (lists.counts[i] == 0) continue;
          synthesize_patch(weight, stride, lists.values + i * group_atoms, lists.atoms + i * group_atoms,
                           lists.counts[i], patch);
          for_each_tap_row(g, h, start + i, [&](int64_t offset, int64_t tap, int64_t from, int64_t to) {
            for (int64_t kw = from; kw < to; ++kw) signal[offset + kw * g.dilation_w] += p.alpha * patch[tap + kw];
          });
        }
      }
  }
}

// --- correlation ----------------------------------------------------------------------------------------------------

// A task is an equal share of the units: runs of list_pixels code pixels in one row of one image.
template <typename T>
void correlation_tasks(const Correlation<T>& p, int64_t begin, int64_t end, char* scratch) {
  using A = accumulate_t<T>;
  using V = typename Vector<A>::type;
  constexpr int64_t lanes = Vector<A>::lanes;
  const Geometry& g = p.geometry;
  const int64_t stride = padded(g.patch(), lanes), group_atoms = g.group_code_channels();
  const int64_t runs = (g.code_w + list_pixels - 1) / list_pixels, units = g.batch * g.code_h * runs;
  A* patch;
  PixelLists<A> lists = make_lists<A>(g, scratch, &patch);
  for (int64_t task = begin; task < end; ++task) {
    A* const partial = p.partial + task * g.code_channels * stride;
    for (int64_t i = 0; i < g.code_channels * stride; ++i) partial[i] = A(0);
    for (int64_t unit = units * task / p.tasks; unit < units * (task + 1) / p.tasks; ++unit) {
      const int64_t start = unit % runs * list_pixels, h = unit / runs % g.code_h, n = unit / runs / g.code_h;
      const int64_t count = g.code_w - start < list_pixels ? g.code_w - start : list_pixels;
      for (int64_t group = 0; group < g.groups; ++group) {
        const int64_t atom = n * g.code_channels + group * group_atoms;
        const int64_t channel = n * g.signal_channels + group * g.group_signal_channels();
        const A* const signal = p.signal + channel * g.signal_pixels();
        list_nonzeros(g, p.codes + atom * g.code_pixels() + h * g.code_w + start, count, lists);
        for (int64_t i = 0; i < count; ++i) {
          if (lists.counts[i] == 0) continue;
          for (int64_t j = 0; j < stride; ++j) patch[j] = A(0);
          for_each_tap_row(g, h, start + i, [&](int64_t offset, int64_t tap, int64_t from, int64_t to) {
            for (int64_t kw = from; kw < to; ++kw) patch[tap + kw] = signal[offset + kw * g.dilation_w];
          });
          for (int64_t k = 0; k < lists.counts[i]; ++k) {
            const A value = lists.values[i * group_atoms + k];
            A* const row = partial + (group * group_atoms + lists.atoms[i * group_atoms + k]) * stride;
            for (int64_t j = 0; j < stride; j += lanes)
              *reinterpret_cast<V*>(row + j) += value * *reinterpret_cast<const V*>(patch + j);
          }
        }
      }
    }
  }
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
