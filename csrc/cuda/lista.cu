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
// The tape: the codes x_1 ... x_K, each with room for all atoms, then the planes r_0 ... r_{K-1}, of the whole batch.
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

// The packed codes x_0 ... x_K of a slice of the batch, of which x_0 may be absent, and the residuals.
template <typename A>
struct Tape {
  std::vector<PackedCode<A>> codes;
  std::vector<A*> residuals;
};

template <typename T>
int64_t tape_bytes(const Shape& shape, int64_t iterations) {
  using A = accumulate_t<T>;
  return iterations * (PackedSize<A>(shape).bytes() + shape.signal_size() * int64_t(sizeof(A)));
}

// From the signal `first` on, of a tape for the batch of `shape`.
template <typename T>
Tape<accumulate_t<T>> tape_at(const Shape& shape, int64_t iterations, void* memory, int64_t first) {
  using A = accumulate_t<T>;
  const PackedSize<A> size(shape);
  char* const begin = static_cast<char*>(memory);
  Tape<A> tape{{PackedCode<A>{}}, {}};
  for (int64_t k = 0; k < iterations; ++k) tape.codes.push_back(size.at(begin + k * size.bytes(), first));
  A* const residuals = reinterpret_cast<A*>(begin + iterations * size.bytes()) + first * shape.signal_item();
  for (int64_t k = 0; k < iterations; ++k) tape.residuals.push_back(residuals + k * shape.signal_size());
  return tape;
}

// Without a tape for backward: as many codes as an iteration needs at a time, one residual, for all iterations in turn.
template <typename T>
Tape<accumulate_t<T>> ring_at(const Shape& shape, int64_t iterations, int64_t codes, void* memory) {
  using A = accumulate_t<T>;
  const Tape<A> few = tape_at<T>(shape, codes, memory, 0);
  Tape<A> tape{{PackedCode<A>{}}, {}};
  for (int64_t k = 0; k < iterations; ++k) {
    tape.codes.push_back(few.codes[1 + k % codes]);
    tape.residuals.push_back(few.residuals[0]);
  }
  return tape;
}

// A slice of the batch goes through all iterations before the next one does, so that most of what an iteration reads
// is still in the L2 cache.
template <typename T>
class Forward {
 public:
  using A = accumulate_t<T>;

  Forward(const Problem& problem, bool one_sided, bool keep_tape, bool tensor_cores)
      : p(problem),
        one_sided(one_sided),
        keep_tape(keep_tape),
        ring(std::min<int64_t>(p.iterations, p.extrapolates() ? 3 : 2)),
        slice(Packed<T>::cached_slice(p.shape, ring, p.extrapolates() ? 3 : 2)),
        packed(p.y, p.shape.of_batch(slice), tensor_cores),
        memory(packed.bytes(keep_tape ? tape_bytes<T>(p.shape, p.iterations) : tape_bytes<T>(packed.shape, ring))),
        start(packed.bytes(p.x0 ? packed.size.bytes() : 0)),
        synthesis(p.extrapolates() ? packed.plane() : packed.bytes(0)),
        synthesis_table(packed.synthesis_table(data<T>(p.dictionary))),
        codes(empty(p.y, p.code_sizes(), p.y.scalar_type())) {
    for (int64_t k = 0; k < p.analysis.size(0); ++k)
      analysis_tables.push_back(packed.analysis_table(data<T>(p.analysis) + k * p.dictionary.numel()));
  }

  // The codes, and the tape where it is kept.
  std::tuple<Tensor, Tensor> run() const {
    for (int64_t first = 0; first < p.shape.batch(); first += slice) run_slice(first);
    return {codes, keep_tape ? memory : packed.bytes(0)};
  }

