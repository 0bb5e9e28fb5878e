// Element types of tensors and the type in which sums over them are kept.
//
// bfloat16 and float16 are storage only: a kernel converts on load, computes in float, and rounds to nearest even on
// store. The conversions are written out here so that the CPU kernels (at every instruction set level) and the CUDA
// kernels round alike, and so that no torch header is needed inside a kernel.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define DSC_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DSC_HOST_DEVICE inline __attribute__((always_inline))
#else
#define DSC_HOST_DEVICE inline
#endif

namespace dsc {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

// The type in which values of type T are computed and summed: double for double, float for everything else.
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

template <typename To, typename From>
DSC_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

DSC_HOST_DEVICE float load(float x) { return x; }
DSC_HOST_DEVICE double load(double x) { return x; }
DSC_HOST_DEVICE float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

#if defined(__F16C__) && !defined(__CUDACC__)
DSC_HOST_DEVICE float load(float16 x) { return _cvtsh_ss(x.bits); }
#else
// Without branches, so that loops over it vectorise: a normal or infinite half needs only its exponent moved, a
// subnormal one is an integer multiple of 2^-24.
DSC_HOST_DEVICE float load(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x38000000u : 0u;  // infinity or NaN: exponent all ones
  const float normal = bit_cast<float>(magnitude + 0x38000000u + special);
  const float subnormal = bit_cast<float>(magnitude + 0x38800000u) - 6.103515625e-05f;
  const uint32_t value = bit_cast<uint32_t>(magnitude < 0x00800000u ? subnormal : normal);
  return bit_cast<float>(value | sign);
}
#endif

template <typename T>
struct Store;

template <>
struct Store<float> {
  DSC_HOST_DEVICE static float from(float x) { return x; }
};

template <>
struct Store<double> {
  DSC_HOST_DEVICE static double from(double x) { return x; }
};

template <>
struct Store<bfloat16> {
  DSC_HOST_DEVICE static bfloat16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x0040u;
    return bfloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

template <>
struct Store<float16> {
  DSC_HOST_DEVICE static float16 from(float x) {
#if defined(__F16C__) && !defined(__CUDACC__)
    return float16{_cvtss_sh(x, 0)};
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal result: move the exponent and round to nearest even; a carry out of the mantissa is what rounding up
    // means.
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal result: adding 1/2 places the integer multiple of 2^-24 in the low bits, rounded by the addition
    // itself.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, else infinity
    const uint32_t value = magnitude >= 0x477ff000u ? large : (magnitude < 0x38800000u ? subnormal : normal);
    return float16{static_cast<uint16_t>(value | sign)};
#endif
  }
};

// Rounds an accumulated value to the element type T.
template <typename T>
DSC_HOST_DEVICE T store(accumulate_t<T> x) {
  return Store<T>::from(x);
}

}  // namespace dsc
