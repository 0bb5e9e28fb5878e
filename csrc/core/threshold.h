// The thresholds of the library and their derivatives: the only place where they are written for CPU and CUDA.
//
//   two-sided   T(u)     = sign(u) max(|u| - theta, 0)
//   one-sided   T+(u)    = max(u - theta, 0)
//   generalised T_rho(u) = rho(u - theta) - rho(-u - theta),   one-sided rho(u - theta)
//
// theta >= 0 is meant; a negative theta is computed by the same formula and is no longer a proximal operator. NaN
// passes through every comparison below, as it does in eager PyTorch.
#pragma once

#include <cmath>

#include "scalar.h"

namespace dsc {

// Without branches and with nothing but arithmetic and selection, so that A may also be a vector of numbers, as GCC and
// Clang have them.
template <bool one_sided, typename A>
DSC_HOST_DEVICE A soft_threshold(A u, A theta) {
  const A zero{};
  if (one_sided) {
    const A shrunk = u - theta;
    return shrunk <= zero ? zero : shrunk;
  }
  const A shrunk = (u < zero ? -u : u) - theta;
  const A with_sign = u < zero ? -shrunk : shrunk;
  const A with_zero = u == zero ? zero * shrunk : with_sign;  // sign(0) is 0, where theta is negative or NaN
  return shrunk <= zero ? zero : with_zero;
}

// sign(x) g without a product, so that an infinite g meets no zero.
template <typename A>
DSC_HOST_DEVICE A sign_times(A x, A g) {
  return x == A(0) ? A(0) : (x < A(0) ? -g : g);
}

// dT/du: the support of the output is the mask, so the input need not be kept.
template <typename A>
DSC_HOST_DEVICE A soft_threshold_grad_u(A code, A grad) {
  return code == A(0) ? A(0) : grad;
}

// dT/dtheta = -sign(T(u)); a one-sided code is never negative.
template <typename A>
DSC_HOST_DEVICE A soft_threshold_grad_theta(A code, A grad) {
  return sign_times(code, -grad);
}

enum class Activation : int { relu, leaky_relu, elu, silu, mish, gelu };

// rho and its derivative, with PyTorch's default parameters (leaky_relu 0.01, elu 1, gelu without the tanh
// approximation).
template <Activation activation, typename A>
struct Rho;

template <typename A>
struct Rho<Activation::relu, A> {
  DSC_HOST_DEVICE static A value(A z) { return z <= A(0) ? A(0) : z; }
  DSC_HOST_DEVICE static A derivative(A z) { return z <= A(0) ? A(0) : A(1); }
};

template <typename A>
struct Rho<Activation::leaky_relu, A> {
  DSC_HOST_DEVICE static A value(A z) { return z <= A(0) ? A(0.01) * z : z; }
  DSC_HOST_DEVICE static A derivative(A z) { return z <= A(0) ? A(0.01) : A(1); }
};

template <typename A>
struct Rho<Activation::elu, A> {
  DSC_HOST_DEVICE static A value(A z) { return z <= A(0) ? std::expm1(z) : z; }
  DSC_HOST_DEVICE static A derivative(A z) { return z <= A(0) ? std::exp(z) : A(1); }
};

template <typename A>
DSC_HOST_DEVICE A sigmoid(A z) {
  return A(1) / (A(1) + std::exp(-z));
}

template <typename A>
struct Rho<Activation::silu, A> {
  DSC_HOST_DEVICE static A value(A z) { return z * sigmoid(z); }
  DSC_HOST_DEVICE static A derivative(A z) {
    const A s = sigmoid(z);
    return s * (A(1) + z * (A(1) - s));
  }
};

template <typename A>
DSC_HOST_DEVICE A softplus(A z) {
  return z > A(20) ? z : std::log1p(std::exp(z));
}

template <typename A>
struct Rho<Activation::mish, A> {
  DSC_HOST_DEVICE static A value(A z) { return z * std::tanh(softplus(z)); }
  DSC_HOST_DEVICE static A derivative(A z) {
    const A t = std::tanh(softplus(z));
    return t + z * sigmoid(z) * (A(1) - t * t);
  }
};

template <typename A>
struct Rho<Activation::gelu, A> {
  DSC_HOST_DEVICE static A value(A z) { return A(0.5) * z * (A(1) + std::erf(z * A(0.70710678118654752440))); }
  DSC_HOST_DEVICE static A derivative(A z) {
    const A cumulative = A(0.5) * (A(1) + std::erf(z * A(0.70710678118654752440)));
    const A density = A(0.39894228040143267794) * std::exp(A(-0.5) * z * z);
    return cumulative + z * density;
  }
};

template <Activation activation, bool one_sided, typename A>
DSC_HOST_DEVICE A shrink(A u, A theta) {
  using R = Rho<activation, A>;
  return one_sided ? R::value(u - theta) : R::value(u - theta) - R::value(-u - theta);
}

template <Activation activation, bool one_sided, typename A>
DSC_HOST_DEVICE A shrink_derivative_u(A u, A theta) {
  using R = Rho<activation, A>;
  return one_sided ? R::derivative(u - theta) : R::derivative(u - theta) + R::derivative(-u - theta);
}

template <Activation activation, bool one_sided, typename A>
DSC_HOST_DEVICE A shrink_derivative_theta(A u, A theta) {
  using R = Rho<activation, A>;
  return one_sided ? -R::derivative(u - theta) : R::derivative(-u - theta) - R::derivative(u - theta);
}

// Both at once, which share rho': half the work, in more registers than a kernel on a GPU has to spare.
template <Activation activation, bool one_sided, typename A>
struct ShrinkDerivatives {
  A of_u, of_theta;
  DSC_HOST_DEVICE ShrinkDerivatives(A u, A theta) {
    using R = Rho<activation, A>;
    const A above = R::derivative(u - theta), below = one_sided ? A(0) : R::derivative(-u - theta);
    of_u = above + below;
    of_theta = below - above;
  }
};

}  // namespace dsc
