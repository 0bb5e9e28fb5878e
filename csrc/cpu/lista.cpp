// lista on the CPU: K steps of x <- T(z + A_W(y - S_D z)) and their gradients (math.md sections 3 and 4).
//
// Codes are packed (core/code_format.h) from the first step to the last, and so are their gradients, which are needed
// on the support of a code alone. A step has two phases: every unit adds S_D z to its plane; then every unit makes the
// residual of its part of the signal from the planes that meet there, and the next code from it. Backward has one phase
// a step: every unit makes S_W gu of its part from the planes that meet there, ends step k + 1 with it, and begins step
// k, which leaves its plane for the next phase. Units of whole images meet no others: they go through a whole step at
// once, with planes of their thread. The tape holds x_1 .. x_K, and the residuals where a signal is much smaller than a
// code; elsewhere backward computes them again, which costs as much as the codes have non-zeros.
//
// A slice of the batch goes through all steps before the next one starts, so that what lies between the steps takes the
// memory of a slice, not of the batch, and is still in a cache when it is read. Where there are many images, a slice is
// as small as a unit, or one image cut into units, and threads take slices, which never wait for each other; else
// threads share the units of a phase.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "convolution.h"
#include "tape_memory.h"
#include "units.h"

namespace dsc::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// The arguments that forward and backward share, checked and made contiguous.
struct Problem {
  Geometry geometry;
  int64_t batch;      // images of the tensors
  int64_t first = 0;  // which of them is the first of this problem
  int64_t iterations;
  Sizes code_sizes;
  Tensor y, dictionary, analysis, theta;
  std::optional<Tensor> x0;
  std::vector<double> momentum;

  Problem(const Tensor& y_, const Tensor& dictionary_, const Tensor& analysis_, const Tensor& theta_,
          const std::optional<Tensor>& x0_, const std::vector<double>& momentum_, const Sizes& stride,
          const Sizes& padding, const Sizes& dilation, int64_t groups)
      : geometry(make_geometry(sizes(y_), sizes(dictionary_), stride, padding, dilation, groups)),
        batch(geometry.batch),
        iterations(theta_.dim() == 2 ? theta_.size(0) : 0),
        code_sizes(code_shape(geometry, y_.dim())),
        y(torch::stable::contiguous(y_)),
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

  // Slices are the same problem for some of the images. Where one thread takes a slice through all steps, gradients of
  // weights are collected in groups of slices, each of which has tables for all steps; where atoms are long that is too
  // much memory. Without groups, threads share the units of a slice.
  struct Slices {
    int64_t images, strips, groups;  // strips of an image, those of the whole batch
    int64_t count(int64_t batch) const { return (batch + images - 1) / images; }
  };
  // The tape is laid out by slices, so the choice is by shapes alone. Only images that are cut into strips depend on
  // the number of threads: slices of one image have the same units, sums and tape as one slice of all images.
  Slices slices() const {
    constexpr int64_t most_groups = 16, most_bytes = int64_t{4} << 20, least_images = 4;  // of a thread
    const int64_t table = geometry.code_channels * (geometry.patch() + 16) * 4;           // bytes, about
    Slices slices{images_of_unit(geometry), strips_of_image(geometry), 0};
    if (slices.strips > 1 && geometry.groups == 1 && geometry.batch >= least_images * torch::stable::get_num_threads())
      slices.images = 1;
    if (slices.images > 0) slices.groups = std::min(most_groups, slices.count(geometry.batch));
    if (slices.groups == 0 || slices.groups * (analysis.size(0) + 1) * table > most_bytes)
      return {images_of_slice(geometry), slices.strips, 0};
    return slices;
  }
  Problem slice(int64_t from, int64_t images) const {
    Problem slice = *this;
    slice.first = from;
    slice.geometry.batch = std::min(images, geometry.batch - from);
    return slice;
  }

