// lista on the CPU: K steps of x <- T(z + A_W(y - S_D z)) and their gradients (math.md sections 3 and 4).
//
// Between the steps a residual lives in accumulate_t<T>, a code in T. The tape holds x_1 .. x_{K-1}; backward computes
// the residuals again from it, which costs as much as the codes have non-zeros and saves a signal a step.
#include <algorithm>
#include <cstring>

#include "convolution.h"
#include "threshold.h"

namespace dsc::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// The arguments that forward and backward share, checked and made contiguous.
struct Problem {
  Geometry geometry;
  int64_t iterations;
  Sizes code_sizes;
  Tensor y, dictionary, analysis, theta;
  std::optional<Tensor> x0;
  std::vector<double> momentum;

  Problem(const Tensor& y_, const Tensor& dictionary_, const Tensor& analysis_, const Tensor& theta_,
          const std::optional<Tensor>& x0_, const std::vector<double>& momentum_, const Sizes& stride,
          const Sizes& padding, const Sizes& dilation, int64_t groups)
      : geometry(make_geometry(sizes(y_), sizes(dictionary_), stride, padding, dilation, groups)),
        iterations(theta_.dim() == 2 ? theta_.size(0) : 0),
        code_sizes(code_shape(geometry, y_.dim())),
        y(y_),
        dictionary(torch::stable::contiguous(dictionary_)),
        analysis(torch::stable::contiguous(analysis_)),
        theta(torch::stable::contiguous(theta_)),
        momentum(momentum_) {
    for (const auto& [tensor, name] :
         {std::pair{&dictionary_, "dictionary"}, std::pair{&analysis_, "analysis"}, std::pair{&theta_, "theta"}})
      check_like(y, *tensor, name);
    STD_TORCH_CHECK(iterations >= 1 && theta.size(1) == geometry.code_channels,
                    "dsc_ops: theta must be (iterations, M)");
    Sizes step(sizes(analysis));
    const int64_t weights = step.empty() ? 0 : step[0];
    if (!step.empty()) step.erase(step.begin());
    STD_TORCH_CHECK(step == sizes(dictionary) && (weights == 1 || weights == iterations),
                    "dsc_ops: analysis must be (1 or iterations, *dictionary shape)");
    STD_TORCH_CHECK(momentum.empty() || static_cast<int64_t>(momentum.size()) == iterations,
                    "dsc_ops: momentum must have one value per iteration");
    if (!x0_) return;
    check_shape(y, *x0_, code_sizes, "x0");
    x0 = torch::stable::contiguous(*x0_);
  }

  int64_t weight_of(int64_t k) const { return analysis.size(0) == 1 ? 0 : k; }
  bool extrapolates(int64_t k) const { return k >= 1 && !momentum.empty() && momentum[k] != 0; }
};

template <typename T>
Tensor empty_codes(const Problem& p) {
  return torch::stable::new_empty(p.y, p.code_sizes);
}

template <typename T>
void combine(accumulate_t<T> a, const T* x, accumulate_t<T> b, const T* y, T* out, int64_t size) {
  const Combine<T> problem = {a, x, b, y, out};
  parallel(size, 2 * elementwise_run, [&](int64_t begin, int64_t end) { kernels<T>().combine(problem, begin, end); });
}

// z_k = x_k + momentum_k (x_k - x_{k-1}), in `buffer`; x_k itself without momentum; null for a zero code. `before` is
// null for a zero code.
template <typename T>
const T* extrapolate(const Problem& p, int64_t k, const T* x, const T* before, T* buffer) {
  if (!p.extrapolates(k)) return x;
  const auto w = static_cast<accumulate_t<T>>(p.momentum[k]);
  combine<T>(1 + w, x, -w, before, buffer, p.geometry.code_size());
  return buffer;
}

// y - S_D z in `buffer`; y itself for a zero code.
template <typename T>
const accumulate_t<T>* residual(const Problem& p, const Tensor& signal, const accumulate_t<T>* dictionary, const T* z,
                                accumulate_t<T>* buffer) {
  using A = accumulate_t<T>;
  if (!z) return data<const A>(signal);
  std::memcpy(buffer, data<const A>(signal), p.geometry.signal_size() * sizeof(A));
  run_synthesis<T>(p.geometry, z, dictionary, A(-1), buffer);
  return buffer;
}

template <typename T>
std::vector<Buffer<accumulate_t<T>>> pack_all_for_analysis(const Problem& p) {
  std::vector<Buffer<accumulate_t<T>>> packed;
  const int64_t size = p.dictionary.numel();
  for (int64_t k = 0; k < p.analysis.size(0); ++k)
    packed.push_back(pack_for_analysis(p.geometry, data<const T>(p.analysis) + k * size));
  return packed;
}

