// lista on the CPU: K steps of x <- T(z + A_W(y - S_D z)) and their gradients (math.md sections 3 and 4).
//
// Codes are packed (core/code_format.h) from the first step to the last, and so are their gradients, which are needed
// on the support of a code alone. A step has two phases: every unit adds S_D z to its plane; then every unit makes the
// residual of its part of the signal from the planes that meet there, and the next code from it. Backward runs the
// same two phases with the gradients. The tape holds x_1 .. x_K, and the residuals where a signal is much smaller than
// a code; elsewhere backward computes them again, which costs as much as the codes have non-zeros.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "convolution.h"
#include "packed.h"

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

  // Where a residual costs little memory beside a packed code, the tape keeps it.
  bool keeps_residuals() const { return 16 * geometry.signal_size() <= geometry.code_size(); }
  int64_t weight_of(int64_t k) const { return analysis.size(0) == 1 ? 0 : k; }
  bool extrapolates(int64_t k) const { return k >= 1 && !momentum.empty() && momentum[k] != 0; }
};

// Memory for the packed codes of all units, for the worst case; only what is written is ever touched.
template <typename A>
class Storage {
 public:
  explicit Storage(const Plan& plan)
      : masks_(plan.g.groups * plan.group_pixels * mask_bytes(plan.g.group_code_channels())),
        places_(plan.blocks),
        values_(plan.g.code_size()) {}

  PackedCodes<A> codes() const { return {masks_.get(), places_.get(), values_.get()}; }
  // Codes with the masks of another code and the values that stand here.
  PackedCodes<A> on(const PackedCodes<A>& support) const { return {support.masks, places_.get(), values_.get()}; }
  // Counts the values that are written from now on, over those of before.
  int64_t* restart() {
    used_ = 0;
    return &used_;
  }

 private:
  Buffer<uint8_t> masks_;
  Buffer<Place> places_;
  Buffer<A> values_;
  int64_t used_ = 0;
};

// A unit's part of packed codes.
template <typename A>
PackedCodes<A> part_of(const PackedCodes<A>& codes, const Plan& plan, const Unit& unit) {
  if (!codes.places) return codes;
  const int64_t bytes = mask_bytes(plan.g.group_code_channels());
  return {codes.masks ? codes.masks + plan.pixel(unit) * bytes : nullptr, codes.places + unit.block, codes.values};
}

// Whether every place lies in the arena of `capacity` values and has as many values as its masks have bits: what memory
// safety needs of a tape that came from outside.
template <typename A>
bool well_formed(const PackedCodes<A>& codes, int64_t capacity, const Plan& plan, const Unit& unit) {
  const int64_t atoms = plan.g.group_code_channels(), bytes = mask_bytes(atoms);
  const PackedCodes<A> part = part_of(codes, plan, unit);
  for (int64_t pixel = 0; pixel < unit.pixels; pixel += block_pixels) {
    const Place place = part.places[pixel / block_pixels];
    if (place.first < 0 || place.count < 0 || place.count > capacity || place.first > capacity - place.count)
      return false;
    int64_t count = 0;
    for (int64_t p = pixel; p < std::min(unit.pixels, pixel + block_pixels); ++p)
      for (int64_t word = 0; word < bytes / 8; ++word) {
        uint64_t bits;
        std::memcpy(&bits, part.masks + p * bytes + 8 * word, 8);
        if (64 * word + 64 > atoms && (bits >> (atoms - 64 * word)) != 0) return false;
        count += __builtin_popcountll(bits);
      }
    if (count != place.count) return false;
  }
  return true;
}

template <typename A>
class Tape {
 public:
  Tape(const Problem& p, const Plan& plan, const Tensor& memory)
      : layout_(p.geometry, p.iterations, sizeof(A)),
        memory_(data<char>(memory)),
        pixels_(plan.g.groups * plan.group_pixels),
        mask_size_(mask_bytes(plan.g.group_code_channels())),
        signal_size_(plan.g.signal_size()) {}

