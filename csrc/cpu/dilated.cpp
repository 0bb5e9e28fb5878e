// 3x3 convolutions of some dilation and their gradient, for dictionaries of few atoms on slices of one buffer
// (dsc_ops/layers/csc/_dilated.py).
#include "planes.h"

namespace dsc::cpu {
namespace {

constexpr int64_t taps = 9;
constexpr int64_t strip_pixels = 1024;       // so that copies of some channels stay in the second-level cache
constexpr int64_t correlated_pixels = 2048;  // the same of few channels
constexpr int64_t chunk_pixels = 1024;       // whose products are added up in registers
constexpr int64_t most_shares = 8;

Dilation dilation_of(const Tensor& x, int64_t dilation, bool backward, int64_t pixels) {
  // Further away no pixel has another, and offsets stay far from overflow.
  STD_TORCH_CHECK(dilation >= 1 && dilation <= (int64_t{1} << 31), "dsc_ops: dilation must be positive, got ",
                  dilation);
  Dilation d = {x.size(2), x.size(3), dilation, backward, 1};
  d.rows = std::clamp<int64_t>(std::max(pixels / std::max<int64_t>(1, d.length), 2 * d.row_reach()), 1,
                               std::max<int64_t>(1, d.height));
  return d;
}

// Whether pairs of rows save products, for which strips are cut so that they have pairs alone, whose mixtures are twice
// as much as copies. Without pairs, where a row of the kernel meets no row of the picture it costs nothing.
bool take_pairs(Dilation& d) {
  const int64_t pair = 2 * d.dilation;
  if (d.dilation >= d.height) return false;
  const int64_t products = 2 * padded(d.height, pair), without = d.height + 2 * (d.height - d.dilation);
  if (4 * products > 3 * without) return false;
  d.rows = padded(std::clamp<int64_t>(strip_pixels / 2 / std::max<int64_t>(1, d.length), 1, d.height), pair);
  return true;
}

// The weights of F(2, 3), [point][output][input][column], of those with these strides.
template <typename A>
Buffer<A> weights_of_pairs(const A* weight, int64_t outputs, int64_t inputs, int64_t weight_output,
                           int64_t weight_input, bool backward) {
  Buffer<A> out(4 * outputs * inputs * 3);
  const int64_t point = outputs * inputs * 3;
  parallel(outputs, grain_of(taps * inputs), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < inputs; ++c) {
        const A* const w = weight + o * weight_output + c * weight_input;
        A* const to = out.get() + (o * inputs + c) * 3;
        for (int64_t j = 0; j < 3; ++j) {
          const A outer = (w[j] + w[6 + j]) / 2, middle = w[3 + j] / 2;
          to[j] = w[j + (backward ? 6 : 0)];
          to[point + j] = outer + middle;
          to[2 * point + j] = outer - middle;
          to[3 * point + j] = w[j + (backward ? 0 : 6)];
        }
      }
  });
  return out;
}

void check_pixels(const Tensor& x, const Tensor& other, const char* name) {
  check_like(x, other, name);
  check_planes(other, name);
  STD_TORCH_CHECK(other.size(0) == x.size(0) && other.size(2) == x.size(2) && other.size(3) == x.size(3),
                  "dsc_ops: ", name, " has the wrong shape");
}

void dilated_convolution_cpu(const Tensor& out, const Tensor& x, const Tensor& weight, int64_t dilation,
                             bool transposed, const std::optional<Tensor>& base) {
  check_planes(x);
  check_pixels(x, out, "out");
  check_written(out, "out");
  const int64_t inputs = x.size(1), outputs = out.size(1);
  check_shape(x, weight, {transposed ? inputs : outputs, transposed ? outputs : inputs, 3, 3}, "weight");
  if (base) check_shape(x, *base, sizes(out), "base");
  Dilation d = dilation_of(x, dilation, transposed, strip_pixels);
  if (out.numel() == 0) return;
  const bool in_pairs = take_pairs(d);
  const Tensor planes = with_planes(x), base_planes = base ? with_planes(*base) : out;
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Tensor wide = widened<T>(weight);
    const int64_t weight_output = taps * (transposed ? 1 : inputs), weight_input = taps * (transposed ? outputs : 1);
    const auto weights =
        in_pairs ? weights_of_pairs(data<const A>(wide), outputs, inputs, weight_output, weight_input, transposed)
                 : Buffer<A>(0);
    Channels<T> added = channels_of_planes<T>(base_planes);
    if (!base) added.values = nullptr;
    const DilatedConvolution<T> problem = {d,
                                           x.size(0),
                                           inputs,
                                           outputs,
                                           channels_of_planes<T>(planes),
                                           in_pairs ? weights.get() : data<const A>(wide),
                                           in_pairs ? 3 * inputs : weight_output,
                                           in_pairs ? 3 : weight_input,
                                           in_pairs,
                                           added,
                                           data<T>(out),
                                           out.stride(0)};
    parallel(problem.tasks(), grain_of(taps * d.rows * d.length * inputs * problem.group()),
             [&](int64_t begin, int64_t end) {
               const Buffer<char> scratch(kernels<T>().dilated_convolution_scratch(problem));
               kernels<T>().dilated_convolution(problem, begin, end, scratch.get());
             });
  });
}

Tensor dilated_correlation_cpu(const Tensor& x, const Tensor& z, int64_t dilation) {
  check_planes(x);
  check_pixels(x, z, "z");
  const Dilation d = dilation_of(x, dilation, true, correlated_pixels);
  const int64_t inputs = x.size(1), outputs = z.size(1);
  const Tensor out = torch::stable::new_empty(x, {outputs, inputs, 3, 3}, wide_type(x));
  if (x.numel() == 0 || z.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(out));
    return out;
  }
  const Tensor x_planes = with_planes(x), z_planes = with_planes(z);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const int64_t chunk = std::max<int64_t>(1, chunk_pixels / (d.rows * d.length));
    DilatedCorrelation<T> problem = {
        d,     x.size(0), inputs, outputs, channels_of_planes<T>(x_planes), channels_of_planes<T>(z_planes),
        chunk, 1,         nullptr};
    problem.shares = std::clamp<int64_t>(problem.chunks(), 1, most_shares);
    const Buffer<A> sums(problem.shares * problem.share_size());
    problem.sums = sums.get();
    const int64_t groups = problem.groups();
    parallel(problem.shares * groups,
             grain_of(taps * x.size(0) * d.height * d.length * inputs * outputs / (problem.shares * groups)),
             [&](int64_t begin, int64_t end) {
               const Buffer<char> scratch(kernels<T>().dilated_correlation_scratch(problem));
               kernels<T>().dilated_correlation(problem, begin, end, scratch.get());
             });
    // The shares in their order, and to the order of weights.
    const int64_t width = problem.sums_width();
    A* const to = data<A>(out);
    parallel(outputs * taps, grain_of(problem.shares * inputs), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        A* const sum = sums.get() + row * width;
        for (int64_t share = 1; share < problem.shares; ++share)
          for (int64_t c = 0; c < inputs; ++c) sum[c] += sum[share * problem.share_size() + c];
        const int64_t tap = row % 3 * 3 + row % taps / 3;
        for (int64_t c = 0; c < inputs; ++c) to[(row / taps * inputs + c) * taps + tap] = sum[c];
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("dilated_convolution_", TORCH_BOX(&dilated_convolution_cpu));
  library.impl("dilated_correlation", TORCH_BOX(&dilated_correlation_cpu));
}

}  // namespace dsc::cpu
