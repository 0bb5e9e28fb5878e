// Which order the elementwise operators read a tensor in, and give their results.
#pragma once

#include "host.h"

namespace dsc::cpu {

// A layout and the memory format it stands for.
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
  if (memory_format(u) == MemoryFormat::ChannelsLast) return {{outer * inner, channels, 1}, MemoryFormat::ChannelsLast};
  return {{outer, channels, inner}, MemoryFormat::Contiguous};
}

}  // namespace dsc::cpu