  // Where the first image begins in a signal and in a code.
  int64_t signal_from() const { return first * geometry.signal_channels * geometry.signal_pixels(); }
  int64_t code_from() const { return first * geometry.code_channels * geometry.code_pixels(); }
  // Where a residual costs little memory beside a packed code, the tape keeps it.
  bool keeps_residuals() const {
    return 16 * geometry.signal_channels * geometry.signal_pixels() <= geometry.code_channels * geometry.code_pixels();
  }
  int64_t weight_of(int64_t k) const { return analysis.size(0) == 1 ? 0 : k; }
  bool extrapolates(int64_t k) const { return k >= 1 && !momentum.empty() && momentum[k] != 0; }
};

// Whether every place lies in the arena of `capacity` values and has as many values as its masks have bits: what memory
// safety needs of a tape that came from outside.
template <typename T>
bool well_formed(const Units<T>& units, const PackedCodes<accumulate_t<T>>& codes, int64_t capacity, int64_t u) {
  const int64_t atoms = units.atoms(), bytes = mask_bytes(atoms), pixels = units.plan.units[u].pixels;
  const PackedCodes<accumulate_t<T>> part = units.part(codes, u);
  for (int64_t pixel = 0; pixel < pixels; pixel += block_pixels) {
    const Place place = part.places[pixel / block_pixels];
    if (place.first < 0 || place.count < 0 || place.count > capacity || place.first > capacity - place.count)
      return false;
    const uint8_t* const masks = part.masks + pixel * bytes;
    const int64_t size = std::min(pixels - pixel, block_pixels) * bytes;
    if (units.kernel.count_bits(masks, size) != place.count) return false;
    for (int64_t end = bytes; atoms % 64 != 0 && end <= size; end += bytes) {  // no bits beyond the atoms
      uint64_t bits;
      std::memcpy(&bits, masks + end - 8, 8);
      if (bits >> atoms % 64 != 0) return false;
    }
  }
  return true;
}

// The tape of all images, of which a problem sees its own. The arena of values is common to all.
template <typename A>
class Tape {
 public:
  // all: the geometry of the whole batch.
  Tape(const Problem& p, const Geometry& all, const Tensor& memory)
      : layout_(all, p.iterations, sizeof(A)),
        memory_(data<char>(memory)),
        pixels_(all.batch * all.groups * all.code_pixels()),
        first_pixel_(p.first * all.groups * all.code_pixels()),
        mask_size_(mask_bytes(all.group_code_channels())),
        signal_size_(all.signal_size()),
        signal_from_(p.signal_from()),
        capacity_(p.iterations * all.code_size()) {}

  // x_{k+1}
  PackedCodes<A> codes(int64_t k) const {
    const int64_t pixel = k * pixels_ + first_pixel_;
    return {reinterpret_cast<uint8_t*>(memory_ + layout_.masks) + pixel * mask_size_,
            reinterpret_cast<Place*>(memory_ + layout_.places) + k * layout_.step_places + first_place(first_pixel_),
            reinterpret_cast<A*>(memory_ + layout_.values)};
  }
  // y - S_D z_k, compact
  A* residual(int64_t k) const {
    return reinterpret_cast<A*>(memory_ + layout_.residuals) + k * signal_size_ + signal_from_;
  }

  int64_t capacity() const { return capacity_; }  // of the arena, in values

 private:
  TapeLayout layout_;
  char* memory_;
  int64_t pixels_, first_pixel_, mask_size_, signal_size_, signal_from_, capacity_;
};

// The units of slices of one size, with what both directions need of the problem.
template <typename T>
struct Solver : Units<T> {
  using typename Units<T>::A;
  using typename Units<T>::Codes;
  Compact<T> signal;  // y
  std::optional<Storage<A>> start_storage;
  Codes start{};  // x_0
  // Of what lies between the steps, the same memory for one slice after the other: the system clears what is new.
  std::vector<Storage<A>> between;

  Solver(const Problem& p, int64_t strips) : Units<T>(p.geometry, strips) { load(p); }

  void reserve_between(int64_t count) {
    while (static_cast<int64_t>(between.size()) < count) between.emplace_back(this->plan);
  }

  // Another slice of the same size.
  void load(const Problem& p) {
    signal = Compact<T>(this->plan, data<const T>(p.y) + p.signal_from());
    if (!p.x0) return;
    if (!start_storage) start_storage.emplace(this->plan);
    int64_t* const used = start_storage->restart();
    start = start_storage->codes();
    this->for_each([&](int64_t u, char* scratch) {
      this->from_dense(u, data<const T>(*p.x0) + p.code_from(), nullptr, start, used, scratch);
    });
  }
};

