// conv_soft_threshold on packed codes: T(A_W y + bias), and its gradients on the support of the codes.
#include "packed.h"

namespace dsc::cuda {
namespace {

// The signal in the type of sums.
template <typename T>
Tensor widened(const Packed<T>& packed, const Tensor& y) {
  if (y.scalar_type() == accumulate_dtype(y)) return y;
  const Tensor plane = packed.plane();
  Combine<T> combine{};
  combine.base = data<T>(y);
  combine.out = mutable_data<accumulate_t<T>>(plane);
  packed.synthesize({}, plane, combine);
  return plane;
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
    const Packed<T> packed(y, shape, tensor_cores);
    const Tensor plane = widened(packed, y), memory = packed.bytes(packed.size.bytes());
    const PackedCode<A> code = packed.size.at(memory.mutable_data_ptr());
    Analysis<A> analysis{};
    analysis.plane = data<A>(plane);
    analysis.bias = data<A>(dense_bias);
    analysis.theta = data<A>(dense_theta);
    analysis.one_sided = one_sided;
    analysis.out = code;
    packed.analyze(analysis, packed.analysis_table(data<T>(weight)));
    packed.unpack(code, mutable_data<T>(codes));
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
    const Packed<T> packed(y, shape, tensor_cores);
    const Tensor memory = packed.bytes(2 * packed.size.bytes());
    char* const begin = static_cast<char*>(memory.mutable_data_ptr());
    const PackedCode<A> code = packed.size.at(begin), gradient = packed.size.at(begin + packed.size.bytes());
    packed.pack(Support::nonzeros, data<T>(codes), {}, code);
    packed.pack(Support::of_code, data<T>(grad), code, gradient);
    if (needs[1] || sums_needed) {
      const Tensor plane = widened(packed, y);
      const Tensor partials = packed.bytes(needs[1] ? packed.partials_size() * int64_t(sizeof(A)) : 0);
      const Tensor sums = packed.bytes(packed.sums_size() * int64_t(sizeof(A)));
      packed.correlate(data<A>(plane), gradient, code, needs[1] ? mutable_data<A>(partials) : nullptr,
                       mutable_data<A>(sums), false);
      if (needs[1]) packed.reduce(partials, weight.numel(), mutable_data<T>(grad_weight));
      if (sums_needed) packed.reduce(sums, 2 * shape.atoms, mutable_data<T>(grad_sums));
    }
    if (needs[0]) {
      Combine<T> combine{};
      combine.tiles_scale = A(1);
      combine.out = mutable_data<A>(grad_y);
      packed.synthesize(gradient, packed.synthesis_table(data<T>(weight)), combine);
    }
  });
  return {grad_y, grad_weight, grad_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CUDA, library) {
  library.impl("packed_conv_soft_threshold", TORCH_BOX(&packed_conv_soft_threshold));
  library.impl("packed_conv_soft_threshold_backward", TORCH_BOX(&packed_conv_soft_threshold_backward));
}

}  // namespace dsc::cuda
