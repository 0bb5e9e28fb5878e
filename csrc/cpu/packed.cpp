#include "packed.h"

#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>

namespace dsc::cpu {
namespace {

// Enough units for as many threads, as long as each has so many multiplications to do and so many pixels.
constexpr int64_t most_units = 32, least_products = int64_t{1} << 21, least_pixels = 2 * block_pixels;

// So many units of whole images are enough for threads, and little enough for memory: a slice has no more of them, and
// fewer images than that are cut into strips.
constexpr int64_t slice_units = 16;

// A table of atoms and its gradient, chunk by chunk, are to stay in the first-level cache, beside some other memory.
constexpr int64_t least_cache = 32 * 1024, beside_tables = 4 * 1024;

int64_t nearest_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);  // 0 or less where the system does not know it
  return std::clamp<int64_t>(bytes, least_cache, 4 * least_cache);
#else
  return least_cache;
#endif
}

// Two values of bfloat16, the first one in the lower half.
template <typename A>
A pair_of(A first, A second) {
  return static_cast<A>(bit_cast<float>(static_cast<uint32_t>(store<bfloat16>(static_cast<float>(second)).bits) << 16 |
                                        store<bfloat16>(static_cast<float>(first)).bits));
}

// Pixels that are worth a thread's while.
int64_t pixels_of_unit(const Geometry& g) {
  const int64_t products = g.patch() * g.group_code_channels();
  return std::max(least_pixels, least_products / std::max<int64_t>(1, products));
}

// Whether there are few enough images, and large enough ones, to cut them into strips.
bool cuts_images(const Geometry& g) {
  return g.batch * g.groups < slice_units && g.code_pixels() >= 2 * pixels_of_unit(g);
}

int64_t images_for_pixels(const Geometry& g) {
  const int64_t unit = pixels_of_unit(g), pixels = std::max<int64_t>(1, g.code_pixels());
  return (unit + pixels - 1) / pixels;
}

// A signal of one axis turned so that it lies along h.
Geometry turned(Geometry g) {
  if (g.signal_h == 1 && g.kernel_h == 1 && g.code_h == 1 && g.padding_h == 0) {
    std::swap(g.signal_h, g.signal_w);
    std::swap(g.code_h, g.code_w);
    std::swap(g.kernel_h, g.kernel_w);
    std::swap(g.stride_h, g.stride_w);
    std::swap(g.padding_h, g.padding_w);
    std::swap(g.dilation_h, g.dilation_w);
  }
  return g;
}

}  // namespace

int64_t strips_of_image(const Geometry& geometry) {
  const Geometry g = turned(geometry);
  if (!cuts_images(g)) return 1;
  const int64_t units = most_units / std::max<int64_t>(1, g.batch * g.groups);
  const int64_t strips = std::min({units, g.code_pixels() / pixels_of_unit(g), g.code_h});
  const int64_t rows = (g.code_h + strips - 1) / strips;
  return (g.code_h + rows - 1) / rows;
}

int64_t images_of_slice(const Geometry& g) {
  return std::max<int64_t>(1, (slice_units + g.groups - 1) / g.groups * images_for_pixels(g));
}

int64_t images_of_unit(const Geometry& g) {
  const int64_t images = std::max((g.batch * g.groups + most_units - 1) / most_units, images_for_pixels(g));
  return cuts_images(g) || slice_units * images > g.batch + images - 1 ? 0 : images;
}

