// Compiled once for each instruction set level: DSC_CPU_LEVEL is baseline, avx2 or avx512, and the compiler's flags are
// to match. Everything here lives in a namespace of that name, for the reason given in kernels.h.
#include "kernels.h"

#define DSC_CONCAT_(a, b) a##b
#define DSC_CONCAT(a, b) DSC_CONCAT_(a, b)

#if defined(__AVX512F__)
#include "bf16_kernels.h"
#endif
#include "dilated_kernels.h"
#include "norm_kernels.h"
#include "packed_kernels.h"
#include "penalty_kernels.h"
#include "plane_kernels.h"
#include "rows_kernels.h"
#include "threshold_kernels.h"
#include "vectors.h"
#include "winograd_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

template <typename T>
constexpr Kernels<T> make_kernels() {
  return {{Vector<accumulate_t<T>>::lanes, tile_vectors, chunk_vectors, window_vectors, taps_per_range, 0},
          soft_threshold_tasks<T>,
          soft_threshold_backward_tasks<T>,
          shrink_tasks<T>,
          shrink_backward_tasks<T>,
          l1_norm_tasks<T>,
          l1_norm_backward_range<T>,
          norm_relu_channels<T>,
          norm_relu_backward_channels<T>,
          dilated_convolution_scratch<T>,
          dilated_convolution<T>,
          dilated_correlation_scratch<T>,
          dilated_correlation<T>,
          winograd_filters<accumulate_t<T>>,
          winograd_convolution_scratch<accumulate_t<T>>,
          winograd_convolution<accumulate_t<T>>,
          winograd_correlation_scratch<accumulate_t<T>>,
          winograd_correlation<accumulate_t<T>>,
          winograd_gradient<accumulate_t<T>>,
          moments_of_rows<accumulate_t<T>>,
          norm_rows<accumulate_t<T>>,
          norm_rows_sums<accumulate_t<T>>,
          norm_rows_backward<accumulate_t<T>>,
          workspace_size<accumulate_t<T>>,
          packed_synthesis<accumulate_t<T>>,
          packed_analysis<T>,
          dense_analysis<T>,
          packed_backward_analysis<accumulate_t<T>>,
          packed_backward_synthesis<accumulate_t<T>>,
          packed_combine<accumulate_t<T>>,
          packed_to_dense<T>,
          packed_from_dense<T>,
          sum_planes<accumulate_t<T>>,
          sum_columns<accumulate_t<T>>,
          count_bits};
}

}  // namespace DSC_CPU_LEVEL

constexpr KernelSet DSC_CONCAT(kernels_, DSC_CPU_LEVEL) = {
    DSC_CPU_LEVEL::make_kernels<float>(), DSC_CPU_LEVEL::make_kernels<double>(),
    DSC_CPU_LEVEL::make_kernels<bfloat16>(), DSC_CPU_LEVEL::make_kernels<float16>()};

#if defined(__AVX512F__)
constexpr KernelSet kernels_avx512_bf16 = [] {
  KernelSet set = DSC_CONCAT(kernels_, DSC_CPU_LEVEL);
  set.bf16.pairs_per_range = DSC_CPU_LEVEL::PairsOfTaps::per_range;
  set.bf16.packed_analysis = DSC_CPU_LEVEL::packed_analysis_of_bf16;
  set.bf16.dense_analysis = DSC_CPU_LEVEL::dense_analysis_of_bf16;
  return set;
}();
#endif

}  // namespace dsc::cpu
