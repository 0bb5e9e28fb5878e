// lista on packed codes, K steps of x <- T(z + A_W(y - S_D z)), z = x + momentum[k] (x - x_before), and its gradients.
//
// S is linear, so residuals and gradients of z are combined from those of the codes x, and every kernel meets one code.
// With s_k = S_D x_k and w_k the momentum, forward
//
//   r_k = y - (1 + w_k) s_k + w_k s_{k-1},   x_{k+1} = T((1 + w_k) x_k - w_k x_{k-1} + A_W r_k)
//
// and backward, from gu_k, the gradient of what is thresholded in step k, which lives on the support of x_{k+1}:
//
//   g_k = S_W gu_k,   h_k = (1 + w_k) g_k - w_{k+1} g_{k+1},   dy = sum g_k,   dW_k = corr(r_k, gu_k)
//   dD = -sum corr(h_k, x_k),   gu_{k-1} = (1 + w_k) gu_k - w_{k+1} gu_{k+1} - A_D h_k on the support of x_k
//
// The tape: the codes x_1 ... x_K, each with room for all atoms, then the planes r_0 ... r_{K-1}.
#include "packed.h"

namespace dsc::cuda {
namespace {

struct Problem {
  Tensor y, dictionary, analysis, theta;  // contiguous; theta in the type of sums
  std::optional<Tensor> x0;
  std::vector<double> momentum;
  Shape shape;
  int64_t iterations;

  Problem(const Tensor& y_, const Tensor& dictionary_, const Tensor& analysis_, const Tensor& theta_,
          const std::optional<Tensor>& x0_, const std::vector<double>& momentum_, const Sizes& stride,
          const Sizes& padding)
      : y(torch::stable::contiguous(y_)),
        dictionary(torch::stable::contiguous(dictionary_)),
        analysis(torch::stable::contiguous(analysis_)),
        theta(torch::stable::contiguous(theta_)),
        x0(contiguous(x0_, MemoryFormat::Contiguous)),
        momentum(momentum_),
        shape(make_shape(y_, dictionary_, 0, stride, padding)),
        iterations(theta_.dim() == 2 ? theta_.size(0) : 0) {
    check_like(y, dictionary, "dictionary");
    Sizes weights = sizes(dictionary);
    weights.insert(weights.begin(), analysis.dim() > 0 && analysis.size(0) == 1 ? 1 : iterations);
    check_shape(y, analysis, weights, "analysis");
    STD_TORCH_CHECK(iterations > 0 && theta.size(1) == shape.atoms && theta.scalar_type() == accumulate_dtype(y) &&
                        theta.device() == y.device(),
                    "dsc_ops: theta must be (iterations, M), in the type of sums");
    STD_TORCH_CHECK(momentum.empty() || int64_t(momentum.size()) == iterations,
                    "dsc_ops: momentum must have one value per iteration");
    if (x0) check_shape(y, *x0, code_sizes(), "x0");
  }