Plan::Plan(const Geometry& geometry, const KernelSizes& kernel, int64_t value_size, int64_t strips)
    : g(turned(geometry)) {
  const int64_t vector = kernel.lanes, chunk_vectors = kernel.chunk_vectors, window_vectors = kernel.window_vectors;
  const int64_t channels = g.group_signal_channels();
  group_pixels = g.batch * g.code_pixels();
  group_signal = g.batch * channels * g.signal_pixels();
  make_units(strips);

  plane_w = (g.code_w - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1;
  column = plane_h * channels;
  if (column * value_size % 2048 == 0) column += vector;  // columns of neighbours are not to share cache sets
  plane_image = plane_w * column;

  const bool rows_touch = g.dilation_h == 1;  // then a column of a patch is one run of values
  for (int64_t kw = 0; kw < g.kernel_w; ++kw)
    for (int64_t kh = 0; kh < (rows_touch ? 1 : g.kernel_h); ++kh)
      segment_.push_back(kw * g.dilation_w * column + kh * g.dilation_h * channels);
  for (int64_t kw = 0; kw < g.kernel_w; ++kw)
    for (int64_t kh = 0; kh < g.kernel_h; ++kh)
      for (int64_t c = 0; c < channels; ++c) tap.push_back((c * g.kernel_h + kh) * g.kernel_w + kw);

  // Each segment in vectors of its own, or all side by side in a copy.
  const int64_t segments = static_cast<int64_t>(segment_.size()), length = g.patch() / segments;
  const int64_t per_segment = (length + vector - 1) / vector, together = (g.patch() + vector - 1) / vector;
  // Bytes of each atom with which all atoms of a table and of its gradient stay in the cache. Where that is less than
  // this, too little work is done for a non-zero at a time: then atom by atom, with registers for two chunks.
  constexpr int64_t least_bytes = 128;
  const auto affordable_of = [&](int64_t cache) { return (cache - beside_tables) / (2 * g.group_code_channels()); };
  const int64_t vector_bytes = vector * value_size, affordable = affordable_of(least_cache);
  slides_ = affordable >= std::min(least_bytes, together * vector_bytes) && rows_touch && g.dilation_w == 1 &&
            2 * g.stride_w <= g.kernel_w && length < 2 * vector && together <= window_vectors;
  copied_ = slides_ || 4 * segments * per_segment > 5 * together;
  for (int64_t v = 0; v < (copied_ ? together : segments * per_segment); ++v) {
    vector_.push_back(copied_ ? v * vector : segment_[v / per_segment] + v % per_segment * vector);
    for (int64_t lane = 0; lane < vector; ++lane) {
      const int64_t i = copied_ ? v * vector + lane : v % per_segment * vector + lane;
      const int64_t j = copied_ ? i : v / per_segment * length + i;
      table_tap.push_back(i < (copied_ ? g.patch() : length) ? tap[j] : -1);
    }
  }
  stride = vectors() * vector;
  int64_t most_pixels = 0, images = 0;
  for (const Unit& unit : units) {
    most_pixels = std::max(most_pixels, unit.pixels);
    images = std::max(images, unit.images);
  }
  plane_size = padded(images * plane_image + 2 * vector, vector);
  choose_products(kernel, value_size, images > 1 ? g.code_h : most_pixels);
  for (int64_t p = 0; p < most_pixels; ++p) {
    const int64_t w = p % g.code_w, row = p / g.code_w, image_rows = images > 1 ? g.code_h : most_pixels;
    base.push_back(row / image_rows * plane_image + w * g.stride_w * column + row % image_rows * g.stride_h * channels);
  }

  by_atoms_ = affordable < std::min(least_bytes, vectors() * vector_bytes);
  const int64_t most = slides_ ? vectors()
                       : by_atoms_
                           ? chunk_vectors - 1
                           : std::clamp<int64_t>(affordable_of(nearest_cache()) / vector_bytes, 1, chunk_vectors);
  const int64_t chunks = (vectors() + most - 1) / most;
  for (int64_t c = 0; c < chunks; ++c) chunks_.push_back(vectors() * (c + 1) / chunks - vectors() * c / chunks);
}

void Plan::choose_products(const KernelSizes& kernel, int64_t value_size, int64_t signal_row) {
  products_ = TileProducts::taps;
  row_weights = g.patch();
  const int64_t channels = g.group_signal_channels(), width = padded(g.group_code_channels(), kernel.lanes);
  const int64_t length = g.kernel_h * channels, row_columns = (g.code_w - 1) * g.stride_w + g.kernel_w;
  const bool columns_touch = g.dilation_h == 1 && g.dilation_w == 1;
  // Pairs of taps where they save more products than it costs to copy the columns of a row first, 16 values at a time.
  constexpr int64_t products_per_copy = 192;
  if (kernel.pairs_per_range > 0 && columns_touch && g.stride_w <= g.kernel_w &&
      g.code_w * g.kernel_w * (length / 2) * width >= products_per_copy * row_columns * ((length + 15) / 16)) {
    products_ = TileProducts::pairs_of_taps;
    row_weights = g.patch() / length * ((length + 1) / 2);
    copies_ = padded((2 * block_pixels * vectors() + 2) * kernel.lanes * int64_t{2}, 64);
    return;
  }
  // Pairs of pixels go along a row of columns, or along a signal of one axis.
  const bool along_h = g.code_w == 1 && g.kernel_w == 1 && plane_w == 1;
  const int64_t taps = along_h ? g.kernel_h : g.kernel_w, step = along_h ? channels : column;  // columns of a patch
  PixelPairs p{};
  p.row = along_h ? signal_row : g.code_w;
  p.length = along_h ? channels : length;
  pair_stride = along_h ? g.stride_h : g.stride_w;
  p.step = pair_stride * step;
  std::vector<int64_t> threes, ones;  // the first column of each; columns a stride apart meet those of the neighbour
  for (int64_t phase = 0; phase < pair_stride; ++phase)
    for (int64_t column = phase; column < taps;) {
      const bool three = column + 2 * pair_stride < taps;
      (three ? threes : ones).push_back(column);
      column += (three ? 3 : 1) * pair_stride;
    }
  p.threes = static_cast<int64_t>(threes.size());
  p.ones = static_cast<int64_t>(ones.size());
  // Where that saves products, less what is lost in rows of odd length, against the planes that it takes.
  constexpr int64_t products_per_value = 12;
  const int64_t saved = p.row * taps - padded(p.row, 2) * (2 * p.threes + p.ones);
  if (!columns_touch || p.threes == 0 || saved * width < products_per_value * p.row * pair_stride) return;
  products_ = TileProducts::pairs_of_pixels;
  plane_size = padded(plane_size + 2 * p.step, kernel.lanes);
  const auto offset = [&](int64_t plane, int64_t columns) {
    pair_offset_.push_back(plane * plane_size + columns * step);
  };
  for (const int64_t column : threes) offset(2, column + pair_stride), offset(3, column + pair_stride);
  for (const int64_t column : threes) offset(1, column), offset(1, column + pair_stride);
  for (const int64_t column : ones) offset(0, column), offset(0, column + pair_stride);
  // All weights of a tile of atoms together if they are few; else in ranges.
  constexpr int64_t most_bytes = 64 * 1024;
  const int64_t tile = kernel.tile_vectors * kernel.lanes, weights = p.length * p.weights();
  const int64_t ranges = width == tile && weights * tile * value_size <= most_bytes
                             ? 1
                             : (4 * weights + 5 * kernel.taps_per_range - 1) / (5 * kernel.taps_per_range);
  p.range = (p.length + ranges - 1) / ranges;
  row_weights = weights;
  pair_columns.swap(threes);
  pair_columns.insert(pair_columns.end(), ones.begin(), ones.end());
  pairs_ = p;
}

void Plan::make_units(int64_t strips) {
  const int64_t pixels = g.code_pixels(), all = g.batch * g.groups;
  const int64_t images = strips > 1
                             ? 1
                             : std::clamp<int64_t>(std::max((all + most_units - 1) / most_units, images_for_pixels(g)),
                                                   1, std::max<int64_t>(1, g.batch));
  const int64_t rows = (g.code_h + strips - 1) / strips;
  plane_h = (rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
  blocks = 0;
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t image = 0; image < g.batch; image += images) {
      if (strips > 1) blocks = first_place((group * g.batch + image) * pixels);  // the same in any slice
      for (int64_t strip = 0; strip < strips; ++strip) {
        Unit unit{};
        const int64_t from = strip * rows, to = std::min(g.code_h, from + rows);
        unit.group = group;
        unit.image = image;
        unit.images = std::min(images, g.batch - image);
        unit.first = image * pixels + from * g.code_w;
        unit.pixels = unit.images > 1 ? unit.images * pixels : (to - from) * g.code_w;
        unit.block = blocks;
        unit.strip = strip;
        unit.strips = strips;
        unit.row = from * g.stride_h;
        const auto signal_row = [&](int64_t code_row) {
          return std::clamp<int64_t>(code_row * g.stride_h - g.padding_h, 0, g.signal_h);
        };
        unit.own_from = strip == 0 ? 0 : signal_row(from);
        unit.own_to = strip + 1 == strips ? g.signal_h : signal_row(to);
        blocks += (unit.pixels + block_pixels - 1) / block_pixels;
        units.push_back(unit);
      }
    }
}

namespace {

// Calls body(place in the image's planes, place in its compact form) for every value of an image, in squares, so that
// neither side's cache lines are given up before they are used: one goes along rows of pixels, the other down columns.
template <typename Body>
void for_each_value(int64_t channels, int64_t h, int64_t w, const Body& body) {
  constexpr int64_t side = 8;
  const int64_t column = h * channels;
  if (h * w == 1) {  // both are a row of channels
    for (int64_t c = 0; c < channels; ++c) body(c, c);
    return;
  }
  for (int64_t r = 0; r < column; r += side)
    for (int64_t x = 0; x < w; x += side)
      for (int64_t i = r; i < std::min(column, r + side); ++i) {
        const int64_t row = (i % channels * h + i / channels) * w;
        for (int64_t j = x; j < std::min(w, x + side); ++j) body(row + j, j * column + i);
      }
}

// Whether the compact form of each image, and of each group in it, takes the same memory as the image itself.
template <typename T>
bool in_place(const Plan& plan) {
  return std::is_same_v<T, accumulate_t<T>> && (plan.g.groups == 1 || plan.g.batch == 1);
}

// Whether it is also the same there: [channel][row][column] is [column][row][channel].
template <typename T>
bool is_compact(const Plan& plan) {
  return in_place<T>(plan) && (plan.g.group_signal_channels() > 1) + (plan.g.signal_h > 1) + (plan.g.signal_w > 1) <= 1;
}

template <typename T>
void to_compact(const Plan& plan, const T* signal, accumulate_t<T>* compact) {
  const Geometry& g = plan.g;
  const int64_t channels = g.group_signal_channels(), h = g.signal_h, w = g.signal_w;
  parallel(g.groups * g.batch, grain_of(channels * h * w), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / g.batch, n = i % g.batch;
      const T* const in = signal + (n * g.signal_channels + group * channels) * h * w;
      accumulate_t<T>* const out = compact + i * channels * h * w;
      for_each_value(channels, h, w, [&](int64_t plain, int64_t compacted) { out[compacted] = load(in[plain]); });
    }
  });
}

