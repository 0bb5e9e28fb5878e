// analysis, synthesis, correlation and conv_soft_threshold on the CPU.
#include "convolution.h"

#include <algorithm>
#include <limits>

#include "threshold.h"

namespace dsc::cpu {

Geometry make_geometry(const std::vector<int64_t>& signal, const std::vector<int64_t>& weight,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups) {
  const size_t dim = weight.size();
  STD_TORCH_CHECK((dim == 3 || dim == 4) && signal.size() == dim, "dsc_ops: signal and weight must both be 3-D or 4-D");
  STD_TORCH_CHECK(stride.size() == dim - 2 && padding.size() == dim - 2 && dilation.size() == dim - 2,
                  "dsc_ops: stride, padding and dilation must have one value per spatial axis");
  STD_TORCH_CHECK(groups >= 1 && weight[0] >= 1 && weight[1] >= 1 && weight[0] % groups == 0 &&
                      signal[1] % groups == 0 && signal[1] / groups == weight[1],
                  "dsc_ops: channels, atoms and groups do not fit together");
  Geometry g{};
  g.batch = signal[0];
  g.signal_channels = signal[1];
  g.code_channels = weight[0];
  g.groups = groups;
  const auto axis = [&](size_t i, int64_t* n, int64_t* code, int64_t* k, int64_t* s, int64_t* p, int64_t* d) {
    *n = signal[2 + i], *k = weight[2 + i], *s = stride[i], *p = padding[i], *d = dilation[i];
    for (int64_t value : {*n, *k, *s, *p, *d})  // no product of two of them overflows
      STD_TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), "dsc_ops: a size of the convolution is too large");
    STD_TORCH_CHECK(*n >= 1 && *k >= 1 && *s >= 1 && *p >= 0 && *d >= 1 && *n + 2 * *p >= *d * (*k - 1) + 1,
                    "dsc_ops: the kernel does not fit into the padded signal");
    *code = code_extent(*n, *k, *s, *p, *d);
  };
  if (dim == 3) {
    g.signal_h = g.code_h = g.kernel_h = g.stride_h = g.dilation_h = 1;
  } else {
    axis(0, &g.signal_h, &g.code_h, &g.kernel_h, &g.stride_h, &g.padding_h, &g.dilation_h);
  }
  axis(dim - 3, &g.signal_w, &g.code_w, &g.kernel_w, &g.stride_w, &g.padding_w, &g.dilation_w);
  return g;
}

std::vector<int64_t> code_shape(const Geometry& g, int64_t dim) {
  if (dim == 3) return {g.batch, g.code_channels, g.code_w};
  return {g.batch, g.code_channels, g.code_h, g.code_w};
}

template <typename T>
Buffer<accumulate_t<T>> pack_for_analysis(const Geometry& g, const T* weight) {
  using A = accumulate_t<T>;
  const int64_t tile = kernels<T>().tile_atoms, atoms = g.group_code_channels(), patch = g.patch();
  const int64_t tiles = (atoms + tile - 1) / tile;
  Buffer<A> packed(g.groups * tiles * patch * tile);
  for (int64_t group = 0; group < g.groups; ++group)
    for (int64_t m = 0; m < tiles * tile; ++m) {
      A* const out = packed.get() + (group * tiles + m / tile) * patch * tile + m % tile;
      for (int64_t j = 0; j < patch; ++j)
        out[j * tile] = m < atoms ? load(weight[(group * atoms + m) * patch + j]) : A(0);
    }
  return packed;
}

template <typename T>
Buffer<accumulate_t<T>> pack_for_synthesis(const Geometry& g, const T* weight) {
  using A = accumulate_t<T>;
  const int64_t patch = g.patch(), stride = padded(patch, kernels<T>().lanes);
  Buffer<A> packed(g.code_channels * stride);
  for (int64_t m = 0; m < g.code_channels; ++m)
    for (int64_t j = 0; j < stride; ++j) packed.get()[m * stride + j] = j < patch ? load(weight[m * patch + j]) : A(0);
  return packed;
}

template <typename T>
void run_analysis(const Analysis<T>& problem) {
  const Kernels<T>& k = kernels<T>();
  const Geometry& g = problem.geometry;
  const int64_t blocks = (g.code_pixels() + k.pixels_per_task - 1) / k.pixels_per_task;
  const int64_t products = std::min(k.pixels_per_task, g.code_pixels()) * g.group_code_channels() * g.patch();
  parallel(g.batch * g.groups * blocks, grain_of(products), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(k.analysis_scratch(g));
    k.analysis(problem, begin, end, scratch.get());
  });
}