  // x_{k+1}
  PackedCodes<A> codes(int64_t k) const {
    return {reinterpret_cast<uint8_t*>(memory_ + layout_.masks) + k * pixels_ * mask_size_,
            reinterpret_cast<Place*>(memory_ + layout_.places) + k * pixels_,
            reinterpret_cast<A*>(memory_ + layout_.values)};
  }
  // y - S_D z_k, compact
  A* residual(int64_t k) const { return reinterpret_cast<A*>(memory_ + layout_.residuals) + k * signal_size_; }

 private:
  TapeLayout layout_;
  char* memory_;
  int64_t pixels_, mask_size_, signal_size_;
};

// Runs body(unit, scratch) for all units, in parallel.
template <typename T, typename Body>
void for_each_unit(const Plan& plan, const Body& body) {
  const int64_t atoms = plan.g.group_code_channels(), count = static_cast<int64_t>(plan.units.size());
  const int64_t products = plan.g.code_size() / std::max<int64_t>(1, count) * plan.g.patch();
  parallel(count, grain_of(products), [&](int64_t begin, int64_t end) {
    const Buffer<char> scratch(kernels<T>().workspace_size(atoms, plan.vectors()));
    for (int64_t unit = begin; unit < end; ++unit) body(unit, scratch.get());
  });
}

// What forward and backward do with one unit.
template <typename T>
struct Solver {
  using A = accumulate_t<T>;
  using Codes = PackedCodes<A>;
  const Problem& p;
  const Kernels<T>& kernel = kernels<T>();
  Plan plan;
  Buffer<A> signal;      // y, compact
  Buffer<A> dictionary;  // its table
  std::optional<Storage<A>> start_storage;
  Codes start{};  // x_0

  explicit Solver(const Problem& problem)
      : p(problem),
        plan(p.geometry, kernel.lanes, kernel.chunk_vectors, sizeof(A)),
        signal(plan.g.signal_size()),
        dictionary(atom_table(plan, data<const T>(p.dictionary))) {
    to_compact(plan, data<const T>(p.y), signal.get());
    if (!p.x0) return;
    int64_t* const used = start_storage.emplace(plan).restart();
    start = start_storage->codes();
    for_each_unit<T>(
        plan, [&](int64_t u, char* scratch) { from_dense(u, data<const T>(*p.x0), nullptr, start, used, scratch); });
  }

  Codes part(const Codes& codes, int64_t u) const { return part_of(codes, plan, plan.units[u]); }
  int64_t atoms() const { return plan.g.group_code_channels(); }
  // Atoms of a group, and as many more as fill up the last vector.
  int64_t width() const { return padded(atoms(), std::max<int64_t>(kernel.lanes, 8)); }
  int64_t units() const { return static_cast<int64_t>(plan.units.size()); }
  Buffer<A> planes() const { return Buffer<A>(units() * plan.plane_size); }

  // Packs the unit's part of a dense code: its non-zeros, or its values on the masks `on`.
  void from_dense(int64_t u, const T* dense, const uint8_t* on, const Codes& codes, int64_t* used,
                  char* scratch) const {
    const Unit& unit = plan.units[u];
    const int64_t pixels = plan.g.code_pixels();
    if (on) on += plan.pixel(unit) * mask_bytes(atoms());
    kernel.packed_from_dense({unit.pixels, atoms(), unit.first, pixels, plan.g.code_channels * pixels,
                              dense + unit.group * atoms() * pixels, on, part(codes, u), used},
                             scratch);
  }

  void to_dense(int64_t u, const Codes& codes, T* dense, char* scratch) const {
    const Unit& unit = plan.units[u];
    const int64_t pixels = plan.g.code_pixels();
    kernel.packed_to_dense({unit.pixels, atoms(), unit.first, pixels, plan.g.code_channels * pixels, part(codes, u),
                            dense + unit.group * atoms() * pixels},
                           scratch);
  }