// The compact form may stand in the signal's own memory.
template <typename T>
void from_compact(const Plan& plan, const accumulate_t<T>* compact, T* signal) {
  using A = accumulate_t<T>;
  const Geometry& g = plan.g;
  const int64_t channels = g.group_signal_channels(), h = g.signal_h, w = g.signal_w;
  const bool own = static_cast<const void*>(compact) == signal;
  parallel(g.groups * g.batch, grain_of(channels * h * w), [&](int64_t begin, int64_t end) {
    const Buffer<A> copy(own ? channels * h * w : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / g.batch, n = i % g.batch;
      T* const out = signal + (n * g.signal_channels + group * channels) * h * w;
      const A* in = compact + i * channels * h * w;
      if (own) in = static_cast<A*>(std::memcpy(copy.get(), in, channels * h * w * sizeof(A)));
      for_each_value(channels, h, w, [&](int64_t plain, int64_t compacted) { out[plain] = store<T>(in[compacted]); });
    }
  });
}

// [group][range][tile of atoms], of `each` weights of an atom for each of `size` things that are cut into ranges:
// write(out, group, from, to, first, last) writes those of [from, to) for the atoms [first, last).
template <typename T, typename Write>
Buffer<accumulate_t<T>> weight_tiles(const Plan& plan, int64_t size, int64_t each, int64_t range, const Write& write) {
  using A = accumulate_t<T>;
  const Kernels<T>& k = kernels<T>();
  const int64_t width = padded(plan.g.group_code_channels(), std::max<int64_t>(k.lanes, 8));
  const int64_t ranges = (size + range - 1) / range;
  Buffer<A> packed(plan.g.groups * width * size * each);
  parallel(plan.g.groups * ranges, grain_of(100 * range * each * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / ranges, from = i % ranges * range, to = std::min(size, from + range);
      A* out = packed.get() + (group * size + from) * each * width;
      for (int64_t first = 0; first < width;) {
        const int64_t last = first + tile_vectors_of(k.tile_vectors, (width - first) / k.lanes) * k.lanes;
        write(out, group, from, to, first, last);
        out += (last - first) * (to - from) * each;
        first = last;
      }
    }
  });
  return packed;
}

