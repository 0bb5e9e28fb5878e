// A 3x3 convolution of some dilation as a product of matrices: its nine shifts, and their sum. For dictionaries of few
// atoms and many channels, where what is shifted is small beside what is multiplied (dsc_ops/layers/csc/_dilated.py).
#include <cstring>

#include "host.h"

namespace dsc::cpu {
namespace {

constexpr int64_t width = 3, taps = width * width;

// Of one axis: result[i] belongs to source[i + offset] for i in [from, to).
struct Shift {
  Shift(int64_t tap, int64_t dilation, int64_t size)
      : offset((tap - width / 2) * dilation),
        from(std::clamp<int64_t>(-offset, 0, size)),
        to(std::clamp<int64_t>(size - offset, from, size)) {}

  int64_t offset, from, to;
};

void check(const Tensor& x, int64_t dilation) {
  STD_TORCH_CHECK(x.dim() == 4, "dsc_ops: x must be (N, C, H, W)");
  // Further away no pixel has another, and offsets stay far from overflow.
  STD_TORCH_CHECK(dilation >= 1 && dilation <= (int64_t{1} << 31), "dsc_ops: dilation must be positive, got ",
                  dilation);
}

Tensor shifts_cpu(const Tensor& x, int64_t dilation) {
  check(x, dilation);
  const int64_t batch = x.size(0), channels = x.size(1), height = x.size(2), length = x.size(3);
  const int64_t pixels = height * length;
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(x, {batch, taps * channels, height, length});
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = data<const T>(dense);
    T* const to = data<T>(out);
    parallel(out.numel() / std::max<int64_t>(1, pixels), grain_of(pixels), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t channel = plane % channels, tap = plane / channels % taps, image = plane / channels / taps;
        const int64_t mirrored = taps - 1 - tap;
        const Shift rows(mirrored / width, dilation, height), columns(mirrored % width, dilation, length);
        const T* const source = from + (image * channels + channel) * pixels;
        T* const result = to + plane * pixels;
        std::memset(result, 0, rows.from * length * sizeof(T));
        for (int64_t h = rows.from; h < rows.to; ++h) {
          T* const row = result + h * length;
          const T* const read = source + (h + rows.offset) * length + columns.offset;
          std::memset(row, 0, columns.from * sizeof(T));
          std::memcpy(row + columns.from, read + columns.from, (columns.to - columns.from) * sizeof(T));
          std::memset(row + columns.to, 0, (length - columns.to) * sizeof(T));
        }
        std::memset(result + rows.to * length, 0, (height - rows.to) * length * sizeof(T));
      }
    });
  });
  return out;
}

Tensor sum_of_shifts_cpu(const Tensor& x, int64_t dilation) {
  check(x, dilation);
  STD_TORCH_CHECK(x.size(1) % taps == 0, "dsc_ops: sum_of_shifts takes nine channels for each of its result, got ",
                  x.size(1));
  const int64_t batch = x.size(0), channels = x.size(1) / taps, height = x.size(2), length = x.size(3);
  const int64_t pixels = height * length;
  const Tensor dense = torch::stable::contiguous(x);
  const Tensor out = torch::stable::new_empty(x, {batch, channels, height, length});
  visit_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T* const from = data<const T>(dense);
    T* const to = data<T>(out);
    parallel(batch * channels * height, grain_of(taps * length), [&](int64_t begin, int64_t end) {
      const Buffer<accumulate_t<T>> sums(length);
      accumulate_t<T>* const sum = sums.get();
      for (int64_t at = begin; at < end; ++at) {
        const int64_t h = at % height, channel = at / height % channels, image = at / height / channels;
        std::fill_n(sum, length, accumulate_t<T>(0));
        for (int64_t tap = 0; tap < taps; ++tap) {
          const Shift rows(tap / width, dilation, height), columns(tap % width, dilation, length);
          if (h < rows.from || h >= rows.to) continue;
          const T* const read =
              from + ((image * taps + tap) * channels + channel) * pixels + (h + rows.offset) * length + columns.offset;
          for (int64_t w = columns.from; w < columns.to; ++w) sum[w] += load(read[w]);
        }
        for (int64_t w = 0; w < length; ++w) to[at * length + w] = store<T>(sum[w]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dsc_ops, CPU, library) {
  library.impl("shifts", TORCH_BOX(&shifts_cpu));
  library.impl("sum_of_shifts", TORCH_BOX(&sum_of_shifts_cpu));
}

}  // namespace dsc::cpu