  // result = a x + b y on the masks `on`, or on the union of both supports.
  void combine(int64_t u, A a, const Codes& x, A b, const Codes& y, const uint8_t* on, const Codes& result,
               int64_t* used, char* scratch) const {
    const Unit& unit = plan.units[u];
    if (on) on += plan.pixel(unit) * mask_bytes(atoms());
    kernel.packed_combine({unit.pixels, atoms(), a, part(x, u), b, part(y, u), on, part(result, u), used}, scratch);
  }

  // planes[u] = S_D of the unit's codes
  void synthesize(int64_t u, const Codes& codes, A* planes, char* scratch) const {
    const Unit& unit = plan.units[u];
    A* const plane = planes + u * plan.plane_size;
    std::memset(plane, 0, plan.plane_size * sizeof(A));
    kernel.packed_synthesis({unit.pixels, atoms(), plan.base.data(), plan.patches(), part(codes, u),
                             dictionary.get() + unit.group * plan.table_size(), plane},
                            scratch);
  }

  // codes = T(start + A_W(plane))
  void analyze(int64_t u, const A* plane, const A* weight, const A* theta, bool one_sided, const Codes& start_codes,
               const Codes& codes, int64_t* used, char* scratch) const {
    const Unit& unit = plan.units[u];
    theta += unit.group * width();
    const bool nonnegative = std::all_of(theta, theta + width(), [](A value) { return value >= 0; });
    kernel.packed_analysis(
        {unit.pixels, atoms(), plan.base.data(), plan.patches(), plane, weight + unit.group * width() * plan.g.patch(),
         theta, one_sided, nonnegative, part(start_codes, u), part(codes, u), used},
        scratch);
  }

  // dense = scale (start + A_W(plane)), or added to it
  void analyze_dense(int64_t u, const A* plane, const A* weight, const Codes& start_codes, A scale, bool add, T* dense,
                     char* scratch) const {
    const Unit& unit = plan.units[u];
    const int64_t pixels = plan.g.code_pixels();
    kernel.dense_analysis({unit.pixels, atoms(), unit.first, pixels, plan.g.code_channels * pixels, plan.base.data(),
                           plan.patches(), plane, weight + unit.group * width() * plan.g.patch(), part(start_codes, u),
                           scale, add, dense + unit.group * atoms() * pixels},
                          scratch);
  }
};