template <typename T>
void forward(const Problem& p, bool one_sided, const Tensor& codes, const std::optional<Tensor>& tape) {
  using A = accumulate_t<T>;
  const Geometry& g = p.geometry;
  const int64_t size = g.code_size();
  const Tensor signal = widened<T>(p.y), thresholds = widened<T>(p.theta);
  const auto dictionary = pack_for_synthesis(g, data<const T>(p.dictionary));
  const auto weights = pack_all_for_analysis<T>(p);
  const Buffer<A> residual_buffer(g.signal_size());
  const Buffer<T> z_buffer(p.momentum.empty() ? 0 : size);
  // Without a tape, two codes alternate; three when momentum looks one further back.
  const int64_t slots = tape ? 0 : std::min<int64_t>(p.momentum.empty() ? 2 : 3, p.iterations - 1);
  const Buffer<T> spare(slots * size);
  const T* x = p.x0 ? data<const T>(*p.x0) : nullptr;
  const T* before = x;
  for (int64_t k = 0; k < p.iterations; ++k) {
    T* const next = k + 1 == p.iterations ? data<T>(codes)
                    : tape                ? data<T>(*tape) + k * size
                                          : spare.get() + k % slots * size;
    const T* const z = extrapolate<T>(p, k, x, before, z_buffer.get());
    Analysis<T> step{};
    step.geometry = g;
    step.signal = residual<T>(p, signal, dictionary.get(), z, residual_buffer.get());
    step.weight = weights[p.weight_of(k)].get();
    step.alpha = 1;
    step.residual = z;
    step.epilogue = one_sided ? Epilogue::soft_threshold_one_sided : Epilogue::soft_threshold;
    step.theta = data<const A>(thresholds) + k * g.code_channels;
    step.theta_stride = 1;
    step.codes = next;
    run_analysis(step);
    before = x;
    x = next;
  }
}

std::tuple<Tensor, Tensor> lista_cpu(const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
                                     const Tensor& theta, const std::optional<Tensor>& x0,
                                     const std::vector<double>& momentum, const Sizes& stride, const Sizes& padding,
                                     const Sizes& dilation, int64_t groups, bool one_sided, bool keep_tape) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups);
  Sizes tape_sizes = {0};
  if (keep_tape) {
    tape_sizes = p.code_sizes;
    tape_sizes.insert(tape_sizes.begin(), p.iterations - 1);
  }
  const Tensor codes = torch::stable::new_empty(y, p.code_sizes), tape = torch::stable::new_empty(y, tape_sizes);
  visit_dtype(y, [&](auto zero) {
    forward<decltype(zero)>(p, one_sided, codes, keep_tape ? std::optional<Tensor>(tape) : std::nullopt);
  });
  return {codes, tape};
}

struct Gradients {
  Tensor y, dictionary, analysis, theta, x0;
};