 private:
  void run_slice(int64_t first) const {
    const Packed<T> part = packed.of_batch(std::min(slice, p.shape.batch() - first));
    void* const begin = memory.mutable_data_ptr();
    Tape<A> tape = keep_tape ? tape_at<T>(p.shape, p.iterations, begin, first)
                             : ring_at<T>(packed.shape, p.iterations, ring, begin);
    if (p.x0) {
      tape.codes[0] = part.size.at(start.mutable_data_ptr());
      part.pack(Support::nonzeros, data<T>(*p.x0) + first * p.shape.code_item(), {}, tape.codes[0]);
    }
    for (int64_t k = 0; k < p.iterations; ++k) iterate(part, k, data<T>(p.y) + first * p.shape.signal_item(), tape);
    part.unpack(tape.codes.back(), mutable_data<T>(codes) + first * p.shape.code_item());
  }

  void iterate(const Packed<T>& part, int64_t k, const T* y, const Tape<A>& tape) const {
    const A w = static_cast<A>(p.weight(k));
    const PackedCode<A> before = k > 0 && w != A(0) ? tape.codes[k - 1] : PackedCode<A>{};
    Combine<T> combine{};
    combine.base = y;
    combine.tiles_scale = -(1 + w);
    combine.before = before.masks ? data<A>(synthesis) : nullptr;
    combine.before_scale = w;
    combine.kept = p.extrapolates() ? mutable_data<A>(synthesis) : nullptr;
    combine.out = tape.residuals[k];
    part.synthesize(tape.codes[k], synthesis_table, combine);
    Analysis<A> analysis{};
    analysis.plane = tape.residuals[k];
    analysis.first = {tape.codes[k], 1 + w};
    analysis.second = {before, -w};
    analysis.theta = data<A>(p.theta) + k * p.shape.atoms;
    analysis.one_sided = one_sided;
    analysis.out = tape.codes[k + 1];
    part.analyze(analysis, analysis_tables[p.table_of(k)]);
  }

  const Problem& p;
  const bool one_sided, keep_tape;
  const int64_t ring, slice;
  const Packed<T> packed;  // of a slice, as all below that are not of the whole batch
  const Tensor memory, start;
  const Tensor synthesis;  // of the code before
  const Tensor synthesis_table;
  std::vector<Tensor> analysis_tables;
  const Tensor codes;  // of the whole batch
};

struct Gradients {
  Tensor y, dictionary, analysis, theta, x0;
};

// As forward by slices; each leaves its sums for the gradients of weights and thresholds, which are added up at the
// end.
template <typename T>
class Backward {
 public:
  using A = accumulate_t<T>;