// Calls body(solver, problem, group) for every slice: in parallel over groups, or one after the other (group 0).
template <typename T, typename Body>
void for_each_slice(const Problem& p, const Problem::Slices& slices, const Body& body) {
  const int64_t count = slices.count(p.geometry.batch);
  const auto run = [&](int64_t begin, int64_t end, int64_t group, std::optional<Solver<T>>& solver) {
    for (int64_t i = begin; i < end; ++i) {
      const Problem slice = p.slice(i * slices.images, slices.images);
      if (solver && solver->plan.g.batch == slice.geometry.batch)
        solver->load(slice);
      else
        solver.emplace(slice, slices.groups > 0 ? slices.strips : strips_of_image(slice.geometry));
      body(*solver, slice, group);
    }
  };
  if (slices.groups == 0) {
    std::optional<Solver<T>> solver;
    return run(0, count, 0, solver);
  }
  parallel_tasks(slices.groups, 1, [&] {
    return [&, solver = std::optional<Solver<T>>()](int64_t group) mutable {
      run(count * group / slices.groups, count * (group + 1) / slices.groups, group, solver);
    };
  });
}

// What the kernels read of the arguments that all slices share.
template <typename T>
struct Weights {
  using A = accumulate_t<T>;
  Buffer<A> dictionary;  // its table
  std::vector<AnalysisWeight<T>> analysis;
  std::vector<Buffer<A>> theta;

  // keep: analysis of all steps, else of the step at hand.
  Weights(const Problem& p, const Units<T>& units, bool keep)
      : dictionary(atom_table(units.plan, data<const T>(p.dictionary))) {
    for (int64_t w = 0; w < (keep ? p.analysis.size(0) : 0); ++w) analysis.push_back(analysis_of(p, units, w));
    for (int64_t k = 0; k < p.iterations; ++k)
      theta.push_back(units.by_group(data<const T>(p.theta) + k * p.geometry.code_channels, 1));
  }
  static AnalysisWeight<T> analysis_of(const Problem& p, const Units<T>& units, int64_t w) {
    return {units.plan, data<const T>(p.analysis) + w * p.dictionary.numel(), A(1)};
  }
};

// The codes of a slice. With a tape, tape_used counts the values of all slices.
template <typename T>
void forward(const Problem& p, Solver<T>& s, const Weights<T>& weights, bool one_sided, T* codes,
             const std::optional<Tape<accumulate_t<T>>>& tape, int64_t* tape_used) {
  using A = accumulate_t<T>;
  const Plan& plan = s.plan;
  const bool together = plan.of_whole_images();
  const Buffer<A> planes = together ? Buffer<A>(0) : s.planes();
  // Without a tape two codes take turns, or three where momentum looks one further back.
  const int64_t turns = tape ? 0 : p.momentum.empty() ? 2 : 3;
  s.reserve_between(turns + (p.momentum.empty() ? 0 : 1));
  const auto turn = [&](int64_t k) -> Storage<A>& { return s.between[k % turns]; };
  std::optional<AnalysisWeight<T>> packed;  // of the step at hand
  int64_t packed_weight = -1;
  PackedCodes<A> x = s.start, before = s.start;
  for (int64_t k = 0; k < p.iterations; ++k) {
    const PackedCodes<A> next = tape ? tape->codes(k) : turn(k).codes();
    int64_t* const used = tape ? tape_used : turn(k).restart();
    const bool extrapolates = p.extrapolates(k);
    const PackedCodes<A> z = extrapolates ? s.between[turns].codes() : x;
    int64_t* const z_used = extrapolates ? s.between[turns].restart() : nullptr;
    const A w = extrapolates ? static_cast<A>(p.momentum[k]) : A(0);
    const int64_t own = p.weight_of(k);
    if (weights.analysis.empty() && own != packed_weight)
      packed.emplace(Weights<T>::analysis_of(p, s, packed_weight = own));
    const AnalysisWeight<T>& weight = weights.analysis.empty() ? *packed : weights.analysis[own];
    const auto synthesize = [&](int64_t u, A* plane, char* scratch) {
      if (extrapolates) s.combine(u, 1 + w, x, -w, before, nullptr, z, z_used, scratch);
      s.synthesize(u, z, weights.dictionary.get(), plane, scratch);
    };
    if (z.masks && !together) s.for_each([&](int64_t u, char* scratch) { synthesize(u, s.plane(planes, u), scratch); });
    s.for_each([&](int64_t u, char* scratch) {
      const Buffer<A> plane(plan.analysis_planes());
      if (z.masks && together) synthesize(u, plane.get(), scratch);
      const A* const synthesized = !z.masks ? nullptr : together ? plane.get() : s.plane(planes, u);
      make_plane(plan, u, s.signal.get(), synthesized, A(-1), plane.get(),
                 tape && p.keeps_residuals() ? tape->residual(k) : nullptr, false);
      s.analyze(u, plane.get(), weight, weights.theta[k].get(), one_sided, z, next, used, scratch);
      if (k + 1 == p.iterations) s.to_dense(u, next, codes, scratch);
    });
    before = x;
    x = next;
  }
}

