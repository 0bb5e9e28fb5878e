// The analysis kernels of bfloat16 codes on processors with AVX512_BF16: products of pairs of taps.
//
// One instruction adds two products of bfloat16 to each of 16 sums in float32, twice as many as a multiplication in
// float32. The weights are bfloat16 as they come; the taps, a residual kept in float32, are rounded to it, as eager
// PyTorch rounds its residual. For a row of pixels the columns that their patches meet are rounded and copied side by
// side, with a zero at the end of each that has an odd number of taps. A patch is then one run of pairs, neighbours
// share most of it, and a pair takes the place of a value.
//
// These instructions take what is too small for a normal number for zero, whatever the processor's settings.
//
// They are written as assembly, and so need no flags beyond those of AVX-512: its object has these two kernels too, and
// all else of the level avx512_bf16 is that of avx512.
#pragma once

#include "packed_kernels.h"

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

// Values of float32 are pairs of bfloat16.
struct PairsOfTaps {
  static constexpr int64_t per_range = 80;  // weights of 20 KiB: with 7 x 7 taps of 3 channels a tile is a whole row

  static int64_t size(const Patches& patches) { return patches.segments * padded(patches.length, 2) / 2; }
  static int64_t range(const Patches&) { return per_range; }
  static int64_t weights(const Patches&) { return 1; }
  static bool at_once(const Patches&) { return true; }

  static void place(const Patches& patches, const float* plane, const int64_t* base, int64_t first, int64_t pixels,
                    char* memory, Tiles<float>& tiles) {
    uint16_t *const copies = reinterpret_cast<uint16_t*>(memory), *out = copies;
    const float* begin[block_pixels];
    const int64_t length = padded(patches.length, 2);
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(patches, first, t, pixels);
      const int64_t columns = (stop - t - 1) * patches.fresh + patches.segments;
      const float* in = plane + base[t];
      const float* own = reinterpret_cast<const float*>(out);
      for (; t < stop; ++t, own += patches.fresh * length / 2) begin[t] = own;
      for (int64_t c = 0; c < columns; ++c, in += patches.column, out += length) {
        for (int64_t i = 0; i < patches.length; i += 16) {  // what is too much the zero and the next column overwrite
          __m256i rounded;
          asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(_mm512_loadu_ps(in + i)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded);
        }
        if (length > patches.length) out[patches.length] = 0;
      }
    }
    tiles.fill(pixels, [&](int64_t t) { return begin[t]; });
  }

  template <typename A>
  DSC_HOST_DEVICE static void add(Lanes<float>& sum, float pair, const Lanes<float>& weights) {
    __m512 own = (__m512)sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(own) : "v"((__m512)weights), "v"(_mm512_set1_ps(pair)));
    sum = (Lanes<float>)own;
  }

  template <int vectors, typename A, typename Start>
  DSC_HOST_DEVICE static void multiply(const Patches&, int64_t from, int64_t to, const A* weight, const A* const* pixel,
                                       Lanes<A> (&sum)[tile_pixels][vectors], const Start& start) {
    start(sum);
    const A* pair[tile_pixels];
#pragma GCC unroll 8
    for (int t = 0; t < tile_pixels; ++t) pair[t] = pixel[t] + from;
    multiply_run<vectors, PairsOfTaps>(pair, to - from, weight, sum);
  }
};

inline void packed_analysis_of_bf16(const PackedAnalysis<bfloat16>& p, char* scratch) {
  p.patches.products == TileProducts::pairs_of_taps ? packed_analysis_by<PairsOfTaps>(p, scratch)
                                                    : packed_analysis(p, scratch);
}

inline void dense_analysis_of_bf16(const DenseAnalysis<bfloat16>& p, char* scratch) {
  p.patches.products == TileProducts::pairs_of_taps ? dense_analysis_by<PairsOfTaps>(p, scratch)
                                                    : dense_analysis(p, scratch);
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
