// The block of Res-CSC, forward and backward, with the channels last (winograd_kernels.h, rows_kernels.h).
//
//   a = A_1 x   g = relu(BN_1(a)) + c S_2 x   u = A_2 g   codes = relu(BN_2(u) + x)
//
// and with gz the part of the gradient that the last ReLU let pass
//
//   gu = BN_2' gz   gg = S_2 gu   gx = gz + c A_2 gg + S_1 ga   ga = BN_1' relu' gg
//   gW_1 = corr(x, ga)   gW_2 = corr(g, gu) + c corr(gg, x)   gc = <W_2, corr(gg, x)>
#include <cmath>

#include "host.h"

namespace dsc::cpu {
namespace {

constexpr int64_t most_shares = 8;

Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }

void check_block(const Tensor& x, const Tensor& first, const Tensor& second, const Tensor& scale,
                 std::initializer_list<const Tensor*> values) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double),
                  "dsc_ops: res_csc takes x (N, M, H, W) in float32 or float64");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(channels > 0 && channels % winograd_channels == 0, "dsc_ops: res_csc takes a multiple of ",
                  winograd_channels, " channels, got ", channels);
  check_shape(x, first, {channels, channels, 3, 3}, "first");
  check_shape(x, second, {channels, channels, 3, 3}, "second");
  check_shape(x, scale, {}, "scale");
  for (const Tensor* each : values) check_shape(x, *each, {channels}, "what a norm has for each channel");
}

// The steps of a block on pictures of one shape.
template <typename A>
struct Steps {
  Tiling tiling;

  explicit Steps(const Tensor& x) : tiling{x.size(0), x.size(2), x.size(3), x.size(1)} {}

  int64_t runs() const {
    const int64_t run = pixels_of_run(tiling.channels);
    return (tiling.pixels() + run - 1) / run;
  }