  Backward(const Problem& problem, const Tensor& grad, const Tensor& memory, const std::vector<bool>& needs,
           bool tensor_cores)
      : p(problem),
        grad(grad),
        memory(memory),
        needs(needs),
        slice(gradient_slice(p.shape)),
        slices(ceil_div(p.shape.batch(), slice)),
        weight_size(p.dictionary.numel()),
        packed(p.y, p.shape.of_batch(slice), tensor_cores),
        start(packed.bytes(p.x0 ? packed.size.bytes() : 0)),
        gradients(packed.bytes(ring() * packed.size.bytes())),
        h(packed.plane()),
        after(p.extrapolates() ? packed.plane() : packed.bytes(0)),
        dictionary_partials(packed.bytes(needs[1] ? packed.partials_size() * int64_t(sizeof(A)) : 0)),
        analysis_partials(packed.bytes(needs[2] ? packed.partials_size() * int64_t(sizeof(A)) : 0)),
        sums(packed.bytes(packed.sums_size() * int64_t(sizeof(A)))),
        dictionary_sums(slice_sums(needs[1], 1, weight_size)),
        analysis_sums(slice_sums(needs[2], p.analysis.size(0), weight_size)),
        theta_sums(slice_sums(needs[3], p.iterations, 2 * p.shape.atoms)),
        dictionary_table(packed.analysis_table(data<T>(p.dictionary))),
        out(results()) {
    STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Byte && memory.is_contiguous() &&
                        memory.device() == p.y.device() && memory.numel() == tape_bytes<T>(p.shape, p.iterations),
                    "dsc_ops: the tape is not one that lista wrote for these arguments");
    for (int64_t k = 0; k < p.analysis.size(0); ++k)
      synthesis_tables.push_back(packed.synthesis_table(data<T>(p.analysis) + k * weight_size));
  }

  Gradients run() const {
    for (int64_t i = 0; i < slices; ++i) run_slice(i);
    if (needs[1] && p.iterations == 1 && !p.x0) {  // no code but the last was more than zero
      cudaStream_t stream = current_stream(p.y);
      STD_CUDA_CHECK(cudaMemsetAsync(out.dictionary.mutable_data_ptr(), 0, weight_size * sizeof(T), stream));
    } else if (needs[1]) {
      packed.reduce_slices(dictionary_sums, slices, weight_size, mutable_data<T>(out.dictionary));
    }
    if (needs[2]) packed.reduce_slices(analysis_sums, slices, p.analysis.numel(), mutable_data<T>(out.analysis));
    if (needs[3]) packed.reduce_slices(theta_sums, slices, out.theta.numel(), mutable_data<T>(out.theta));
    return out;
  }

 private:
  int64_t ring() const { return p.extrapolates() ? 3 : 2; }

  // [slice][iteration or 1][count]
  Tensor slice_sums(bool wanted, int64_t of, int64_t count) const {
    return packed.bytes(wanted ? slices * of * count * int64_t(sizeof(A)) : 0);
  }

  Gradients results() const {
    const auto made = [&](bool wanted, const Sizes& size, ScalarType dtype) {
      return empty(p.y, wanted ? size : Sizes{0}, dtype);
    };
    const ScalarType dtype = p.y.scalar_type();
    return {made(needs[0], sizes(p.y), accumulate_dtype(p.y)), made(needs[1], sizes(p.dictionary), dtype),
            made(needs[2], sizes(p.analysis), dtype), made(needs[3], {p.iterations, 2, p.shape.atoms}, dtype),
            made(needs[4], p.code_sizes(), dtype)};
  }

  PackedCode<A> gradient(int64_t k) const {  // gu_k; gu_{-1} is the gradient of x_0
    return packed.size.at(static_cast<char*>(gradients.mutable_data_ptr()) + (k + 1) % ring() * packed.size.bytes());
  }

  void run_slice(int64_t index) const {
    const int64_t first = index * slice, code_begin = first * p.shape.code_item();
    const Packed<T> part = packed.of_batch(std::min(slice, p.shape.batch() - first));
    Tape<A> tape = tape_at<T>(p.shape, p.iterations, const_cast<void*>(memory.const_data_ptr()), first);
    if (p.x0) {  // its gradient is wanted everywhere
      tape.codes[0] = part.size.at(start.mutable_data_ptr());
      part.pack(needs[4] ? Support::everything : Support::nonzeros, data<T>(*p.x0) + code_begin, {}, tape.codes[0]);
    }
    part.pack(Support::of_code, data<T>(grad) + code_begin, tape.codes.back(), gradient(p.iterations - 1));
    for (int64_t k = p.iterations - 1; k >= 0; --k) {
      correlate_analysis(part, index, k, tape);
      if (needs[0] || tape.codes[k].masks) synthesize(part, first, k);
      if (!tape.codes[k].masks) break;
      if (needs[1]) correlate_dictionary(part, index, k, tape);
      if (k > 0 || needs[4]) analyze(part, k, tape);
    }
    if (needs[4]) part.unpack(gradient(-1), mutable_data<T>(out.x0) + code_begin);
  }

  void correlate_analysis(const Packed<T>& part, int64_t index, int64_t k, const Tape<A>& tape) const {
    const bool shared = p.analysis.size(0) == 1, last = k == p.iterations - 1;
    if (needs[2] || needs[3])
      part.correlate(tape.residuals[k], gradient(k), tape.codes[k + 1],
                     needs[2] ? mutable_data<A>(analysis_partials) : nullptr, mutable_data<A>(sums), shared && !last);
    if (needs[2] && (!shared || k == 0))
      part.reduce(analysis_partials, weight_size,
                  mutable_data<A>(analysis_sums) + (index * p.analysis.size(0) + p.table_of(k)) * weight_size);
    if (needs[3])
      part.reduce(sums, 2 * p.shape.atoms,
                  mutable_data<A>(theta_sums) + (index * p.iterations + k) * 2 * p.shape.atoms);
  }

  void synthesize(const Packed<T>& part, int64_t first, int64_t k) const {
    const A w = static_cast<A>(p.weight(k)), w_after = static_cast<A>(p.weight(k + 1));
    Combine<T> combine{};
    combine.tiles_scale = -(1 + w);
    combine.before = w_after != A(0) ? data<A>(after) : nullptr;
    combine.before_scale = w_after;
    combine.kept = p.extrapolates() ? mutable_data<A>(after) : nullptr;
    combine.total = needs[0] ? mutable_data<A>(out.y) + first * p.shape.signal_item() : nullptr;
    combine.opens = k == p.iterations - 1;
    combine.out = mutable_data<A>(h);
    part.synthesize(gradient(k), synthesis_tables[p.table_of(k)], combine);
  }

  void correlate_dictionary(const Packed<T>& part, int64_t index, int64_t k, const Tape<A>& tape) const {
    const int64_t first_code = p.x0 ? 0 : 1;  // that is more than zero
    part.correlate(data<A>(h), tape.codes[k], {}, mutable_data<A>(dictionary_partials), nullptr, k < p.iterations - 1);
    if (k == first_code)
      part.reduce(dictionary_partials, weight_size, mutable_data<A>(dictionary_sums) + index * weight_size);
  }

  void analyze(const Packed<T>& part, int64_t k, const Tape<A>& tape) const {
    const A w = static_cast<A>(p.weight(k)), w_after = static_cast<A>(p.weight(k + 1));
    Analysis<A> analysis{};
    analysis.plane = data<A>(h);
    analysis.first = {gradient(k), 1 + w};
    analysis.second = {w_after != A(0) ? gradient(k + 1) : PackedCode<A>{}, -w_after};
    analysis.support = tape.codes[k];
    analysis.out = gradient(k - 1);
    part.analyze(analysis, dictionary_table);
  }

  const Problem& p;
  const Tensor &grad, &memory;
  const std::vector<bool>& needs;
  const int64_t slice, slices, weight_size;
  const Packed<T> packed;  // of a slice
  const Tensor start, gradients;
  const Tensor h, after;  // -h_k, g_{k+1}
  const Tensor dictionary_partials, analysis_partials, sums;
  const Tensor dictionary_sums, analysis_sums, theta_sums;
  const Tensor dictionary_table;
  std::vector<Tensor> synthesis_tables;
  const Gradients out;  // of the whole batch
};