  Sizes code_sizes() const {
    Sizes result{y.size(0), dictionary.size(0)};
    if (y.dim() == 4) result.push_back(shape.code_h);
    result.push_back(shape.code_w);
    return result;
  }
  double weight(int64_t k) const { return momentum.empty() || k == 0 || k >= iterations ? 0.0 : momentum[k]; }
  bool extrapolates() const {
    for (int64_t k = 1; k < iterations; ++k)
      if (weight(k) != 0) return true;
    return false;
  }
  int64_t table_of(int64_t k) const { return analysis.size(0) == 1 ? 0 : k; }
};

// The packed codes x_0 ... x_K, of which x_0 may be absent, and the residuals.
template <typename A>
struct Tape {
  std::vector<PackedCode<A>> codes;
  std::vector<A*> residuals;
};

template <typename T>
int64_t tape_bytes(const Packed<T>& packed, int64_t iterations) {
  return iterations * (packed.size.bytes() + packed.shape.signal_size() * int64_t(sizeof(accumulate_t<T>)));
}

template <typename T>
Tape<accumulate_t<T>> tape_at(const Packed<T>& packed, int64_t iterations, void* memory) {
  using A = accumulate_t<T>;
  char* const begin = static_cast<char*>(memory);
  Tape<A> tape{{PackedCode<A>{}}, {}};
  for (int64_t k = 0; k < iterations; ++k) tape.codes.push_back(packed.size.at(begin + k * packed.size.bytes()));
  A* const residuals = reinterpret_cast<A*>(begin + iterations * packed.size.bytes());
  for (int64_t k = 0; k < iterations; ++k) tape.residuals.push_back(residuals + k * packed.shape.signal_size());
  return tape;
}

// Without a tape for backward: as many codes as an iteration needs at a time, one residual, for all iterations in turn.
template <typename T>
Tape<accumulate_t<T>> ring_at(const Packed<T>& packed, int64_t iterations, int64_t codes, void* memory) {
  using A = accumulate_t<T>;
  const Tape<A> few = tape_at(packed, codes, memory);
  Tape<A> tape{{PackedCode<A>{}}, {}};
  for (int64_t k = 0; k < iterations; ++k) {
    tape.codes.push_back(few.codes[1 + k % codes]);
    tape.residuals.push_back(few.residuals[0]);
  }
  return tape;
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Problem& p, bool one_sided, bool keep_tape, bool tensor_cores) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(p.y.get_device_index());
  const Packed<T> packed(p.y, p.shape, tensor_cores);
  const bool extrapolates = p.extrapolates();
  const int64_t ring = std::min<int64_t>(p.iterations, extrapolates ? 3 : 2);
  const Tensor memory = packed.bytes(tape_bytes(packed, keep_tape ? p.iterations : ring));
  Tape<A> tape = keep_tape ? tape_at(packed, p.iterations, memory.mutable_data_ptr())
                           : ring_at(packed, p.iterations, ring, memory.mutable_data_ptr());
  const Tensor start = packed.bytes(p.x0 ? packed.size.bytes() : 0);
  if (p.x0) {
    tape.codes[0] = packed.size.at(start.mutable_data_ptr());
    packed.pack(Support::nonzeros, data<T>(*p.x0), {}, tape.codes[0]);
  }
  const Tensor synthesis_table = packed.synthesis_table(data<T>(p.dictionary));
  const Tensor synthesis = extrapolates ? packed.plane() : packed.bytes(0);  // of the code before
  Tensor analysis_table = packed.bytes(0);
  for (int64_t k = 0; k < p.iterations; ++k) {
    if (k == 0 || p.table_of(k) != p.table_of(k - 1))
      analysis_table = packed.analysis_table(data<T>(p.analysis) + p.table_of(k) * p.dictionary.numel());
    const A w = static_cast<A>(p.weight(k));
    const PackedCode<A> before = k > 0 && w != A(0) ? tape.codes[k - 1] : PackedCode<A>{};
    Combine<T> combine{};
    combine.base = data<T>(p.y);
    combine.tiles_scale = -(1 + w);
    combine.before = before.masks ? data<A>(synthesis) : nullptr;
    combine.before_scale = w;
    combine.kept = extrapolates ? mutable_data<A>(synthesis) : nullptr;
    combine.out = tape.residuals[k];
    packed.synthesize(tape.codes[k], synthesis_table, combine);
    Analysis<A> analysis{};
    analysis.plane = tape.residuals[k];
    analysis.first = {tape.codes[k], 1 + w};
    analysis.second = {before, -w};
    analysis.theta = data<A>(p.theta) + k * p.shape.atoms;
    analysis.one_sided = one_sided;
    analysis.out = tape.codes[k + 1];
    packed.analyze(analysis, analysis_table);
  }
  const Tensor codes = empty(p.y, p.code_sizes(), p.y.scalar_type());
  packed.unpack(tape.codes.back(), mutable_data<T>(codes));
  return {codes, keep_tape ? memory : packed.bytes(0)};
}

struct Gradients {
  Tensor y, dictionary, analysis, theta, x0;
};

template <typename T>
Gradients backward(const Problem& p, const Tensor& grad, const Tensor& memory, const std::vector<bool>& needs,
                   bool tensor_cores) {
  using A = accumulate_t<T>;
  const DeviceGuard guard(p.y.get_device_index());
  const Packed<T> packed(p.y, p.shape, tensor_cores);
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
                      memory.device() == p.y.device() && memory.numel() == tape_bytes(packed, p.iterations),
                  "dsc_ops: the tape is not one that lista wrote for these arguments");
  Tape<A> tape = tape_at(packed, p.iterations, const_cast<void*>(memory.const_data_ptr()));
  const Tensor start = packed.bytes(p.x0 ? packed.size.bytes() : 0);
  if (p.x0) {  // its gradient is wanted everywhere
    tape.codes[0] = packed.size.at(start.mutable_data_ptr());
    packed.pack(needs[4] ? Support::everything : Support::nonzeros, data<T>(*p.x0), {}, tape.codes[0]);
  }
  const auto made = [&](bool wanted, const Sizes& size, ScalarType dtype) {
    return empty(p.y, wanted ? size : Sizes{0}, dtype);
  };
  const ScalarType dtype = p.y.scalar_type(), wide = accumulate_dtype(p.y);
  Gradients out{made(needs[0], sizes(p.y), wide), made(needs[1], sizes(p.dictionary), dtype),
                made(needs[2], sizes(p.analysis), dtype), made(needs[3], {p.iterations, 2, p.shape.atoms}, dtype),
                made(needs[4], p.code_sizes(), dtype)};
  const bool extrapolates = p.extrapolates();
  const int64_t weight_size = p.dictionary.numel(), ring = extrapolates ? 3 : 2;
  const Tensor gradient_memory = packed.bytes(ring * packed.size.bytes());
  const auto gradient = [&](int64_t k) {  // gu_k; gu_{-1} is the gradient of x_0
    return packed.size.at(static_cast<char*>(gradient_memory.mutable_data_ptr()) +
                          (k + 1) % ring * packed.size.bytes());
  };
  const Tensor h = packed.plane(), after = extrapolates ? packed.plane() : packed.bytes(0);  // -h_k, g_{k+1}
  const Tensor dictionary_partials = packed.bytes(needs[1] ? packed.partials_size() * int64_t(sizeof(A)) : 0);
  const Tensor analysis_partials = packed.bytes(needs[2] ? packed.partials_size() * int64_t(sizeof(A)) : 0);
  const Tensor sums = packed.bytes(packed.sums_size() * int64_t(sizeof(A)));
  const Tensor dictionary_table = packed.analysis_table(data<T>(p.dictionary));
  Tensor synthesis_table = packed.bytes(0);