  template <typename Problem>
  void for_runs(void (*kernel)(const Problem&, int64_t, int64_t), const Problem& problem) const {
    parallel(runs(), grain_of(4 * pixels_of_run(tiling.channels) * tiling.channels),
             [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }

  // The filters of A_W, or of S_W.
  Buffer<A> filters(const Tensor& weight, bool synthesis) const {
    const int64_t channels = tiling.channels;
    Buffer<A> out(16 * channels * channels);
    const WinogradFilters<A> problem = {
        channels, data<const A>(weight), 9 * (synthesis ? 1 : channels), 9 * (synthesis ? channels : 1), synthesis,
        out.get()};
    parallel(channels, grain_of(64 * channels),
             [&](int64_t begin, int64_t end) { kernels<A>().winograd_filters(problem, begin, end); });
    return out;
  }

  // out = base + factor W x
  void convolve(const Tensor& x, const Buffer<A>& filters, const A* base, A factor, const Tensor& out) const {
    const WinogradConvolution<A> problem = {tiling, data<const A>(x), filters.get(), base, factor, data<A>(out)};
    parallel(problem.tasks(), grain_of(16 * winograd_tiles * tiling.channels * tiling.channels),
             [&](int64_t begin, int64_t end) {
               const Buffer<char> scratch(kernels<A>().winograd_convolution_scratch(problem));
               kernels<A>().winograd_convolution(problem, begin, end, scratch.get());
             });
  }

  // corr(x, z), as weights.
  Tensor correlate(const Tensor& x, const Tensor& z) const {
    const int64_t channels = tiling.channels, shares = std::clamp<int64_t>(tiling.tiles(), 1, most_shares);
    const Tensor gradient = torch::stable::new_empty(x, {channels, channels, 3, 3});
    const Buffer<A> sums(shares * 16 * channels * channels);
    const WinogradCorrelation<A> problem = {tiling, data<const A>(x), data<const A>(z), shares, sums.get()};
    parallel(shares, grain_of(16 * tiling.tiles() * channels * channels / shares), [&](int64_t begin, int64_t end) {
      const Buffer<char> scratch(kernels<A>().winograd_correlation_scratch(problem));
      kernels<A>().winograd_correlation(problem, begin, end, scratch.get());
    });
    const WinogradGradient<A> total = {channels, shares, sums.get(), data<A>(gradient)};
    parallel(channels, grain_of(16 * shares * channels),
             [&](int64_t begin, int64_t end) { kernels<A>().winograd_gradient(total, begin, end); });
    return gradient;
  }

  // Of each channel, into mean and variance.
  void moments(const Tensor& x, A* mean, A* variance) const {
    const int64_t channels = tiling.channels, run = pixels_of_run(channels);
    const Buffer<A> sums(runs() * 2 * channels);
    for_runs(kernels<A>().moments_of_rows, MomentsOfRows<A>{tiling.pixels(), channels, data<const A>(x), sums.get()});
    for (int64_t c = 0; c < channels; ++c) {
      double count = 0, center = 0, squares = 0;
      for (int64_t i = 0; i < runs(); ++i) {
        const A* const of_run = sums.get() + 2 * i * channels + c;
        const double more = static_cast<double>(std::min(run, tiling.pixels() - i * run)), all = count + more;
        const double difference = of_run[0] - center;
        center += difference * more / all;
        squares += of_run[channels] + difference * difference * count * more / all;
        count = all;
      }
      mean[c] = static_cast<A>(center);
      variance[c] = static_cast<A>(squares / std::max(1.0, count));
    }
  }
};

// A batch norm as the map slope x + shift, by channel.
template <typename A>
struct Norm {
  std::vector<A> inverse, slope, shift;  // one over the standard deviation; gamma times that; the rest
  const A* mean;

  Norm(const Tensor& gamma, const Tensor& beta, const A* mean_, const A* variance, double eps) : mean(mean_) {
    for (int64_t c = 0; c < gamma.size(0); ++c) {
      inverse.push_back(1 / std::sqrt(variance[c] + static_cast<A>(eps)));
      slope.push_back(data<const A>(gamma)[c] * inverse[c]);
      shift.push_back(data<const A>(beta)[c] - mean[c] * slope[c]);
    }
  }

  NormRows<A> rows(const Steps<A>& steps, const Tensor& x, const A* base, A* out) const {
    return {steps.tiling.pixels(), steps.tiling.channels, data<const A>(x), base, slope.data(), shift.data(), out};
  }

  // The gradients of gamma and beta, that of x into grad_x, and what the ReLU let pass into `through`.
  std::pair<Tensor, Tensor> backward(const Steps<A>& steps, const Tensor& grad, const Tensor& x, const A* base,
                                     bool training, A* grad_x, A* through) const {
    const int64_t channels = steps.tiling.channels;
    const Tensor grad_gamma = torch::stable::new_empty(x, {channels});
    const Tensor grad_beta = torch::stable::new_empty(x, {channels});
    const Buffer<A> sums(steps.runs() * 2 * channels);
    std::vector<A> of_shift(channels), of_scale(channels);
    const NormRowsBackward<A> problem = {rows(steps, x, base, nullptr),
                                         data<const A>(grad),
                                         mean,
                                         sums.get(),
                                         of_shift.data(),
                                         of_scale.data(),
                                         grad_x,
                                         through};
    steps.for_runs(kernels<A>().norm_rows_sums, problem);
    const double count = static_cast<double>(steps.tiling.pixels());
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t i = 0; i < steps.runs(); ++i) {
        sum += sums.get()[2 * i * channels + c];
        product += sums.get()[(2 * i + 1) * channels + c];
      }
      data<A>(grad_beta)[c] = static_cast<A>(sum);
      data<A>(grad_gamma)[c] = static_cast<A>(product * inverse[c]);
      if (!training) continue;
      of_shift[c] = static_cast<A>(slope[c] * sum / count);
      of_scale[c] = static_cast<A>(slope[c] * product * inverse[c] * inverse[c] / count);
    }
    steps.for_runs(kernels<A>().norm_rows_backward, problem);
    return {grad_gamma, grad_beta};
  }
};