std::tuple<Tensor, Tensor> packed_lista(const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
                                        const Tensor& theta, const std::optional<Tensor>& x0,
                                        const std::vector<double>& momentum, const Sizes& stride, const Sizes& padding,
                                        bool one_sided, bool keep_tape, bool tensor_cores) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding);
  const DeviceGuard guard(y.get_device_index());
  return visit_dtype(y,
                     [&](auto zero) { return Forward<decltype(zero)>(p, one_sided, keep_tape, tensor_cores).run(); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> packed_lista_backward(
    const Tensor& grad, const Tensor& tape, const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
    const Tensor& theta, const std::optional<Tensor>& x0, const std::vector<double>& momentum, const Sizes& stride,
    const Sizes& padding, const std::vector<bool>& needs, bool tensor_cores) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding);
  STD_TORCH_CHECK(needs.size() == 5 && (!needs[4] || x0), "dsc_ops: needs must have 5 values, the last only with x0");
  check_shape(y, grad, p.code_sizes(), "grad");
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const DeviceGuard guard(y.get_device_index());
  const Gradients out = visit_dtype(
      y, [&](auto zero) { return Backward<decltype(zero)>(p, dense_grad, tape, needs, tensor_cores).run(); });
  return {out.y, out.dictionary, out.analysis, out.theta, out.x0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("packed_lista", TORCH_BOX(&packed_lista));
  library.impl("packed_lista_backward", TORCH_BOX(&packed_lista_backward));
}

}  // namespace dsc::cuda
