// The CUDA kernels for float32 behind a plain C interface: what check.py loads, to see that defects planted in the
// kernels are caught. No torch header is needed, so that each is compiled in a moment.
#include <vector>

#include "cuda/penalty_kernels.cuh"
#include "cuda/threshold_kernels.cuh"
#include "harness.h"

namespace {

using namespace dsc::cuda;

template <typename T>
void sum_partials(const std::vector<T>& partials, DeviceArray<T>& sums, int64_t count) {
  const int64_t parts = count == 0 ? 0 : partials.size() / count;
  launch(ceil_div(count, sums_per_block(parts)), sum_partials_kernel<T, T>, partials.data(), parts, count, sums.data());
}

}  // namespace

extern "C" {

DSC_EXPORT void seed(uint64_t value) { cuda_sim::seed(value); }

DSC_EXPORT const char* threshold(int64_t outer, int64_t channels, int64_t inner, int64_t part, int64_t blocks, float* u,
                                 float* theta, int64_t theta_size, float* bias, float* residual, float* out) {
  const ChannelPlan plan = channel_plan(outer, channels, inner, part);
  const int64_t size = outer * channels * inner;
  DeviceArray<float> device_u(u, size), device_theta(theta, theta_size), device_bias(bias, channels);
  DeviceArray<float> device_residual(residual, size), device_out(out, size);
  launch(std::min(blocks, plan.tasks()), threshold_kernel<float, SoftRule>, SoftRule{false}, plan,
         ThresholdForward<float>{device_u.data(), device_theta.data(), theta_size > 1, device_bias.data(),
                                 device_residual.data(), device_out.data()});
  return complaint();
}

DSC_EXPORT const char* threshold_backward(int64_t outer, int64_t channels, int64_t inner, int64_t part, int64_t blocks,
                                          float* grad, float* codes, float* theta, int64_t theta_size, float* grad_u,
                                          float* grad_theta, float* grad_bias) {
  const ChannelPlan plan = channel_plan(outer, channels, inner, part);
  const int64_t size = outer * channels * inner, partials = channels * plan.splits;
  DeviceArray<float> device_grad(grad, size), device_codes(codes, size), device_theta(theta, theta_size);
  DeviceArray<float> device_grad_u(grad_u, size), device_grad_theta(grad_theta, theta_size);
  DeviceArray<float> device_grad_bias(grad_bias, channels);
  std::vector<float> theta_partials(partials), bias_partials(partials);
  launch(std::min(blocks, plan.tasks()), threshold_backward_kernel<float, SoftRule>, SoftRule{false}, plan,
         ThresholdBackward<float>{device_grad.data(), device_codes.data(), device_theta.data(), theta_size > 1,
                                  device_grad_u.data(), theta_partials.data(), bias_partials.data()});
  sum_partials(theta_partials, device_grad_theta, theta_size);
  sum_partials(bias_partials, device_grad_bias, channels);
  return complaint();
}

DSC_EXPORT const char* l1_norm(int64_t size, int64_t blocks, float* x, double alpha, float* norm, int64_t* count) {
  DeviceArray<float> device_x(x, size), device_norm(norm, 1);
  DeviceArray<int64_t> device_count(count, 1);
  std::vector<float> norms(blocks);
  std::vector<int64_t> counts(blocks);
  launch(blocks, l1_norm_kernel<float>, device_x.data(), size / 4 * 4, size, alpha, norms.data(), counts.data());
  sum_partials(norms, device_norm, 1);
  sum_partials(counts, device_count, 1);
  return complaint();
}

DSC_EXPORT const char* l1_norm_backward(int64_t size, int64_t blocks, float* grad, float* x, float* grad_x) {
  DeviceArray<float> device_grad(grad, 1), device_x(x, size), device_grad_x(grad_x, size);
  launch(blocks, l1_norm_backward_kernel<float>, device_grad.data(), device_x.data(), size / 4 * 4, size,
         device_grad_x.data());
  return complaint();
}
}