template <typename T>
void run_synthesis(const Geometry& g, const T* codes, const accumulate_t<T>* weight, accumulate_t<T> alpha,
                   accumulate_t<T>* signal) {
  const Kernels<T>& k = kernels<T>();
  const bool by_rows = g.code_h > 1;
  const int64_t extent = by_rows ? g.code_h : g.code_w, stride = by_rows ? g.stride_h : g.stride_w;
  const int64_t reach = by_rows ? (g.kernel_h - 1) * g.dilation_h : (g.kernel_w - 1) * g.dilation_w;
  // Strips i and i + 2 share no signal pixel when strip * stride > reach - stride; at least 8 rows (256 columns) make a
  // task.
  const int64_t strip = std::max((reach + stride - 1) / stride, by_rows ? int64_t{8} : int64_t{256});
  const int64_t strips = (extent + strip - 1) / strip;
  const int64_t products = g.code_pixels() / strips * g.group_code_channels() * g.patch();
  for (int64_t parity = 0; parity < 2; ++parity) {
    const int64_t own = (strips + 1 - parity) / 2;
    const Synthesis<T> problem = {g, codes, weight, alpha, signal, strip, own, parity};
    parallel(g.batch * g.groups * own, grain_of(products), [&](int64_t begin, int64_t end) {
      const Buffer<char> scratch(k.pixel_list_scratch(g));
      k.synthesis(problem, begin, end, scratch.get());
    });
  }
}

template <typename T>
void run_correlation(const Geometry& g, const accumulate_t<T>* signal, const T* codes, accumulate_t<T> alpha,
                     accumulate_t<T>* grad_weight) {
  using A = accumulate_t<T>;
  const Kernels<T>& k = kernels<T>();
  const int64_t patch = g.patch(), stride = padded(patch, k.lanes), size = g.code_channels * stride;
  // A fixed number of partial sums, whatever the threads: enough for 16 of them, and no more than 64 MiB together.
  constexpr int64_t most_tasks = 16, most_bytes = int64_t{64} << 20;
  const int64_t affordable = std::max<int64_t>(1, most_bytes / (size * static_cast<int64_t>(sizeof(A))));
  const int64_t tasks = std::min({most_tasks, affordable, std::max<int64_t>(1, g.batch * g.code_pixels() / 256)});
  const Buffer<A> partial(tasks * size);
  const Correlation<T> problem = {g, signal, codes, tasks, partial.get()};
  const int64_t products = g.batch * g.code_pixels() * g.code_channels * patch / tasks;
  parallel(tasks, grain_of(products), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(k.pixel_list_scratch(g));
    k.correlation(problem, begin, end, scratch.get());
  });
  parallel(g.code_channels, grain_of(patch * tasks), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      for (int64_t j = 0; j < patch; ++j) {
        A sum = 0;
        for (int64_t task = 0; task < tasks; ++task) sum += partial.get()[task * size + m * stride + j];
        grad_weight[m * patch + j] += alpha * sum;
      }
  });
}

template <typename T>
void round_to(const accumulate_t<T>* values, const Tensor& out) {
  T* const target = data<T>(out);
  parallel(out.numel(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = store<T>(values[i]);
  });
}

#define DSC_INSTANTIATE(T)                                                                                             \
  template Buffer<accumulate_t<T>> pack_for_analysis(const Geometry&, const T*);                                       \
  template Buffer<accumulate_t<T>> pack_for_synthesis(const Geometry&, const T*);                                      \
  template void run_analysis(const Analysis<T>&);                                                                      \
  template void run_synthesis(const Geometry&, const T*, const accumulate_t<T>*, accumulate_t<T>, accumulate_t<T>*);   \
  template void run_correlation(const Geometry&, const accumulate_t<T>*, const T*, accumulate_t<T>, accumulate_t<T>*); \
  template void round_to<T>(const accumulate_t<T>*, const Tensor&);
DSC_INSTANTIATE(float)
DSC_INSTANTIATE(double)
DSC_INSTANTIATE(bfloat16)
DSC_INSTANTIATE(float16)
#undef DSC_INSTANTIATE

namespace {

using Sizes = std::vector<int64_t>;

void check_codes(const Geometry& g, const Tensor& model, const Tensor& codes, const char* name) {
  check_shape(model, codes, code_shape(g, model.dim()), name);
}

Sizes signal_shape(int64_t batch, int64_t channels, const Sizes& size) {
  Sizes shape = {batch, channels};
  shape.insert(shape.end(), size.begin(), size.end());
  return shape;
}

template <typename T>
Tensor zeros_widened(const Tensor& model, const Sizes& shape) {
  return torch::stable::new_zeros(model, shape, DType<accumulate_t<T>>::value);
}

template <typename T>
Tensor rounded(const Tensor& model, const Tensor& values) {
  if (values.scalar_type() == model.scalar_type()) return values;
  const Tensor out = torch::stable::new_empty(model, sizes(values));
  round_to<T>(data<const accumulate_t<T>>(values), out);
  return out;
}

Tensor conv_soft_threshold_cpu(const Tensor& y, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& theta, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                               int64_t groups, bool one_sided) {
  const Geometry g = make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  check_like(y, weight, "weight");
  check_theta(y, theta, g.code_channels);
  if (bias) check_shape(y, *bias, {g.code_channels}, "bias");
  const Tensor codes = torch::stable::new_empty(y, code_shape(g, y.dim()));
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Tensor signal = widened<T>(y), dense_weight = torch::stable::contiguous(weight);
    const Tensor thresholds = widened<T>(theta), shift = bias ? widened<T>(*bias) : thresholds;
    const auto packed = pack_for_analysis(g, data<const T>(dense_weight));
    Analysis<T> problem{};
    problem.geometry = g;
    problem.signal = data<const A>(signal);
    problem.weight = packed.get();
    problem.alpha = 1;
    problem.bias = bias ? data<const A>(shift) : nullptr;
    problem.epilogue = one_sided ? Epilogue::soft_threshold_one_sided : Epilogue::soft_threshold;
    problem.theta = data<const A>(thresholds);
    problem.theta_stride = theta.dim();
    problem.codes = data<T>(codes);
    run_analysis(problem);
  });
  return codes;
}

