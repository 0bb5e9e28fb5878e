// analysis, synthesis, correlation and conv_soft_threshold on the CPU: single products of lista's steps, on the same
// packed codes (units.h).
#include "convolution.h"

#include <limits>

#include "units.h"

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
Tensor rounded(const Tensor& model, const Tensor& values) {
  if (values.scalar_type() == model.scalar_type()) return values;
  const Tensor out = torch::stable::new_empty(model, sizes(values));
  const accumulate_t<T>* const source = data<const accumulate_t<T>>(values);
  T* const target = data<T>(out);
  parallel(out.numel(), 32768, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = store<T>(source[i]);
  });
  return out;
}
template Tensor rounded<float>(const Tensor&, const Tensor&);
template Tensor rounded<double>(const Tensor&, const Tensor&);
template Tensor rounded<bfloat16>(const Tensor&, const Tensor&);
template Tensor rounded<float16>(const Tensor&, const Tensor&);

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

// What the operators have in common: a convolution's units, and a dense code in packed form.
template <typename T>
struct Convolution : Units<T> {
  using typename Units<T>::A;
  using typename Units<T>::Codes;
  using Units<T>::plan;

  explicit Convolution(const Geometry& g) : Units<T>(g) {}

  // The part of a signal (compact) that a unit meets.
  Buffer<A> plane_of(int64_t u, const Compact<T>& signal) const {
    Buffer<A> plane(plan.analysis_planes());
    make_plane(plan, u, signal.get(), static_cast<const A*>(nullptr), A(1), plane.get(), static_cast<A*>(nullptr),
               false);
    return plane;
  }

  // The signal (N, C, *) that is the sum of all units' planes.
  void sum_planes(const Buffer<A>& planes, T* signal) const {
    const CompactSum<T> sum(plan, signal);  // no plane may reach the last rows and columns
    this->for_each([&](int64_t u, char*) {
      const Buffer<A> out(plan.plane_size);
      make_plane<A>(plan, u, nullptr, this->plane(planes, u), A(1), out.get(), sum.get(), false);
    });
    sum.finish(plan);
  }
};

// What units left in shares, as a weight (M, C/groups, *kernel).
template <typename T>
Tensor gradient_of(const Convolution<T>& c, const Shares<accumulate_t<T>>& shares, const Tensor& model,
                   const Sizes& shape) {
  using A = accumulate_t<T>;
  const Tensor sum = torch::stable::new_zeros(model, shape, DType<A>::value);
  add_shares(c.plan, shares, c.kernel.lanes, data<A>(sum));
  return rounded<T>(model, sum);
}

Tensor conv_soft_threshold_cpu(const Tensor& y, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& theta, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                               int64_t groups, bool one_sided) {
  const Geometry g = make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  check_like(y, weight, "weight");
  check_theta(y, theta, g.code_channels);
  if (bias) check_shape(y, *bias, {g.code_channels}, "bias");
  const Tensor codes = torch::stable::new_empty(y, code_shape(g, y.dim()));
  const Tensor signal = torch::stable::contiguous(y), dense_weight = torch::stable::contiguous(weight);
  const Tensor thresholds = torch::stable::contiguous(theta);
  const std::optional<Tensor> shift = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Convolution<T> c(g);
    const Compact<T> compact(c.plan, data<const T>(signal));
    const AnalysisWeight<T> packed_weight(c.plan, data<const T>(dense_weight), accumulate_t<T>(1));
    const auto by_group_theta = c.by_group(data<const T>(thresholds), theta.dim());
    const auto by_group_bias = c.by_group(data<const T>(shift ? *shift : thresholds), bias ? 1 : theta.dim());
    c.for_each([&](int64_t u, char* scratch) {
      const auto plane = c.plane_of(u, compact);
      c.threshold_dense(u, plane.get(), packed_weight, bias ? by_group_bias.get() : nullptr, by_group_theta.get(),
                        one_sided, data<T>(codes), scratch);
    });
  });
  return codes;
}

Tensor analysis_cpu(const Tensor& y, const Tensor& weight, const Sizes& stride, const Sizes& padding,
                    const Sizes& dilation, int64_t groups) {
  const Geometry g = make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  check_like(y, weight, "weight");
  const Tensor codes = torch::stable::new_empty(y, code_shape(g, y.dim()));
  const Tensor signal = torch::stable::contiguous(y), dense_weight = torch::stable::contiguous(weight);
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Convolution<T> c(g);
    const Compact<T> compact(c.plan, data<const T>(signal));
    const AnalysisWeight<T> packed_weight(c.plan, data<const T>(dense_weight), accumulate_t<T>(1));
    c.for_each([&](int64_t u, char* scratch) {
      const auto plane = c.plane_of(u, compact);
      c.analyze_dense(u, plane.get(), packed_weight, {}, accumulate_t<T>(1), false, data<T>(codes), scratch);
    });
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
  const Tensor signal = torch::stable::new_empty(x, shape);
  const Tensor codes = torch::stable::contiguous(x), dense_weight = torch::stable::contiguous(weight);
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Convolution<T> c(g);
    const auto table = atom_table(c.plan, data<const T>(dense_weight));
    const auto planes = c.planes();
    Storage<accumulate_t<T>> storage(c.plan);
    int64_t* const used = storage.restart();
    c.for_each([&](int64_t u, char* scratch) {
      c.from_dense(u, data<const T>(codes), nullptr, storage.codes(), used, scratch);
      c.synthesize(u, storage.codes(), table.get(), c.plane(planes, u), scratch);
    });
    c.sum_planes(planes, data<T>(signal));
  });
  return signal;
}

