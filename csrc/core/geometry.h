// Shape of a convolution between a signal (N, C, H, W) and a code (N, M, h, w); a 1-D convolution is one with H = h
// = 1.
//
//   code pixel (h, w) and tap (kh, kw) meet signal pixel (h * stride_h - padding_h + kh * dilation_h, likewise for w).
#pragma once

#include <cstdint>

#include "scalar.h"

namespace dsc {

struct Geometry {
  int64_t batch, signal_channels, code_channels, groups;
  int64_t signal_h, signal_w;
  int64_t code_h, code_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;

  DSC_HOST_DEVICE int64_t signal_pixels() const { return signal_h * signal_w; }
  DSC_HOST_DEVICE int64_t code_pixels() const { return code_h * code_w; }
  DSC_HOST_DEVICE int64_t signal_size() const { return batch * signal_channels * signal_pixels(); }
  DSC_HOST_DEVICE int64_t code_size() const { return batch * code_channels * code_pixels(); }
  DSC_HOST_DEVICE int64_t group_signal_channels() const { return signal_channels / groups; }
  DSC_HOST_DEVICE int64_t group_code_channels() const { return code_channels / groups; }
  // Signal values that one code pixel of one group meets: C/groups * kernel_h * kernel_w.
  DSC_HOST_DEVICE int64_t patch() const { return group_signal_channels() * kernel_h * kernel_w; }
};

// Number of code pixels along one axis.
DSC_HOST_DEVICE int64_t code_extent(int64_t signal, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (signal + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace dsc