template <typename F>
auto visit_wide(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> res_csc_cpu(
    const Tensor& x, const Tensor& first, const Tensor& second, const Tensor& scale, const Tensor& gamma_1,
    const Tensor& beta_1, const Tensor& gamma_2, const Tensor& beta_2, const Tensor& mean_1, const Tensor& variance_1,
    const Tensor& mean_2, const Tensor& variance_2, bool training, double eps_1, double eps_2, bool shortcut) {
  const Tensor* const statistics[4] = {&mean_1, &variance_1, &mean_2, &variance_2};
  check_block(x, first, second, scale,
              {&gamma_1, &beta_1, &gamma_2, &beta_2, &mean_1, &variance_1, &mean_2, &variance_2});
  const Tensor signal = channels_last(x), codes = torch::stable::empty_like(signal);
  const Tensor a = torch::stable::empty_like(signal), g = torch::stable::empty_like(signal);
  const Tensor u = torch::stable::empty_like(signal), moments = torch::stable::new_empty(x, {4, x.size(1)});
  const Tensor weight_1 = torch::stable::contiguous(first), weight_2 = torch::stable::contiguous(second);
  visit_wide(x, [&](auto zero) {
    using A = decltype(zero);
    const Steps<A> steps(x);
    A* const moment = data<A>(moments);
    const int64_t channels = x.size(1);
    for (int64_t i = 0; i < 4 && !training; ++i) {
      const Tensor values = torch::stable::contiguous(*statistics[i]);
      std::copy_n(data<const A>(values), channels, moment + i * channels);
    }
    const auto norm = [&](const Tensor& of, const Tensor& gamma, const Tensor& beta, A* mean, double eps) {
      if (training) steps.moments(of, mean, mean + channels);
      return Norm<A>(torch::stable::contiguous(gamma), torch::stable::contiguous(beta), mean, mean + channels, eps);
    };
    steps.convolve(signal, steps.filters(weight_1, false), nullptr, 1, a);
    steps.for_runs(kernels<A>().norm_rows, norm(a, gamma_1, beta_1, moment, eps_1).rows(steps, a, nullptr, data<A>(g)));
    steps.convolve(signal, steps.filters(weight_2, true), data<const A>(g), data<const A>(scale)[0], g);
    steps.convolve(g, steps.filters(weight_2, false), nullptr, 1, u);
    steps.for_runs(kernels<A>().norm_rows,
                   norm(u, gamma_2, beta_2, moment + 2 * channels, eps_2)
                       .rows(steps, u, shortcut ? data<const A>(signal) : nullptr, data<A>(codes)));
  });
  return {codes, a, g, u, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> res_csc_backward_cpu(
    const Tensor& grad, const Tensor& a, const Tensor& g, const Tensor& u, const Tensor& statistics, const Tensor& x,
    const Tensor& first, const Tensor& second, const Tensor& scale, const Tensor& gamma_1, const Tensor& beta_1,
    const Tensor& gamma_2, const Tensor& beta_2, bool training, double eps_1, double eps_2, bool shortcut) {
  check_block(x, first, second, scale, {&gamma_1, &beta_1, &gamma_2, &beta_2});
  const int64_t channels = x.size(1);
  for (const Tensor* like_x : {&grad, &a, &g, &u}) check_shape(x, *like_x, sizes(x), "grad, a, g or u");
  check_shape(x, statistics, {4, channels}, "statistics");
  const Tensor signal = channels_last(x), incoming = channels_last(grad), a_last = channels_last(a);
  const Tensor g_last = channels_last(g), u_last = channels_last(u), moments = torch::stable::contiguous(statistics);
  const Tensor weight_1 = torch::stable::contiguous(first), weight_2 = torch::stable::contiguous(second);
  const Tensor grad_x = torch::stable::empty_like(signal), grad_u = torch::stable::empty_like(signal);
  const Tensor grad_g = torch::stable::empty_like(signal), grad_scale = torch::stable::new_empty(x, {});
  return visit_wide(x, [&](auto zero) {
    using A = decltype(zero);
    const Steps<A> steps(x);
    const A* const moment = data<const A>(moments);
    const A c = data<const A>(scale)[0];
    const auto norm = [&](const Tensor& gamma, const Tensor& beta, const A* mean, double eps) {
      return Norm<A>(torch::stable::contiguous(gamma), torch::stable::contiguous(beta), mean, mean + channels, eps);
    };
    A* const sum = data<A>(grad_x);
    const auto [grad_gamma_2, grad_beta_2] =
        norm(gamma_2, beta_2, moment + 2 * channels, eps_2)
            .backward(steps, incoming, u_last, shortcut ? data<const A>(signal) : nullptr, training, data<A>(grad_u),
                      shortcut ? sum : nullptr);
    const Tensor grad_second = steps.correlate(g_last, grad_u);
    steps.convolve(grad_u, steps.filters(weight_2, true), nullptr, 1, grad_g);
    const Tensor part = steps.correlate(grad_g, signal);
    steps.convolve(grad_g, steps.filters(weight_2, false), shortcut ? sum : nullptr, c, grad_x);
    double dot = 0;
    for (int64_t i = 0; i < part.numel(); ++i) {
      const double value = data<const A>(part)[i];
      data<A>(grad_second)[i] += static_cast<A>(c * value);
      dot += data<const A>(weight_2)[i] * value;
    }
    data<A>(grad_scale)[0] = static_cast<A>(dot);
    const Tensor& grad_a = grad_u;  // its place
    const auto [grad_gamma_1, grad_beta_1] =
        norm(gamma_1, beta_1, moment, eps_1)
            .backward(steps, grad_g, a_last, nullptr, training, data<A>(grad_a), nullptr);
    const Tensor grad_first = steps.correlate(signal, grad_a);
    steps.convolve(grad_a, steps.filters(weight_1, true), sum, 1, grad_x);
    return std::make_tuple(grad_x, grad_first, grad_second, grad_scale, grad_gamma_1, grad_beta_1, grad_gamma_2,
                           grad_beta_2);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("res_csc", TORCH_BOX(&res_csc_cpu));
  library.impl("res_csc_backward", TORCH_BOX(&res_csc_backward_cpu));
}

}  // namespace dsc::cpu
