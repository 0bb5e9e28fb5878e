// Every operator of the library on one page, and the pybind11 module `_C` that says how this copy was built.
//
// Signals y are (N, C, *spatial), codes x are (N, M, *code_spatial), weights (M, C/groups, *kernel); theta is 0-d or
// (M,). Functions in Python (dsc_ops/functional.py) check their arguments before they come here: an operator relies on
// equal dtypes and devices and on sizes that fit. Shapes, gradients and autocast rules stand in dsc_ops/_autograd.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/dispatch.h"

// `geometry` in the comments below is: stride, padding, dilation, groups.
#define GEOMETRY "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

STABLE_TORCH_LIBRARY(dsc_ops, library) {
  // T(u + bias + residual), T two-sided or one-sided; u (N, M, *) or any shape when theta is 0-d and there is no bias.
  library.def("soft_threshold(Tensor u, Tensor theta, Tensor? bias, Tensor? residual, bool one_sided) -> Tensor");
  // From the codes it returned. grad_u is the gradient of u and of residual; grad_bias is (M,), empty where u has no
  // channels.
  library.def(
      "soft_threshold_backward(Tensor grad, Tensor codes, Tensor theta, bool one_sided)"
      " -> (Tensor grad_u, Tensor grad_theta, Tensor grad_bias)");

  // T_rho(u) for rho in relu, leaky_relu, elu, silu, mish, gelu.
  library.def("shrink(Tensor u, Tensor theta, str activation, bool one_sided) -> Tensor");
  library.def(
      "shrink_backward(Tensor grad, Tensor u, Tensor theta, str activation, bool one_sided)"
      " -> (Tensor grad_u, Tensor grad_theta)");

  // sum |x| (0-d, float32 or float64) and the number of |x| > alpha (0-d, int64), in one pass.
  library.def("l1_norm(Tensor x, float alpha) -> (Tensor norm, Tensor count)");
  library.def("l1_norm_backward(Tensor grad, Tensor x) -> Tensor");

  // A_W(y), S_W(x) and the weight's gradient of both: the three contractions of one trilinear form.
  library.def("analysis(Tensor y, Tensor weight, " GEOMETRY ") -> Tensor");
  library.def("synthesis(Tensor x, Tensor weight, SymInt[] signal_size, " GEOMETRY ") -> Tensor");
  library.def("correlation(Tensor y, Tensor x, SymInt[] kernel_size, " GEOMETRY ") -> Tensor");

  // T(A_W(y) + bias)
  library.def("conv_soft_threshold(Tensor y, Tensor weight, Tensor? bias, Tensor theta, " GEOMETRY
              ", bool one_sided) -> Tensor");
  // What is not needed (needs: y, weight, bias, theta) comes back as an empty tensor.
  library.def(
      "conv_soft_threshold_backward(Tensor grad, Tensor codes, Tensor y, Tensor weight, Tensor theta, " GEOMETRY
      ", bool one_sided, bool[] needs) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias, Tensor grad_theta)");

  // `iterations` steps x <- T(z + A_W(y - S_D z)) from x0 (zero when absent), z = x + momentum[k] (x - x_before);
  // analysis is (1, M, ...) when shared, else (iterations, M, ...); theta (iterations, M); momentum empty or
  // `iterations` long. The tape keeps what backward reads of the codes between the iterations; its layout is the
  // device's own affair, and it is empty unless asked for.
  library.def(
      "lista(Tensor y, Tensor dictionary, Tensor analysis, Tensor theta, Tensor? x0, float[] momentum, " GEOMETRY
      ", bool one_sided, bool keep_tape) -> (Tensor codes, Tensor tape)");
  // needs: y, dictionary, analysis, theta, x0
  library.def(
      "lista_backward(Tensor grad, Tensor tape, Tensor y, Tensor dictionary, Tensor analysis, Tensor theta,"
      " Tensor? x0, float[] momentum, " GEOMETRY
      ", bool one_sided, bool[] needs)"
      " -> (Tensor grad_y, Tensor grad_dictionary, Tensor grad_analysis, Tensor grad_theta, Tensor grad_x0)");

  // Asks for large pages for memory that is about to be written for the first time, where the system gives them.
  library.def("use_large_pages(Tensor memory) -> ()");

  // A block of MSD-CSC, on slices of channels. F is weight (w, C, 3, 3), of some dilation, with as much padding:
  // out = base + F x, or F^T x if transposed; base may be out. And sum of z[o, p] x[c, p + dilation t], the gradient
  // of F, (w, C, 3, 3) in float32 (float64).
  library.def(
      "dilated_convolution_(Tensor(a!) out, Tensor x, Tensor weight, int dilation, bool transposed, Tensor? base)"
      " -> ()");
  library.def("dilated_correlation(Tensor x, Tensor z, int dilation) -> Tensor");

  // relu(BN(scale x + bias)) in the place of x. Then u = g - scale [e; u], which stands there in the end, and relu(BN(u
  // + bias)) in out, or if `error` g less that; out may be g. scale is 0-d, the others (C,), all float32 (float64);
  // mean and variance are those of what batch norm gets, filled in training.
  library.def(
      "norm_relu_(Tensor(a!) x, Tensor scale, Tensor bias, Tensor gamma, Tensor beta, Tensor(b!) mean,"
      " Tensor(c!) variance, bool training, float eps) -> ()");
  library.def(
      "unfold_norm_relu_(Tensor(a!) u, Tensor g, Tensor e, Tensor scale, Tensor bias, Tensor gamma, Tensor beta,"
      " Tensor(b!) mean, Tensor(c!) variance, bool training, float eps, Tensor(d!) out, bool error) -> ()");
  // The gradient of relu(gamma xhat + beta), xhat = scale x + shift, with respect to gamma, beta and u, of which batch
  // norm makes xhat: `inverse` is one over u's standard deviation, which in training is that of this batch. grad
  // becomes factor grad_u in its first `handed` channels and grad_u in the others, share (absent or as grad) grad_u, if
  // `error` less grad; dot is the sum of grad_u e for the channels that e has, without e of grad_u x, of each channel.
  library.def(
      "norm_relu_backward_(Tensor(a!) grad, Tensor x, Tensor scale, Tensor shift, Tensor gamma, Tensor beta,"
      " Tensor inverse, bool training, Tensor factor, int handed, Tensor? e, Tensor(b!)? share, bool error)"
      " -> (Tensor grad_gamma, Tensor grad_beta, Tensor dot)");

  // The block of Res-CSC whose layers have as many channels as x, a multiple of 16: with A_i and S_i of first and
  // second (M, M, 3, 3), a = A_1 x, g = relu(BN_1(a)) + scale S_2 x, u = A_2 g and codes = relu(BN_2(u) + x), without +
  // x where there is no shortcut. scale is 0-d, the other values (M,), float32 or float64 as x. Results have channels
  // last; statistics are mean and variance of both norms (4, M), in training those of the batch.
  library.def(
      "res_csc(Tensor x, Tensor first, Tensor second, Tensor scale, Tensor gamma_1, Tensor beta_1, Tensor gamma_2,"
      " Tensor beta_2, Tensor mean_1, Tensor variance_1, Tensor mean_2, Tensor variance_2, bool training, float eps_1,"
      " float eps_2, bool shortcut) -> (Tensor codes, Tensor a, Tensor g, Tensor u, Tensor statistics)");
  library.def(
      "res_csc_backward(Tensor grad, Tensor a, Tensor g, Tensor u, Tensor statistics, Tensor x, Tensor first,"
      " Tensor second, Tensor scale, Tensor gamma_1, Tensor beta_1, Tensor gamma_2, Tensor beta_2, bool training,"
      " float eps_1, float eps_2, bool shortcut) -> (Tensor grad_x, Tensor grad_first, Tensor grad_second,"
      " Tensor grad_scale, Tensor grad_gamma_1, Tensor grad_beta_1, Tensor grad_gamma_2, Tensor grad_beta_2)");

  // What lista and conv_soft_threshold are on CUDA where the kernels on packed codes serve (dsc_ops/_on_cuda.py): one
  // group, no dilation; theta (iterations, M) or (M,) and bias (M,) in the type of sums, in which grad_y comes too.
  // grad_sums and grad_theta have rows for theta and for bias, (2, M) and (iterations, 2, M).
  library.def(
      "packed_conv_soft_threshold(Tensor y, Tensor weight, Tensor? bias, Tensor theta, SymInt[] stride,"
      " SymInt[] padding, bool one_sided, bool tensor_cores) -> Tensor");
  library.def(
      "packed_conv_soft_threshold_backward(Tensor grad, Tensor codes, Tensor y, Tensor weight, SymInt[] stride,"
      " SymInt[] padding, bool[] needs, bool tensor_cores) -> (Tensor grad_y, Tensor grad_weight, Tensor grad_sums)");
  library.def(
      "packed_lista(Tensor y, Tensor dictionary, Tensor analysis, Tensor theta, Tensor? x0, float[] momentum,"
      " SymInt[] stride, SymInt[] padding, bool one_sided, bool keep_tape, bool tensor_cores)"
      " -> (Tensor codes, Tensor tape)");
  library.def(
      "packed_lista_backward(Tensor grad, Tensor tape, Tensor y, Tensor dictionary, Tensor analysis, Tensor theta,"
      " Tensor? x0, float[] momentum, SymInt[] stride, SymInt[] padding, bool[] needs, bool tensor_cores)"
      " -> (Tensor grad_y, Tensor grad_dictionary, Tensor grad_analysis, Tensor grad_theta, Tensor grad_x0)");
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information and the choice of CPU kernels; the operators are torch.ops.dsc_ops.*";
  module.attr("version") = DSC_OPS_VERSION;
  module.attr("torch_version") = DSC_OPS_TORCH_VERSION;  // the torch that it was compiled against
  module.attr("cuda_version") = DSC_OPS_CUDA_VERSION;    // empty when built without CUDA kernels
  module.attr("cuda_architectures") = DSC_OPS_CUDA_ARCHITECTURES;
  module.attr("compiler") = DSC_OPS_COMPILER;
  module.def("cpu_capabilities", &dsc::cpu::available_capabilities, "Levels this machine can run, slowest first.");
  module.def("cpu_capability", &dsc::cpu::capability, "The level in use.");
  module.def("set_cpu_capability", &dsc::cpu::set_capability, pybind11::arg("level"),
             "Use the kernels of one level: default, avx2, avx512 or avx512_bf16.");
}