template <typename T>
void forward(const Problem& p, bool one_sided, const Tensor& codes, const std::optional<Tensor>& memory) {
  using A = accumulate_t<T>;
  Solver<T> s(p);
  const Plan& plan = s.plan;
  std::vector<Buffer<A>> weights;
  for (int64_t k = 0; k < p.analysis.size(0); ++k)
    weights.push_back(analysis_weight(plan, data<const T>(p.analysis) + k * p.dictionary.numel(), A(1)));
  const Buffer<A> theta(plan.g.groups * s.width()), planes = s.planes();
  std::optional<Tape<A>> tape;
  if (memory) tape.emplace(p, plan, *memory);
  int64_t tape_used = 0;
  // Without a tape two codes take turns, or three where momentum looks one further back.
  std::vector<Storage<A>> turns, extrapolated;
  for (int i = 0; i < (tape ? 0 : p.momentum.empty() ? 2 : 3); ++i) turns.emplace_back(plan);
  if (!p.momentum.empty()) extrapolated.emplace_back(plan);
  PackedCodes<A> x = s.start, before = s.start;
  for (int64_t k = 0; k < p.iterations; ++k) {
    for (int64_t group = 0; group < plan.g.groups; ++group)
      for (int64_t m = 0; m < s.width(); ++m)
        theta.get()[group * s.width() + m] =
            m < s.atoms() ? load(data<const T>(p.theta)[k * plan.g.code_channels + group * s.atoms() + m]) : A(0);
    const PackedCodes<A> next = tape ? tape->codes(k) : turns[k % turns.size()].codes();
    int64_t* const used = tape ? &tape_used : turns[k % turns.size()].restart();
    const bool extrapolates = p.extrapolates(k);
    const PackedCodes<A> z = extrapolates ? extrapolated[0].codes() : x;
    int64_t* const z_used = extrapolates ? extrapolated[0].restart() : nullptr;
    const A w = extrapolates ? static_cast<A>(p.momentum[k]) : A(0);
    if (z.masks)
      for_each_unit<T>(plan, [&](int64_t u, char* scratch) {
        if (extrapolates) s.combine(u, 1 + w, x, -w, before, nullptr, z, z_used, scratch);
        s.synthesize(u, z, planes.get(), scratch);
      });
    for_each_unit<T>(plan, [&](int64_t u, char* scratch) {
      const Buffer<A> plane(plan.plane_size);
      make_plane(plan, u, s.signal.get(), z.masks ? planes.get() : nullptr, A(-1), plane.get(),
                 tape && p.keeps_residuals() ? tape->residual(k) : nullptr, false);
      s.analyze(u, plane.get(), weights[p.weight_of(k)].get(), theta.get(), one_sided, z, next, used, scratch);
      if (k + 1 == p.iterations) s.to_dense(u, next, data<T>(codes), scratch);
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
  const Tensor tape = torch::stable::new_empty(y, {keep_tape ? bytes : 0}, ScalarType::Byte);
  // Where one thread does it all, equal calls give equal tapes, which tools that compare an operator's results expect.
  use_large_pages(data<char>(codes), codes.numel() * static_cast<int64_t>(codes.element_size()));
  if (keep_tape) use_large_pages(data<char>(tape), bytes);
  if (keep_tape && bytes <= 65536) std::memset(data<char>(tape), 0, bytes);
  visit_dtype(y, [&](auto zero) {
    forward<decltype(zero)>(p, one_sided, codes, keep_tape ? std::optional<Tensor>(tape) : std::nullopt);
  });
  return {codes, tape};
}

struct Gradients {
  Tensor y, dictionary, analysis, theta, x0;
};

// Tables that units add to, a fixed share of the units to each, so that sums do not depend on the number of threads.
template <typename A>
struct Shares {
  int64_t count, size;
  Buffer<A> tables;

  Shares(int64_t count_, int64_t size_) : count(count_), size(size_), tables(count_ * size_) { clear(); }
  void clear() { std::memset(tables.get(), 0, count * size * sizeof(A)); }
  A* of(int64_t share) const { return tables.get() + share * size; }
};

// grad (M, C/groups, *kernel) += the sum of all shares
template <typename A>
void add_shares(const Plan& plan, const Shares<A>& shares, int64_t lanes, A* grad) {
  const int64_t atoms = plan.g.group_code_channels(), patch = plan.g.patch();
  const Patches patches = plan.patches();
  parallel(plan.g.code_channels, grain_of(patch * shares.count), [&](int64_t begin, int64_t end) {
    std::vector<A> sum;
    for (int64_t m = begin; m < end; ++m) {
      const A* const group = shares.of(0) + m / atoms * plan.table_size();
      for (int64_t c = 0, first = 0; c < patches.chunks; first += patches.chunk_vectors[c++] * lanes) {
        const int64_t chunk = patches.chunk_vectors[c] * lanes;
        const A* const row = group + atoms * first + m % atoms * chunk;
        sum.assign(row, row + chunk);
        for (int64_t share = 1; share < shares.count; ++share)
          for (int64_t j = 0; j < chunk; ++j) sum[j] += row[share * shares.size + j];
        for (int64_t j = 0; j < chunk; ++j)
          if (plan.table_tap[first + j] >= 0) grad[m * patch + plan.table_tap[first + j]] += sum[j];
      }
    }
  });
}

template <typename T>
Gradients backward(const Problem& p, const Tensor& grad, const Tensor& memory, const std::vector<bool>& needs) {
  using A = accumulate_t<T>;
  Solver<T> s(p);
  const Plan& plan = s.plan;
  const Tape<A> tape(p, plan, memory);
  const int64_t atoms = plan.g.group_code_channels(), weight_size = p.dictionary.numel(), last = p.iterations - 1;
  const auto zeros = [&](const Tensor& model, bool needed) {
    return torch::stable::new_zeros(model, needed ? sizes(model) : Sizes{0}, DType<A>::value);
  };
  const Tensor grad_dictionary = zeros(p.dictionary, needs[1]), grad_analysis = zeros(p.analysis, needs[2]);
  const Tensor grad_theta = torch::stable::new_empty(p.theta, needs[3] ? sizes(p.theta) : Sizes{0});
  const Buffer<A> grad_signal(needs[0] ? plan.g.signal_size() : 0);
  if (needs[0]) std::memset(grad_signal.get(), 0, plan.g.signal_size() * sizeof(A));

  // Shares of the weights' gradients: few enough that adding them up costs little, as many as there may be threads.
  constexpr int64_t most_bytes = int64_t{4} << 20, least_shares = 8, most_shares = 32;
  const int64_t table_bytes = plan.g.groups * plan.table_size() * static_cast<int64_t>(sizeof(A));
  const int64_t tables = std::max<int64_t>(1, (needs[1] + needs[2]) * table_bytes);
  const int64_t count =
      std::max<int64_t>(1, std::min(s.units(), std::clamp<int64_t>(most_bytes / tables, least_shares, most_shares)));
  Shares<A> dictionary_shares(count, needs[1] ? plan.g.groups * plan.table_size() : 0);
  Shares<A> analysis_shares(count, needs[2] ? plan.g.groups * plan.table_size() : 0);
  Shares<double> theta_shares(count, needs[3] ? plan.g.code_channels : 0);
  // Runs body(unit, share, scratch) for all units, in parallel over shares.
  const auto for_each_share = [&](const auto& body) {
    parallel(count, grain_of(plan.g.code_size() / count * plan.g.patch()), [&](int64_t begin, int64_t end) {
      const Buffer<char> scratch(s.kernel.workspace_size(atoms, plan.vectors()));
      for (int64_t share = begin; share < end; ++share)
        for (int64_t u = s.units() * share / count; u < s.units() * (share + 1) / count; ++u)
          body(u, share, scratch.get());
    });
  };

  const auto code = [&](int64_t k) { return k >= 1 ? tape.codes(k - 1) : s.start; };  // x_k
  const Buffer<A> planes = s.planes();
  const Buffer<A> code_planes(p.keeps_residuals() ? 0 : s.units() * plan.plane_size);
  Buffer<A> negative_dictionary(0);  // only for gradients off a support, and for dense blocks of wide dictionaries
  if (needs[4] || plan.patches().by_atoms)
    negative_dictionary = analysis_weight(plan, data<const T>(p.dictionary), A(-1));
  Buffer<A> weight(0);
  int64_t packed_weight = -1;

  std::vector<Storage<A>> gradients, extrapolated, z_gradients;  // of x_{k+1} and x_k, z_k and z_{k+1}, in turn
  for (int i = 0; i < 2; ++i) gradients.emplace_back(plan);
  // Without momentum the gradient of z_k is that of x_k.
  const bool separate = !p.momentum.empty();
  for (int i = 0; i < 2 && separate; ++i) z_gradients.emplace_back(plan);
  for (int i = 0; i < 2 && separate; ++i) extrapolated.emplace_back(plan);

  std::atomic<bool> damaged = false;
  int64_t* const first_used = gradients[last % 2].restart();
  for_each_unit<T>(plan, [&](int64_t u, char* scratch) {
    for (int64_t k = 0; k < p.iterations; ++k)
      if (!well_formed(tape.codes(k), p.iterations * plan.g.code_size(), plan, plan.units[u])) damaged = true;
    if (!damaged)
      s.from_dense(u, data<const T>(grad), code(p.iterations).masks, gradients[last % 2].codes(), first_used, scratch);
  });
  STD_TORCH_CHECK(!damaged, "dsc_ops: the tape is not one that lista wrote for these arguments");

  const Tensor grad_x0 = torch::stable::new_empty(p.y, needs[4] ? p.code_sizes : Sizes{0});
  PackedCodes<A> after{};  // the gradient of z_{k+1}, absent where z_{k+1} is x_{k+1}
  A w_after = 0;
  for (int64_t k = last; k >= 0; --k) {
    const bool from_zero = k == 0 && !p.x0, goes_on = !from_zero || needs[0], extrapolates = p.extrapolates(k);
    const A w = extrapolates ? static_cast<A>(p.momentum[k]) : A(0);
    const PackedCodes<A> x = code(k), next = code(k + 1), z = extrapolates ? extrapolated[k % 2].codes() : x;
    const PackedCodes<A> grad_u = gradients[k % 2].on(next);
    const bool recompute = needs[2] && !p.keeps_residuals() && z.masks;
    if (extrapolates || recompute) {
      int64_t* const used = extrapolates ? extrapolated[k % 2].restart() : nullptr;
      for_each_unit<T>(plan, [&](int64_t u, char* scratch) {
        if (extrapolates) s.combine(u, 1 + w, x, -w, code(k - 1), nullptr, z, used, scratch);
        if (recompute) s.synthesize(u, z, code_planes.get(), scratch);
      });
    }
    if (p.weight_of(k) != packed_weight) {
      packed_weight = p.weight_of(k);
      weight = atom_table(plan, data<const T>(p.analysis) + packed_weight * weight_size);
    }
    if (needs[2]) analysis_shares.clear();
    if (needs[3]) theta_shares.clear();
    for_each_share([&](int64_t u, int64_t share, char* scratch) {
      const Unit& unit = plan.units[u];
      const Buffer<A> residual(needs[2] ? plan.plane_size : 0);
      if (needs[2])
        make_plane(plan, u, p.keeps_residuals() ? tape.residual(k) : s.signal.get(),
                   recompute ? code_planes.get() : nullptr, A(-1), residual.get(), static_cast<A*>(nullptr), false);
      A* const plane = goes_on || needs[2] ? planes.get() + u * plan.plane_size : nullptr;
      if (plane) std::memset(plane, 0, plan.plane_size * sizeof(A));
      const int64_t table = unit.group * plan.table_size();
      s.kernel.packed_backward_analysis(
          {unit.pixels, s.atoms(), plan.base.data(), plan.patches(), s.part(next, u), s.part(grad_u, u), residual.get(),
           weight.get() + table, needs[2] ? analysis_shares.of(share) + table : nullptr,
           needs[3] ? theta_shares.of(share) + unit.group * s.atoms() : nullptr, plane},
          scratch);
    });
    if (needs[2])
      add_shares<A>(plan, analysis_shares, s.kernel.lanes, data<A>(grad_analysis) + p.weight_of(k) * weight_size);
    for (int64_t m = 0; needs[3] && m < plan.g.code_channels; ++m) {
      double sum = 0;
      for (int64_t share = 0; share < count; ++share) sum += theta_shares.of(share)[m];
      data<T>(grad_theta)[k * plan.g.code_channels + m] = store<T>(static_cast<A>(sum));
    }
    if (!goes_on) break;
    // The gradient of z_k, needed on its support; everywhere for x_0, which no threshold made.
    const bool everywhere = needs[4] && (k == 0 || (k == 1 && extrapolates));
    const bool on_support = k >= 1 || (p.x0 && needs[1]);
    Storage<A>& result = separate ? z_gradients[k % 2] : gradients[(k + 1) % 2];
    const PackedCodes<A> grad_z = result.on(z);
    int64_t* const used = result.restart();
    for_each_share([&](int64_t u, int64_t share, char* scratch) {
      const Unit& unit = plan.units[u];
      const Buffer<A> plane(plan.plane_size);
      make_plane(plan, u, static_cast<const A*>(nullptr), planes.get(), A(1), plane.get(),
                 needs[0] ? grad_signal.get() : nullptr, true);
      const int64_t table = unit.group * plan.table_size();
      if (on_support)
        s.kernel.packed_backward_synthesis(
            {unit.pixels, s.atoms(), plan.base.data(), plan.patches(), s.part(z, u), s.part(grad_u, u), plane.get(),
             s.dictionary.get() + table, needs[1] ? dictionary_shares.of(share) + table : nullptr,
             negative_dictionary.get() + unit.group * s.width() * plan.g.patch(), s.part(grad_z, u), used},
            scratch);
      // x_0 is z_0, and has the part -w in z_1.
      if (everywhere)
        s.analyze_dense(u, plane.get(), negative_dictionary.get(), grad_u, k == 0 ? A(1) : -w, k == 0 && w_after != 0,
                        data<T>(grad_x0), scratch);
    });
    if (k == 0) break;
    // z_k = (1 + w) x_k - w x_{k-1}: x_k has its part in z_k and in z_{k+1}.
    if (separate) {
      int64_t* const moved = gradients[(k + 1) % 2].restart();
      const PackedCodes<A> grad_x = gradients[(k + 1) % 2].codes();
      for_each_unit<T>(plan, [&](int64_t u, char* scratch) {
        s.combine(u, 1 + w, grad_z, -w_after, after, x.masks, grad_x, moved, scratch);
      });
    }
    after = extrapolates ? grad_z : PackedCodes<A>{};
    w_after = w;
  }
  if (needs[1]) add_shares<A>(plan, dictionary_shares, s.kernel.lanes, data<A>(grad_dictionary));
  const auto rounded = [&](const Tensor& values, const Tensor& model) {
    if (values.scalar_type() == model.scalar_type()) return values;
    const Tensor out = torch::stable::new_empty(model, sizes(values));
    round_to<T>(data<const A>(values), out);
    return out;
  };
  const Tensor grad_y = torch::stable::new_empty(p.y, needs[0] ? sizes(p.y) : Sizes{0});
  if (needs[0]) from_compact(plan, grad_signal.get(), data<T>(grad_y));
  return {grad_y, rounded(grad_dictionary, p.dictionary), rounded(grad_analysis, p.analysis), grad_theta, grad_x0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lista_backward_cpu(
    const Tensor& grad, const Tensor& tape, const Tensor& y, const Tensor& dictionary, const Tensor& analysis,
    const Tensor& theta, const std::optional<Tensor>& x0, const std::vector<double>& momentum, const Sizes& stride,
    const Sizes& padding, const Sizes& dilation, int64_t groups, bool one_sided, const std::vector<bool>& needs) {
  const Problem p(y, dictionary, analysis, theta, x0, momentum, stride, padding, dilation, groups);
  STD_TORCH_CHECK(needs.size() == 5 && (!needs[4] || x0), "dsc_ops: needs must have 5 values, the last only with x0");
  check_shape(y, grad, p.code_sizes, "grad");
  const Gradients out = visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(tape.scalar_type() == ScalarType::Byte && tape.is_contiguous() && tape.device() == y.device() &&
                        tape.numel() == TapeLayout(p.geometry, p.iterations, sizeof(accumulate_t<T>)).bytes,
                    "dsc_ops: the tape is not one that lista wrote for these arguments");
    return backward<T>(p, torch::stable::contiguous(grad), tape, needs);
  });
  return {out.y, out.dictionary, out.analysis, out.theta, out.x0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("lista", TORCH_BOX(&lista_cpu));
  library.impl("lista_backward", TORCH_BOX(&lista_backward_cpu));
}

}  // namespace dsc::cpu