// The taps of atoms, in the order of a patch.
template <typename T>
struct Taps {
  using A = accumulate_t<T>;
  const Plan& plan;
  const T* weight;
  A scale;
  // Of the atoms [first, last) of a group, body(the j-th taps...) of each; 0 for what is beyond the atoms.
  template <typename Body, typename... J>
  void visit(int64_t group, int64_t first, int64_t last, const Body& body, J... j) const {
    const int64_t atoms = plan.g.group_code_channels(), patch = plan.g.patch();
    const T* row = weight + (group * atoms + first) * patch;
    for (int64_t m = first; m < std::min(last, atoms); ++m, row += patch) body(scale * load(row[plan.tap[j]])...);
    for (int64_t m = std::max(first, atoms); m < last; ++m) body((static_cast<void>(j), A(0))...);
  }
};

template <typename T>
Buffer<accumulate_t<T>> tap_pairs(const Plan& plan, const Taps<T>& taps) {
  using A = accumulate_t<T>;
  const int64_t length = plan.patches().length, pairs = (length + 1) / 2;
  const auto write = [&](A* out, int64_t group, int64_t from, int64_t to, int64_t first, int64_t last) {
    for (int64_t j = from; j < to; ++j) {
      const int64_t i = j % pairs * 2, own = j / pairs * length + i;
      if (i + 1 < length)
        taps.visit(group, first, last, [&](A a, A b) { *out++ = pair_of<A>(a, b); }, own, own + 1);
      else
        taps.visit(group, first, last, [&](A a) { *out++ = pair_of<A>(a, A(0)); }, own);
    }
  };
  return weight_tiles<T>(plan, plan.g.patch() / length * pairs, 1, kernels<T>().pairs_per_range, write);
}

