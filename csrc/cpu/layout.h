// Which order the elementwise operators read a tensor in, and give their results.
#pragma once

#include "host.h"

namespace dsc::cpu {

// channels_last, and not contiguous as well: the one other layout in which elementwise work is done as it stands.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

struct Dense {
  Layout layout;
  MemoryFormat format;

  // The tensor's values in this layout's order.
  Tensor values(const Tensor& tensor) const { return torch::stable::contiguous(tensor, format); }

  Tensor empty(const Tensor& model) const {
    return torch::stable::empty(sizes(model), model.scalar_type(), std::nullopt, model.device(), std::nullopt, format);
  }
};

inline Dense dense_layout(const Tensor& u) {
  if (u.dim() < 2) return {{1, 1, u.numel()}, MemoryFormat::Contiguous};
  const int64_t outer = u.size(0), channels = u.size(1);
  const int64_t inner = outer * channels > 0 ? u.numel() / (outer * channels) : 0;
  if (is_channels_last(u)) return {{outer * inner, channels, 1}, MemoryFormat::ChannelsLast};
  return {{outer, channels, inner}, MemoryFormat::Contiguous};
}

}  // namespace dsc::cpu