std::tuple<Tensor, Tensor> lista_cpu(const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
                                     const Tensor& theta, const std::optional<Tensor>& x0,
                                     const std::vector<double>& momentum, const Sizes& stride, const Sizes& padding,
                                     const Sizes& dilation, int64_t groups, bool one_sided, bool keep_tape) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups);
  const Tensor codes = torch::stable::new_empty(y, p.code_sizes);
  const int64_t bytes = visit_dtype(
      y, [&](auto zero) { return TapeLayout(p.geometry, p.iterations, sizeof(accumulate_t<decltype(zero)>)).bytes; });
  const Tensor tape = tape_memory(y, keep_tape ? bytes : 0);
  // Where one thread does it all, equal calls give equal tapes, which tools that compare an operator's results expect.
  use_large_pages(data<char>(codes), codes.numel() * static_cast<int64_t>(codes.element_size()));
  if (keep_tape) use_large_pages(data<char>(tape), bytes);
  if (keep_tape && bytes <= 65536) std::memset(data<char>(tape), 0, bytes);
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    const Problem::Slices slices = p.slices();
    const Weights<T> weights(p, Units<T>(p.geometry, slices.strips), slices.groups > 0);
    int64_t used = 0;
    for_each_slice<T>(p, slices, [&](Solver<T>& solver, const Problem& slice, int64_t) {
      std::optional<Tape<accumulate_t<T>>> kept;
      if (keep_tape) kept.emplace(slice, p.geometry, tape);
      forward<T>(slice, solver, weights, one_sided, data<T>(codes) + slice.code_from(), kept, &used);
    });
  });
  return {codes, tape};
}

// What backward is asked for: gradients of y and x0 of each image, sums over all images of the others.
template <typename T>
struct Gradients {
  using A = accumulate_t<T>;
  bool y, dictionary, analysis, theta, x0;  // which
  Tensor of_y, of_dictionary, of_analysis, of_x0;
  std::vector<double> of_theta;

  Gradients(const Problem& p, const std::vector<bool>& needs)
      : y(needs[0]),
        dictionary(needs[1]),
        analysis(needs[2]),
        theta(needs[3]),
        x0(needs[4]),
        of_y(torch::stable::new_empty(p.y, y ? sizes(p.y) : Sizes{0})),
        of_dictionary(zeros(p.dictionary, dictionary)),
        of_analysis(zeros(p.analysis, analysis)),
        of_x0(torch::stable::new_empty(p.y, x0 ? p.code_sizes : Sizes{0})),
        of_theta(theta ? p.theta.numel() : 0) {}

 private:
  static Tensor zeros(const Tensor& model, bool needed) {
    return torch::stable::new_zeros(model, needed ? sizes(model) : Sizes{0}, DType<A>::value);
  }
};