// As PairsOfPixels in analysis_kernels.h multiplies them. Not finite if a weight is not.
template <typename T>
Buffer<accumulate_t<T>> pixel_pairs(const Plan& plan, const Taps<T>& taps, std::atomic<bool>& finite) {
  using A = accumulate_t<T>;
  const Patches patches = plan.patches();
  const PixelPairs& p = patches.pairs;
  const auto write = [&](A* out, int64_t group, int64_t from, int64_t to, int64_t first, int64_t last) {
    A check = 0;  // stays that of finite weights
    for (int64_t product = 0; product < 2 * p.threes + p.ones; ++product) {
      const bool sums = product < p.threes, differences = !sums && product < 2 * p.threes;
      const int64_t column = plan.pair_columns[product - (sums ? 0 : p.threes)];
      for (int64_t j = from; j < to; ++j)
        for (const bool second : {false, true}) {
          const auto tap = [&](int64_t i) { return (column + i * plan.pair_stride) * p.length + j; };
          const double sign = second ? -1 : 1;
          if (sums)
            taps.visit(
                group, first, last,
                [&](A a, A b, A c) { check += A(0) * (*out++ = static_cast<A>((a + sign * b + c) / 2)); }, tap(0),
                tap(1), tap(2));
          else if (differences && second)
            taps.visit(group, first, last, [&](A a) { check += A(0) * (*out++ = -a); }, tap(2));
          else
            taps.visit(group, first, last, [&](A a) { check += A(0) * (*out++ = a); }, tap(0));
        }
    }
    if (check != A(0)) finite = false;
  };
  return weight_tiles<T>(plan, p.length, p.weights(), p.range, write);
}

}  // namespace