  packed.pack(Support::of_code, data<T>(grad), tape.codes.back(), gradient(p.iterations - 1));
  bool dictionary_opens = true;
  for (int64_t k = p.iterations - 1; k >= 0; --k) {
    const bool last = k == p.iterations - 1, shared = p.analysis.size(0) == 1;
    const A w = static_cast<A>(p.weight(k)), w_after = static_cast<A>(p.weight(k + 1));
    const PackedCode<A> x = tape.codes[k];
    if (needs[2] || needs[3])
      packed.correlate(tape.residuals[k], gradient(k), tape.codes[k + 1],
                       needs[2] ? mutable_data<A>(analysis_partials) : nullptr, mutable_data<A>(sums), shared && !last);
    if (needs[2] && (!shared || k == 0))
      packed.reduce(analysis_partials, weight_size, mutable_data<T>(out.analysis) + p.table_of(k) * weight_size);
    if (needs[3]) packed.reduce(sums, 2 * p.shape.atoms, mutable_data<T>(out.theta) + k * 2 * p.shape.atoms);
    if (!needs[0] && !x.masks) break;

    if (last || !shared) synthesis_table = packed.synthesis_table(data<T>(p.analysis) + p.table_of(k) * weight_size);
    Combine<T> combine{};
    combine.tiles_scale = -(1 + w);
    combine.before = w_after != A(0) ? data<A>(after) : nullptr;
    combine.before_scale = w_after;
    combine.kept = extrapolates ? mutable_data<A>(after) : nullptr;
    combine.total = needs[0] ? mutable_data<A>(out.y) : nullptr;
    combine.opens = last;
    combine.out = mutable_data<A>(h);
    packed.synthesize(gradient(k), synthesis_table, combine);
    if (!x.masks) break;
    if (needs[1]) packed.correlate(data<A>(h), x, {}, mutable_data<A>(dictionary_partials), nullptr, !dictionary_opens);
    dictionary_opens = false;
    if (k == 0 && !needs[4]) break;

    Analysis<A> analysis{};
    analysis.plane = data<A>(h);
    analysis.first = {gradient(k), 1 + w};
    analysis.second = {w_after != A(0) ? gradient(k + 1) : PackedCode<A>{}, -w_after};
    analysis.support = x;
    analysis.out = gradient(k - 1);
    packed.analyze(analysis, dictionary_table);
  }
  if (needs[1] && dictionary_opens) {  // no code but the last was more than zero
    cudaStream_t stream = current_stream(p.y);
    STD_CUDA_CHECK(cudaMemsetAsync(out.dictionary.mutable_data_ptr(), 0, weight_size * sizeof(T), stream));
  } else if (needs[1]) {
    packed.reduce(dictionary_partials, weight_size, mutable_data<T>(out.dictionary));
  }
  if (needs[4]) packed.unpack(gradient(-1), mutable_data<T>(out.x0));
  return out;
}

std::tuple<Tensor, Tensor> packed_lista(const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
                                        const Tensor& theta, const std::optional<Tensor>& x0,
                                        const std::vector<double>& momentum, const Sizes& stride, const Sizes& padding,
                                        bool one_sided, bool keep_tape, bool tensor_cores) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding);
  return visit_dtype(y, [&](auto zero) { return forward<decltype(zero)>(p, one_sided, keep_tape, tensor_cores); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_lista_backward(
    const Tensor& grad, const Tensor& tape, const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
    const Tensor& theta, const std::optional<Tensor>& x0, const std::vector<double>& momentum, const Sizes& stride,
    const Sizes& padding, const std::vector<bool>& needs, bool tensor_cores) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding);
  STD_TORCH_CHECK(needs.size() == 5 && (!needs[4] || x0), "dsc_ops: needs must have 5 values, the last only with x0");
  check_shape(y, grad, p.code_sizes(), "grad");
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const Gradients out =
      visit_dtype(y, [&](auto zero) { return backward<decltype(zero)>(p, dense_grad, tape, needs, tensor_cores); });
  return {out.y, out.dictionary, out.analysis, out.theta, out.x0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("packed_lista", TORCH_BOX(&packed_lista));
  library.impl("packed_lista_backward", TORCH_BOX(&packed_lista_backward));
}

}  // namespace dsc::cuda