// Where gradients of weights are collected: by the units of a slice, for the weight and the step at hand, or by groups
// of slices, for all.
template <typename T>
struct Collected {
  using A = accumulate_t<T>;
  Shares<A> dictionary;
  std::vector<Shares<A>> analysis;
  std::vector<Shares<double>> theta;

  Collected(const Plan& plan, int64_t count, int64_t together, const Gradients<T>& wanted, int64_t weights,
            int64_t steps)
      : dictionary(count, wanted.dictionary ? plan.g.groups * plan.table_size() : 0, together) {
    for (int64_t i = 0; i < weights; ++i)
      analysis.emplace_back(count, wanted.analysis ? plan.g.groups * plan.table_size() : 0, together);
    for (int64_t i = 0; i < steps; ++i) theta.emplace_back(count, wanted.theta ? plan.g.code_channels : 0, together);
  }

  // Adds what stands in place i to the gradient of weight w, or of step k's theta.
  void add_analysis(const Plan& plan, int64_t lanes, int64_t i, int64_t w, Gradients<T>& wanted) {
    if (wanted.analysis) add_shares<A>(plan, analysis[i], lanes, data<A>(wanted.of_analysis) + w * plan.weight_size());
  }
  void add_theta(int64_t i, int64_t k, Gradients<T>& wanted) {
    const std::vector<double> sum = theta[i].sum();
    for (size_t m = 0; m < sum.size(); ++m) wanted.of_theta[k * sum.size() + m] += sum[m];
  }
  void add_dictionary(const Plan& plan, int64_t lanes, Gradients<T>& wanted) {
    if (wanted.dictionary) add_shares<A>(plan, dictionary, lanes, data<A>(wanted.of_dictionary));
  }
};

// What the kernels read of the arguments that all slices share.
template <typename T>
struct BackwardWeights {
  using A = accumulate_t<T>;
  Buffer<A> dictionary;  // its table
  // Of gradients off a support, and of dense blocks of wide dictionaries.
  std::optional<AnalysisWeight<T>> negative_dictionary;
  Buffer<A> negative_taps{0};
  std::vector<Buffer<A>> analysis;  // tables

  // keep: those of all steps, else of the step at hand.
  BackwardWeights(const Problem& p, const Units<T>& units, bool wants_x0, bool keep)
      : dictionary(atom_table(units.plan, data<const T>(p.dictionary))) {
    if (wants_x0) negative_dictionary.emplace(units.plan, data<const T>(p.dictionary), A(-1));
    if (units.plan.patches().by_atoms) negative_taps = tap_weight(units.plan, data<const T>(p.dictionary), A(-1));
    for (int64_t w = 0; w < (keep ? p.analysis.size(0) : 0); ++w) analysis.push_back(table(p, units, w));
  }
  static Buffer<A> table(const Problem& p, const Units<T>& units, int64_t w) {
    return atom_table(units.plan, data<const T>(p.analysis) + w * p.dictionary.numel());
  }
};

