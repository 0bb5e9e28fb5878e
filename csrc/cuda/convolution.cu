// conv_soft_threshold on packed codes: T(A_W y + bias), and its gradients on the support of the codes.
#include "packed.h"

namespace dsc::cuda {
namespace {

// Of the slice from the signal `first` on, in the type of sums: in `plane`, or where it is.
template <typename T>
const accumulate_t<T>* widened(const Packed<T>& part, const Tensor& y, int64_t first, const Tensor& plane) {
  const T* const from = data<T>(y) + first * part.shape.signal_item();
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return from;
  } else {
    Combine<T> combine{};
    combine.base = from;
    combine.out = mutable_data<accumulate_t<T>>(plane);
    part.synthesize({}, plane, combine);
    return combine.out;
  }
}

Sizes code_sizes(const Tensor& y, const Shape& shape) {
  Sizes result{y.size(0), shape.atoms};
  if (y.dim() == 4) result.push_back(shape.code_h);
  result.push_back(shape.code_w);
  return result;
}

void check_wide(const Tensor& y, const Tensor& values, int64_t count, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == accumulate_dtype(y) && values.device() == y.device() && values.dim() == 1 &&
                      values.size(0) == count,
                  "dsc_ops: ", name, " must have one value per atom, in the type of sums");
}

Tensor packed_conv_soft_threshold(const Tensor& y_, const Tensor& weight_, const std::optional<Tensor>& bias,
                                  const Tensor& theta, const Sizes& stride, const Sizes& padding, bool one_sided,
                                  bool tensor_cores) {
  check_like(y_, weight_, "weight");
  const Shape shape = make_shape(y_, weight_, 0, stride, padding);
  check_wide(y_, theta, shape.atoms, "theta");
  if (bias) check_wide(y_, *bias, shape.atoms, "bias");
  const DeviceGuard guard(y_.get_device_index());
  const Tensor y = torch::stable::contiguous(y_), weight = torch::stable::contiguous(weight_);
  const Tensor dense_theta = torch::stable::contiguous(theta);
  const std::optional<Tensor> dense_bias = contiguous(bias, MemoryFormat::Contiguous);
  const Tensor codes = empty(y, code_sizes(y, shape), y.scalar_type());
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const int64_t slice = Packed<T>::cached_slice(shape, 1, 2);
    const Packed<T> packed(y, shape.of_batch(slice), tensor_cores);
    const Tensor plane = packed.plane(), memory = packed.bytes(packed.size.bytes());
    const Tensor table = packed.analysis_table(data<T>(weight));
    for (int64_t first = 0; first < shape.batch(); first += slice) {
      const Packed<T> part = packed.of_batch(std::min(slice, shape.batch() - first));
      const PackedCode<A> code = part.size.at(memory.mutable_data_ptr());
      Analysis<A> analysis{};
      analysis.plane = widened(part, y, first, plane);
      analysis.bias = data<A>(dense_bias);
      analysis.theta = data<A>(dense_theta);
      analysis.one_sided = one_sided;
      analysis.out = code;
      part.analyze(analysis, table);
      part.unpack(code, mutable_data<T>(codes) + first * shape.code_item());
    }
  });
  return codes;
}

std::tuple<Tensor, Tensor, Tensor> packed_conv_soft_threshold_backward(const Tensor& grad_, const Tensor& codes_,
                                                                       const Tensor& y_, const Tensor& weight_,
                                                                       const Sizes& stride, const Sizes& padding,
                                                                       const std::vector<bool>& needs,
                                                                       bool tensor_cores) {
  check_like(y_, weight_, "weight");
  const Shape shape = make_shape(y_, weight_, 0, stride, padding);
  check_shape(y_, codes_, code_sizes(y_, shape), "codes");
  check_shape(y_, grad_, code_sizes(y_, shape), "grad");
  STD_TORCH_CHECK(needs.size() == 4, "dsc_ops: needs must have 4 values");
  const DeviceGuard guard(y_.get_device_index());
  const Tensor y = torch::stable::contiguous(y_), weight = torch::stable::contiguous(weight_);
  const Tensor codes = torch::stable::contiguous(codes_), grad = torch::stable::contiguous(grad_);
  const bool sums_needed = needs[2] || needs[3];
  const Tensor grad_y = empty(y, needs[0] ? sizes(y) : Sizes{0}, accumulate_dtype(y));
  const Tensor grad_weight = empty(y, needs[1] ? sizes(weight) : Sizes{0}, y.scalar_type());
  const Tensor grad_sums = empty(y, sums_needed ? Sizes{2, shape.atoms} : Sizes{0}, y.scalar_type());
  visit_dtype(y, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const int64_t slice = gradient_slice(shape), slices = ceil_div(shape.batch(), slice);
    const Packed<T> packed(y, shape.of_batch(slice), tensor_cores);
    const auto room = [&](bool wanted, int64_t count) { return packed.bytes(wanted ? count * int64_t(sizeof(A)) : 0); };
    const Tensor plane = packed.plane(), memory = packed.bytes(2 * packed.size.bytes());
    const Tensor partials = room(needs[1], packed.partials_size()), sums = room(true, packed.sums_size());
    const Tensor slice_weights = room(needs[1], slices * weight.numel());
    const Tensor slice_sums = room(sums_needed, slices * 2 * shape.atoms);
    const Tensor table = packed.synthesis_table(data<T>(weight));
    char* const begin = static_cast<char*>(memory.mutable_data_ptr());
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t first = i * slice;
      const Packed<T> part = packed.of_batch(std::min(slice, shape.batch() - first));
      const PackedCode<A> code = part.size.at(begin), gradient = part.size.at(begin + packed.size.bytes());
      part.pack(Support::nonzeros, data<T>(codes) + first * shape.code_item(), {}, code);
      part.pack(Support::of_code, data<T>(grad) + first * shape.code_item(), code, gradient);
      if (needs[1] || sums_needed)
        part.correlate(widened(part, y, first, plane), gradient, code, needs[1] ? mutable_data<A>(partials) : nullptr,
                       mutable_data<A>(sums), false);
      if (needs[1]) part.reduce(partials, weight.numel(), mutable_data<A>(slice_weights) + i * weight.numel());
      if (sums_needed) part.reduce(sums, 2 * shape.atoms, mutable_data<A>(slice_sums) + i * 2 * shape.atoms);
      if (needs[0]) {
        Combine<T> combine{};
        combine.tiles_scale = A(1);
        combine.out = mutable_data<A>(grad_y) + first * shape.signal_item();
        part.synthesize(gradient, table, combine);
      }
    }
    if (needs[1]) packed.reduce_slices(slice_weights, slices, weight.numel(), mutable_data<T>(grad_weight));
    if (sums_needed) packed.reduce_slices(slice_sums, slices, 2 * shape.atoms, mutable_data<T>(grad_sums));
  });
  return {grad_y, grad_weight, grad_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("packed_conv_soft_threshold", TORCH_BOX(&packed_conv_soft_threshold));
  library.impl("packed_conv_soft_threshold_backward", TORCH_BOX(&packed_conv_soft_threshold_backward));
}

}  // namespace dsc::cuda