template <typename T>
Gradients backward(const Problem& p, bool one_sided, const Tensor& grad, const Tensor& codes, const Tensor& tape,
                   const std::vector<bool>& needs) {
  using A = accumulate_t<T>;
  const Geometry& g = p.geometry;
  const int64_t size = g.code_size(), weight_size = p.dictionary.numel(), last = p.iterations - 1;
  const Tensor signal = widened<T>(p.y);
  const auto dictionary = pack_for_synthesis(g, data<const T>(p.dictionary));
  const auto dictionary_for_analysis = pack_for_analysis(g, data<const T>(p.dictionary));
  const Buffer<A> residual_buffer(g.signal_size()), grad_residual(g.signal_size());
  const Buffer<T> z_buffer(p.momentum.empty() ? 0 : size);
  const auto zeros = [&](const Tensor& model, bool needed) {
    return torch::stable::new_zeros(model, needed ? sizes(model) : Sizes{0}, DType<A>::value);
  };
  const Tensor grad_y = zeros(p.y, needs[0]), grad_dictionary = zeros(p.dictionary, needs[1]);
  const Tensor grad_analysis = zeros(p.analysis, needs[2]);
  const Tensor grad_theta = torch::stable::new_empty(p.theta, needs[3] ? sizes(p.theta) : Sizes{0});
  // x_k for k = 1 .. K; x_0 may be absent.
  const auto code = [&](int64_t k) { return k > last ? codes : torch::stable::select(tape, 0, k - 1); };
  const auto code_data = [&](int64_t k) {
    return k >= 1 ? data<const T>(code(k)) : p.x0 ? data<const T>(*p.x0) : nullptr;
  };
  Tensor grad_x = grad;                                     // of x_{k+1}
  Tensor grad_z = empty_codes<T>(p), grad_before = grad_z;  // of z_k; of x_k by way of z_{k+1}
  bool has_before = false;
  for (int64_t k = last; k >= 0; --k) {
    const auto [grad_u, step_theta, unused] =
        soft_threshold_backward_cpu(grad_x, code(k + 1), torch::stable::select(p.theta, 0, k), one_sided);
    if (needs[3])
      std::memcpy(data<T>(grad_theta) + k * g.code_channels, data<T>(step_theta), g.code_channels * sizeof(T));
    const T* const z = extrapolate<T>(p, k, code_data(k), k >= 1 ? code_data(k - 1) : nullptr, z_buffer.get());
    if (needs[2]) {
      const A* const r = residual<T>(p, signal, dictionary.get(), z, residual_buffer.get());
      run_correlation<T>(g, r, data<const T>(grad_u), A(1), data<A>(grad_analysis) + p.weight_of(k) * weight_size);
    }
    const bool from_zero = k == 0 && !p.x0;
    if (from_zero && !needs[0]) break;
    const auto weight = pack_for_synthesis(g, data<const T>(p.analysis) + p.weight_of(k) * weight_size);
    std::memset(grad_residual.get(), 0, g.signal_size() * sizeof(A));
    run_synthesis<T>(g, data<const T>(grad_u), weight.get(), A(1), grad_residual.get());
    if (needs[0])
      for (int64_t i = 0; i < g.signal_size(); ++i) data<A>(grad_y)[i] += grad_residual.get()[i];
    if (from_zero) break;
    if (needs[1]) run_correlation<T>(g, grad_residual.get(), z, A(-1), data<A>(grad_dictionary));
    if (k == 0 && !needs[4]) break;
    grad_z = empty_codes<T>(p);
    Analysis<T> step{};
    step.geometry = g;
    step.signal = grad_residual.get();
    step.weight = dictionary_for_analysis.get();
    step.alpha = -1;
    step.residual = data<const T>(grad_u);
    step.codes = data<T>(grad_z);
    run_analysis(step);
    // z_k = (1 + w) x_k - w x_{k-1}
    const A w = p.extrapolates(k) ? static_cast<A>(p.momentum[k]) : A(0);
    grad_x = grad_z;
    if (w != 0 || has_before) {
      grad_x = empty_codes<T>(p);
      combine<T>(1 + w, data<const T>(grad_z), 1, has_before ? data<const T>(grad_before) : nullptr, data<T>(grad_x),
                 size);
    }
    has_before = w != 0;
    if (has_before) {
      grad_before = empty_codes<T>(p);
      combine<T>(-w, data<const T>(grad_z), 0, nullptr, data<T>(grad_before), size);
    }
  }
  const auto rounded = [&](const Tensor& values, const Tensor& model) {
    if (values.scalar_type() == model.scalar_type()) return values;
    const Tensor out = torch::stable::new_empty(model, sizes(values));
    round_to<T>(data<const A>(values), out);
    return out;
  };
  return {rounded(grad_y, p.y), rounded(grad_dictionary, p.dictionary), rounded(grad_analysis, p.analysis), grad_theta,
          needs[4] ? grad_x : torch::stable::new_empty(p.y, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lista_backward_cpu(
    const Tensor& grad, const Tensor& codes, const Tensor& tape, const Tensor& y, const Tensor& dictionary,
    const Tensor& analysis, const Tensor& theta, const std::optional<Tensor>& x0, const std::vector<double>& momentum,
    const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups, bool one_sided,
    const std::vector<bool>& needs) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups);
  STD_TORCH_CHECK(needs.size() == 5 && (!needs[4] || x0), "dsc_ops: needs must have 5 values, the last only with x0");
  check_shape(y, grad, p.code_sizes, "grad");
  check_shape(y, codes, p.code_sizes, "codes");
  check_like(y, tape, "the tape");
  STD_TORCH_CHECK(tape.numel() == (p.iterations - 1) * p.geometry.code_size() && tape.size(0) == p.iterations - 1,
                  "dsc_ops: the tape has the wrong size");
  const Gradients out = visit_dtype(y, [&](auto zero) {
    return backward<decltype(zero)>(p, one_sided, torch::stable::contiguous(grad), torch::stable::contiguous(codes),
                                    torch::stable::contiguous(tape), needs);
  });
  return {out.y, out.dictionary, out.analysis, out.theta, out.x0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("lista", TORCH_BOX(&lista_cpu));
  library.impl("lista_backward", TORCH_BOX(&lista_backward_cpu));
}

}  // namespace dsc::cpu