// Adds the gradients of a slice; grad is that of its codes. Those of weights are left in `collected`, in the tables of
// its group, or, without that, collected step by step. Returns false for a tape that lista did not write.
template <typename T>
bool backward(const Problem& p, Solver<T>& s, const BackwardWeights<T>& weights, const T* grad,
              const Tape<accumulate_t<T>>& tape, Gradients<T>& wanted, Collected<T>* collected, int64_t group) {
  using A = accumulate_t<T>;
  const Plan& plan = s.plan;
  const int64_t last = p.iterations - 1;
  const auto grad_y = wanted.y ? CompactSum<T>(plan, data<T>(wanted.of_y) + p.signal_from()) : CompactSum<T>();

  // Where units meet: S_D z_k, and of steps k and k + 1, in turn, S_W gu.
  const bool together = plan.of_whole_images();
  const auto planes_if = [&](bool needed) { return needed && !together ? s.planes() : Buffer<A>(0); };
  const Buffer<A> code_planes = planes_if(!p.keeps_residuals()), planes[2] = {planes_if(true), planes_if(true)};

  // One unit adds to the tables of its group. Several have shares, whose sums are added to those, or to the gradients.
  const bool direct = collected && together;
  const int64_t count =
      direct ? 1 : s.share_count(wanted.dictionary + wanted.analysis, collected ? p.batch : p.geometry.batch);
  std::optional<Collected<T>> own;
  if (!direct) own.emplace(plan, count, count / plan.cut_images(), wanted, 1, 1);
  Collected<T>& sums = direct ? *collected : *own;

  const auto code = [&](int64_t k) { return k >= 1 ? tape.codes(k - 1) : s.start; };  // x_k

  Buffer<A> packed(0);  // of the step at hand
  int64_t packed_weight = -1;

  // Of steps k and k + 1, in turn: the gradients of x_{k+1} and of z_k; z_k itself, which without momentum is x_k, also
  // of step k + 2, on whose support a gradient still stands.
  const bool separate = !p.momentum.empty();
  s.reserve_between(separate ? 7 : 2);
  Storage<A>* const gradients = s.between.data();
  Storage<A>* const z_gradients = gradients + 2;
  Storage<A>* const extrapolated = gradients + 4;
  const auto start_of = [&](int64_t k) { return p.extrapolates(k) ? extrapolated[k % 3].codes() : code(k); };  // z_k
  const auto weight_of_momentum = [&](int64_t k) { return p.extrapolates(k) ? static_cast<A>(p.momentum[k]) : A(0); };
  const auto grad_u = [&](int64_t k) { return gradients[k % 2].on(code(k + 1)); };

  std::atomic<bool> damaged = false;
  int64_t* const first_used = gradients[last % 2].restart();
  s.for_each([&](int64_t u, char* scratch) {
    for (int64_t k = 0; k < p.iterations; ++k)
      if (!well_formed(s, tape.codes(k), tape.capacity(), u)) damaged = true;
    if (!damaged) s.from_dense(u, grad, code(p.iterations).masks, gradients[last % 2].codes(), first_used, scratch);
  });
  if (damaged) return false;

  // Of step k, from gu on: dW, dtheta, S_W gu (grad_plane, which may be null). synthesized: S_D z_k where it is made
  // again; residual: memory for a plane, which may be the same.
  const auto begin_step = [&](int64_t k, int64_t u, int64_t share, const A* weight, const A* synthesized, A* residual,
                              A* grad_plane, char* scratch) {
    const Unit& unit = plan.units[u];
    const Shares<A>& dW = sums.analysis[direct ? p.weight_of(k) : 0];
    const Shares<double>& dtheta = sums.theta[direct ? k : 0];
    if (wanted.analysis)
      make_plane<A>(plan, u, p.keeps_residuals() ? tape.residual(k) : s.signal.get(), synthesized, A(-1), residual,
                    nullptr, false);
    if (grad_plane) std::memset(grad_plane, 0, plan.plane_size * sizeof(A));
    const int64_t table = unit.group * plan.table_size();
    s.kernel.packed_backward_analysis(
        {unit.pixels, s.atoms(), plan.base.data(), plan.patches(), s.part(code(k + 1), u), s.part(grad_u(k), u),
         residual, weight + table, wanted.analysis ? dW.of(share) + table : nullptr,
         wanted.theta ? dtheta.of(share) + unit.group * s.atoms() : nullptr, nullptr, grad_plane},
        scratch);
  };
  // The gradient of x0, everywhere, for no threshold made it: it is z_0, and has the part -w in z_1.
  const auto add_grad_x0 = [&](int64_t k, int64_t u, A* plane, char* scratch) {
    const bool extrapolated = p.iterations > 1 && p.extrapolates(1);
    if (wanted.x0 && (k == 0 || (k == 1 && extrapolated)))
      s.analyze_dense(u, plane, *weights.negative_dictionary, grad_u(k), k == 0 ? A(1) : -weight_of_momentum(1),
                      k == 0 && extrapolated, data<T>(wanted.of_x0) + p.code_from(), scratch);
  };

  // The rest of step k, from the unit's S_W gu on: dy, dD, the gradient of z_k on its support, and from it that of x_k.
  // used and moved count the values of both. plane: memory for planes, which may begin with S_W gu.
  const int64_t grad_planes = wanted.x0 ? plan.analysis_planes() : plan.plane_size;
  const auto end_step = [&](int64_t k, int64_t u, int64_t share, const A* grad_plane, A* plane, int64_t* used,
                            int64_t* moved, char* scratch) {
    const Unit& unit = plan.units[u];
    make_plane<A>(plan, u, nullptr, grad_plane, A(1), plane, wanted.y ? grad_y.get() : nullptr, true);
    const int64_t table = unit.group * plan.table_size();
    const PackedCodes<A> z = start_of(k), grad_z = (separate ? z_gradients[k % 2] : gradients[(k + 1) % 2]).on(z);
    if (k > 0 || (p.x0 && wanted.dictionary))
      s.kernel.packed_backward_synthesis(
          {unit.pixels, s.atoms(), plan.base.data(), plan.patches(), s.part(z, u), s.part(grad_u(k), u), plane,
           weights.dictionary.get() + table, wanted.dictionary ? sums.dictionary.of(share) + table : nullptr,
           weights.negative_taps.get() + unit.group * s.width() * plan.g.patch(), s.part(grad_z, u), used},
          scratch);
    add_grad_x0(k, u, plane, scratch);
    if (k == 0 || !separate) return;
    // z_j = (1 + w) x_j - w x_{j-1}: x_j has its part in z_j and in z_{j+1}.
    const A w = weight_of_momentum(k), w_after = k < last ? weight_of_momentum(k + 1) : A(0);
    const PackedCodes<A> after = w_after != 0 ? z_gradients[(k + 1) % 2].on(start_of(k + 1)) : PackedCodes<A>{};
    s.combine(u, 1 + w, grad_z, -w_after, after, code(k).masks, gradients[(k + 1) % 2].codes(), moved, scratch);
  };

  for (int64_t k = last; k >= 0; --k) {
    const bool extrapolates = p.extrapolates(k);
    const PackedCodes<A> z = start_of(k);
    const bool recompute = wanted.analysis && !p.keeps_residuals() && z.masks;
    const A w = weight_of_momentum(k);
    int64_t* const extrapolated_used = extrapolates ? extrapolated[k % 3].restart() : nullptr;
    const auto prepare = [&](int64_t u, A* synthesized, char* scratch) {
      if (extrapolates) s.combine(u, 1 + w, code(k), -w, code(k - 1), nullptr, z, extrapolated_used, scratch);
      if (recompute) s.synthesize(u, z, weights.dictionary.get(), synthesized, scratch);
    };
    if (!together && (extrapolates || recompute))
      s.for_each([&](int64_t u, char* scratch) { prepare(u, s.plane(code_planes, u), scratch); });
    if (!collected && p.weight_of(k) != packed_weight) {
      packed_weight = p.weight_of(k);
      packed = BackwardWeights<T>::table(p, s, packed_weight);
    }
    const A* const weight = collected ? weights.analysis[p.weight_of(k)].get() : packed.get();
    const bool goes_on = k > 0 || p.x0 || wanted.y;
    const int64_t ended = together ? k : k + 1;  // the step that ends here
    int64_t* const used =
        ended <= last ? (separate ? z_gradients[ended % 2] : gradients[(ended + 1) % 2]).restart() : nullptr;
    int64_t* const moved = ended <= last && separate ? gradients[(ended + 1) % 2].restart() : nullptr;
    s.for_each_share(count, [&](int64_t u, int64_t part, char* scratch) {
      const int64_t share = direct ? group : part;
      const Buffer<A> residual(wanted.analysis ? plan.plane_size : 0), plane(grad_planes);
      if (!together) {
        if (ended <= last) end_step(ended, u, share, s.plane(planes[ended % 2], u), plane.get(), used, moved, scratch);
        return begin_step(k, u, share, weight, recompute ? s.plane(code_planes, u) : nullptr, residual.get(),
                          goes_on || wanted.analysis ? s.plane(planes[k % 2], u) : nullptr, scratch);
      }
      prepare(u, residual.get(), scratch);
      begin_step(k, u, share, weight, recompute ? residual.get() : nullptr, residual.get(),
                 goes_on || wanted.analysis ? plane.get() : nullptr, scratch);
      if (goes_on) end_step(k, u, share, plane.get(), plane.get(), used, moved, scratch);
    });
    if (direct) continue;
    if (collected)
      own->theta[0].add_to(collected->theta[k].of(group));
    else
      own->add_theta(0, k, wanted);
    own->theta[0].clear();
    if (k > 0 && p.weight_of(k - 1) == p.weight_of(k)) continue;
    if (collected)
      own->analysis[0].add_to(collected->analysis[p.weight_of(k)].of(group));
    else
      own->add_analysis(plan, s.kernel.lanes, 0, p.weight_of(k), wanted);
    own->analysis[0].clear();
  }
  if (!together && (p.x0 || wanted.y)) {
    int64_t* const used = (separate ? z_gradients[0] : gradients[1]).restart();
    s.for_each_share(count, [&](int64_t u, int64_t part, char* scratch) {
      const Buffer<A> plane(grad_planes);
      end_step(0, u, part, s.plane(planes[0], u), plane.get(), used, nullptr, scratch);
    });
  }
  if (!direct && collected)
    own->dictionary.add_to(collected->dictionary.of(group));
  else if (!direct)
    own->add_dictionary(plan, s.kernel.lanes, wanted);
  if (wanted.y) grad_y.finish(plan);
  return true;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lista_backward_cpu(
    const Tensor& grad, const Tensor& tape, const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
    const Tensor& theta, const std::optional<Tensor>& x0, const std::vector<double>& momentum, const Sizes& stride,
    const Sizes& padding, const Sizes& dilation, int64_t groups, bool one_sided, const std::vector<bool>& needs) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups);
  STD_TORCH_CHECK(needs.size() == 5 && (!needs[4] || x0), "dsc_ops: needs must have 5 values, the last only with x0");
  check_shape(y, grad, p.code_sizes, "grad");
  const Tensor codes_grad = torch::stable::contiguous(grad);
  return visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    STD_TORCH_CHECK(tape.scalar_type() == ScalarType::Byte && tape.is_contiguous() && tape.device() == y.device() &&
                        tape.numel() == TapeLayout(p.geometry, p.iterations, sizeof(A)).bytes,
                    "dsc_ops: the tape is not one that lista wrote for these arguments");
    Gradients<T> out(p, needs);
    const Problem::Slices slices = p.slices();
    const Units<T> units(p.geometry, slices.strips);
    const BackwardWeights<T> weights(p, units, out.x0, slices.groups > 0);
    std::optional<Collected<T>> collected;
    if (slices.groups > 0)
      collected.emplace(units.plan, slices.groups, slices.groups, out, p.analysis.size(0), p.iterations);
    std::atomic<bool> damaged = false;
    for_each_slice<T>(p, slices, [&](Solver<T>& solver, const Problem& slice, int64_t group) {
      const Tape<A> kept(slice, p.geometry, tape);
      if (!backward<T>(slice, solver, weights, data<const T>(codes_grad) + slice.code_from(), kept, out,
                       collected ? &*collected : nullptr, group))
        damaged = true;
    });
    STD_TORCH_CHECK(!damaged, "dsc_ops: the tape is not one that lista wrote for these arguments");
    for (int64_t w = 0; collected && w < p.analysis.size(0); ++w)
      collected->add_analysis(units.plan, units.kernel.lanes, w, w, out);
    for (int64_t k = 0; collected && k < p.iterations; ++k) collected->add_theta(k, k, out);
    if (collected) collected->add_dictionary(units.plan, units.kernel.lanes, out);
    const Tensor of_theta = torch::stable::new_empty(p.theta, out.theta ? sizes(p.theta) : Sizes{0});
    for (size_t i = 0; i < out.of_theta.size(); ++i) data<T>(of_theta)[i] = store<T>(static_cast<A>(out.of_theta[i]));
    return std::tuple{out.of_y, rounded<T>(p.y, out.of_dictionary), rounded<T>(p.y, out.of_analysis), of_theta,
                      out.of_x0};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("lista", TORCH_BOX(&lista_cpu));
  library.impl("lista_backward", TORCH_BOX(&lista_backward_cpu));
}

}  // namespace dsc::cpu