template <typename T>
Compact<T>::Compact(const Plan& plan, const T* signal) {
  if constexpr (std::is_same_v<T, A>)
    if (is_compact<T>(plan)) {
      values_ = signal;
      return;
    }
  copy_ = Buffer<A>(plan.g.signal_size());
  to_compact(plan, signal, copy_.get());
  values_ = copy_.get();
}

template <typename T>
CompactSum<T>::CompactSum(const Plan& plan, T* signal) : signal_(signal) {
  if constexpr (std::is_same_v<T, A>)
    if (in_place<T>(plan)) values_ = signal;
  if (!values_) {
    copy_ = Buffer<A>(plan.g.signal_size());
    values_ = copy_.get();
  }
  std::memset(values_, 0, plan.g.signal_size() * sizeof(A));
}

template <typename T>
void CompactSum<T>::finish(const Plan& plan) const {
  if (!is_compact<T>(plan)) from_compact(plan, values_, signal_);
}

template <typename T>
Buffer<accumulate_t<T>> tap_weight(const Plan& plan, const T* weight, accumulate_t<T> scale) {
  using A = accumulate_t<T>;
  const Taps<T> taps{plan, weight, scale};
  const auto write = [&](A* out, int64_t group, int64_t from, int64_t to, int64_t first, int64_t last) {
    for (int64_t j = from; j < to; ++j) taps.visit(group, first, last, [&](A a) { *out++ = a; }, j);
  };
  return weight_tiles<T>(plan, plan.g.patch(), 1, kernels<T>().taps_per_range, write);
}

template <typename T>
AnalysisWeight<T>::AnalysisWeight(const Plan& plan, const T* weight, A scale)
    : weight_(weight), scale_(scale), products_(plan.patches().products), values_(0) {
  const Taps<T> taps{plan, weight, scale};
  if (products_ == TileProducts::pairs_of_taps) {
    values_ = tap_pairs(plan, taps);
    return;
  }
  std::atomic<bool> finite = products_ == TileProducts::pairs_of_pixels;
  if (finite) values_ = pixel_pairs(plan, taps, finite);
  if (finite) return;
  products_ = TileProducts::taps;
  values_ = tap_weight(plan, weight, scale);
}

template <typename T>
auto AnalysisWeight<T>::of_group(const Plan& plan, TileProducts products, int64_t group, int64_t width) const
    -> const A* {
  const int64_t taps = group * width * plan.g.patch();
  if (products == products_)
    return values_.get() + (products == TileProducts::taps ? taps : group * width * plan.row_weights);
  std::call_once(*has_taps_, [&] { taps_ = tap_weight(plan, weight_, scale_); });
  return taps_.get() + taps;
}