Tensor analysis_cpu(const Tensor& y, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                    const Sizes& dilation, int64_t groups) {
  const Geometry g = make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  check_like(y, weight, "weight");
  const Tensor codes = torch::stable::new_empty(y, code_shape(g, y.dim()));
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Tensor signal = widened<T>(y), dense_weight = torch::stable::contiguous(weight);
    const auto packed = pack_for_analysis(g, data<const T>(dense_weight));
    Analysis<T> problem{};
    problem.geometry = g;
    problem.signal = data<const accumulate_t<T>>(signal);
    problem.weight = packed.get();
    problem.alpha = 1;
    problem.codes = data<T>(codes);
    run_analysis(problem);
  });
  return codes;
}

Tensor synthesis_cpu(const Tensor& x, const Tensor& weight, const Sizes& signal_size, const Sizes& stride,
                     const Sizes& padding, const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == weight.dim(), "dsc_ops: codes and weight must both be 3-D or 4-D");
  const Sizes shape = signal_shape(x.size(0), weight.size(1) * groups, signal_size);
  const Geometry g = make_geometry(shape, sizes(weight), stride, padding, dilation, groups);
  check_like(x, weight, "weight");
  check_codes(g, x, x, "the code");
  return visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Tensor codes = torch::stable::contiguous(x), dense_weight = torch::stable::contiguous(weight);
    const Tensor signal = zeros_widened<T>(x, shape);
    const auto packed = pack_for_synthesis(g, data<const T>(dense_weight));
    run_synthesis<T>(g, data<const T>(codes), packed.get(), 1, data<accumulate_t<T>>(signal));
    return rounded<T>(x, signal);
  });
}

Tensor correlation_cpu(const Tensor& y, const Tensor& x, const Sizes& kernel_size, const Sizes& stride,
                       const Sizes& padding, const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == y.dim() && groups >= 1, "dsc_ops: signal and codes must both be 3-D or 4-D");
  const Sizes shape = signal_shape(x.size(1), y.size(1) / groups, kernel_size);
  const Geometry g = make_geometry(sizes(y), shape, stride, padding, dilation, groups);
  check_codes(g, y, x, "the code");
  return visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Tensor signal = widened<T>(y), codes = torch::stable::contiguous(x), grad = zeros_widened<T>(y, shape);
    run_correlation<T>(g, data<const accumulate_t<T>>(signal), data<const T>(codes), 1, data<accumulate_t<T>>(grad));
    return rounded<T>(y, grad);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_soft_threshold_backward_cpu(const Tensor& grad, const Tensor& codes,
                                                                            const Tensor& y, const Tensor& weight,
                                                                            const Tensor& theta, const Sizes& stride,
                                                                            const Sizes& padding, const Sizes& dilation,
                                                                            int64_t groups, bool one_sided,
                                                                            const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 4, "dsc_ops: needs must have 4 values");
  make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  auto [grad_u, grad_theta, grad_bias] = soft_threshold_backward_cpu(grad, codes, theta, one_sided);
  const auto none = [&] { return torch::stable::new_empty(y, {0}); };
  const auto spatial = [](const Tensor& t) { return Sizes(t.sizes().begin() + 2, t.sizes().end()); };
  return {needs[0] ? synthesis_cpu(grad_u, weight, spatial(y), stride, padding, dilation, groups) : none(),
          needs[1] ? correlation_cpu(y, grad_u, spatial(weight), stride, padding, dilation, groups) : none(),
          needs[2] ? grad_bias : none(), needs[3] ? grad_theta : none()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("analysis", TORCH_BOX(&analysis_cpu));
  library.impl("synthesis", TORCH_BOX(&synthesis_cpu));
  library.impl("correlation", TORCH_BOX(&correlation_cpu));
  library.impl("conv_soft_threshold", TORCH_BOX(&conv_soft_threshold_cpu));
  library.impl("conv_soft_threshold_backward", TORCH_BOX(&conv_soft_threshold_backward_cpu));
}

}  // namespace dsc::cpu