Tensor correlation_cpu(const Tensor& y, const Tensor& x, const Sizes& kernel_size, const Sizes& stride,
                       const Sizes& padding, const Sizes& dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == y.dim() && groups >= 1, "dsc_ops: signal and codes must both be 3-D or 4-D");
  const Sizes shape = signal_shape(x.size(1), y.size(1) / groups, kernel_size);
  const Geometry g = make_geometry(sizes(y), shape, stride, padding, dilation, groups);
  check_codes(g, y, x, "the code");
  const Tensor signal = torch::stable::contiguous(y), codes = torch::stable::contiguous(x);
  return visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Convolution<T> c(g);
    const Compact<T> compact(c.plan, data<const T>(signal));
    Storage<A> storage(c.plan);
    int64_t* const used = storage.restart();
    const int64_t count = c.share_count(1, g.batch);
    const Shares<A> shares(count, g.groups * c.plan.table_size(), count);
    c.for_each_share(count, [&](int64_t u, int64_t share, char* scratch) {
      const Unit& unit = c.plan.units[u];
      c.from_dense(u, data<const T>(codes), nullptr, storage.codes(), used, scratch);
      const auto plane = c.plane_of(u, compact), part = c.part(storage.codes(), u);
      c.kernel.packed_backward_analysis(
          {unit.pixels, c.atoms(), c.plan.base.data(), c.plan.patches(), part, part, plane.get(), nullptr,
           shares.of(share) + unit.group * c.plan.table_size(), nullptr, nullptr, nullptr},
          scratch);
    });
    return gradient_of<T>(c, shares, y, shape);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_soft_threshold_backward_cpu(const Tensor& grad, const Tensor& codes,
                                                                            const Tensor& y, const Tensor& weight,
                                                                            const Tensor& theta, const Sizes& stride,
                                                                            const Sizes& padding, const Sizes& dilation,
                                                                            int64_t groups, bool one_sided,
                                                                            const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 4, "dsc_ops: needs must have 4 values");
  const Geometry g = make_geometry(sizes(y), sizes(weight), stride, padding, dilation, groups);
  check_like(y, weight, "weight");
  check_theta(y, theta, g.code_channels);
  check_codes(g, y, codes, "the code");
  check_codes(g, y, grad, "grad");
  const auto wanted = [&](int i, const Sizes& shape) {
    return torch::stable::new_empty(y, needs[i] ? shape : Sizes{0});
  };
  const Tensor grad_y = wanted(0, sizes(y)), grad_bias = wanted(2, {g.code_channels}),
               grad_theta = wanted(3, sizes(theta));
  const Tensor signal = torch::stable::contiguous(y), dense_weight = torch::stable::contiguous(weight);
  const Tensor dense_codes = torch::stable::contiguous(codes), dense_grad = torch::stable::contiguous(grad);
  const Tensor grad_weight = visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const Convolution<T> c(g);
    const auto compact = needs[1] ? Compact<T>(c.plan, data<const T>(signal)) : Compact<T>();
    const auto table = atom_table(c.plan, data<const T>(dense_weight));
    const auto planes = needs[0] ? c.planes() : Buffer<A>(0);
    Storage<A> storage(c.plan), gradients(c.plan);
    int64_t *const used = storage.restart(), *const gradients_used = gradients.restart();
    const int64_t count = c.share_count(needs[1], g.batch);
    const Shares<A> shares(count, needs[1] ? g.groups * c.plan.table_size() : 0, count);
    const Shares<double> biases(count, needs[2] ? g.code_channels : 0, count);
    const Shares<double> thetas(count, needs[3] ? g.code_channels : 0, count);
    c.for_each_share(count, [&](int64_t u, int64_t share, char* scratch) {
      const Unit& unit = c.plan.units[u];
      const PackedCodes<A> x = storage.codes(), gu = gradients.on(x);
      c.from_dense(u, data<const T>(dense_codes), nullptr, x, used, scratch);
      c.from_dense(u, data<const T>(dense_grad), x.masks, gu, gradients_used, scratch);
      const auto residual = needs[1] ? c.plane_of(u, compact) : Buffer<A>(0);
      A* const plane = needs[0] ? c.plane(planes, u) : nullptr;
      if (plane) std::memset(plane, 0, c.plan.plane_size * sizeof(A));
      const int64_t first_table = unit.group * c.plan.table_size(), first_atom = unit.group * c.atoms();
      c.kernel.packed_backward_analysis(
          {unit.pixels, c.atoms(), c.plan.base.data(), c.plan.patches(), c.part(x, u), c.part(gu, u), residual.get(),
           table.get() + first_table, needs[1] ? shares.of(share) + first_table : nullptr,
           needs[3] ? thetas.of(share) + first_atom : nullptr, needs[2] ? biases.of(share) + first_atom : nullptr,
           plane},
          scratch);
    });
    if (needs[0]) c.sum_planes(planes, data<T>(grad_y));
    const std::vector<double> bias_sum = biases.sum(), theta_sum = thetas.sum();  // empty where not asked for
    double all = 0;
    for (size_t m = 0; m < bias_sum.size(); ++m) data<T>(grad_bias)[m] = store<T>(static_cast<A>(bias_sum[m]));
    for (size_t m = 0; m < theta_sum.size(); ++m) {
      if (theta.dim() == 1) data<T>(grad_theta)[m] = store<T>(static_cast<A>(theta_sum[m]));
      all += theta_sum[m];
    }
    if (needs[3] && theta.dim() == 0) data<T>(grad_theta)[0] = store<T>(static_cast<A>(all));
    return needs[1] ? gradient_of<T>(c, shares, y, sizes(weight)) : wanted(1, {});
  });
  return {grad_y, grad_weight, grad_bias, grad_theta};
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