template <typename T>
Buffer<accumulate_t<T>> atom_table(const Plan& plan, const T* weight) {
  using A = accumulate_t<T>;
  const int64_t atoms = plan.g.group_code_channels(), patch = plan.g.patch(), lanes = kernels<T>().lanes;
  const Patches patches = plan.patches();
  Buffer<A> table(plan.g.groups * plan.table_size());
  parallel(plan.g.groups * atoms, grain_of(100 * plan.stride), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      A* const group = table.get() + m / atoms * plan.table_size();
      for (int64_t c = 0, first = 0; c < patches.chunks; first += patches.chunk_vectors[c++] * lanes) {
        const int64_t chunk = patches.chunk_vectors[c] * lanes;
        A* const out = group + atoms * first + m % atoms * chunk;
        for (int64_t j = 0; j < chunk; ++j) {
          const int64_t tap = plan.table_tap[first + j];
          out[j] = tap >= 0 ? load(weight[m * patch + tap]) : A(0);
        }
      }
    }
  });
  return table;
}

template <typename A>
void make_plane(const Plan& plan, int64_t index, const A* source, const A* plane, A sign, A* out, A* own, bool add) {
  const Geometry& g = plan.g;
  const Unit& unit = plan.units[index];
  const int64_t channels = g.group_signal_channels(), compact_column = g.signal_h * channels;
  const int64_t top = unit.row - g.padding_h;  // signal row of the plane's first row
  const int64_t from = std::clamp<int64_t>(-top, 0, plan.plane_h);
  const int64_t to = std::clamp<int64_t>(g.signal_h - top, from, plan.plane_h);
  std::vector<PlanePart<A>> parts;  // of the other strips of the image whose planes meet this one
  if (plane) {
    int64_t first = index, last = index;
    while (first > index - unit.strip && plan.units[first - 1].row + plan.plane_h > unit.row) --first;
    while (last < index - unit.strip + unit.strips - 1 && plan.units[last + 1].row < unit.row + plan.plane_h) ++last;
    for (int64_t other = first; other <= last; ++other) {
      if (other == index) continue;
      const int64_t shift = plan.units[other].row - unit.row;  // its first row, seen from this plane
      const int64_t begin = std::max(from, shift), end = std::min(to, shift + plan.plane_h);
      if (begin < end)
        parts.push_back(
            {plane + (other - index) * plan.plane_size - shift * channels, begin * channels, end * channels});
    }
  }
  const int64_t compact = ((unit.group * g.batch + unit.image) * g.signal_w * g.signal_h + top) * channels;
  PlaneSum<A> sum{unit.images, plan.plane_w, plan.column, plan.plane_image, g.padding_w, g.padding_w + g.signal_w};
  sum.from = from * channels;
  sum.to = to * channels;
  sum.source = source ? source + compact : nullptr;
  sum.compact_column = compact_column;
  sum.compact_image = g.signal_w * compact_column;
  sum.plane = plane;
  sum.parts = parts.data();
  sum.parts_end = parts.data() + parts.size();
  sum.sign = sign;
  sum.out = out;
  sum.own = own ? own + compact : nullptr;
  sum.own_from = std::clamp(unit.own_from - top, from, to) * channels;
  sum.own_to = std::clamp(unit.own_to - top, from, to) * channels;
  sum.add = add;
  kernels<A>().sum_planes(sum);
}

#define DSC_INSTANTIATE(T)                                                             \
  template class Compact<T>;                                                           \
  template class CompactSum<T>;                                                        \
  template class AnalysisWeight<T>;                                                    \
  template Buffer<accumulate_t<T>> tap_weight(const Plan&, const T*, accumulate_t<T>); \
  template Buffer<accumulate_t<T>> atom_table(const Plan&, const T*);
DSC_INSTANTIATE(float)
DSC_INSTANTIATE(double)
DSC_INSTANTIATE(bfloat16)
DSC_INSTANTIATE(float16)
#undef DSC_INSTANTIATE
template void make_plane(const Plan&, int64_t, const float*, const float*, float, float*, float*, bool);
template void make_plane(const Plan&, int64_t, const double*, const double*, double, double*, double*, bool);

}  // namespace dsc::cpu
