// The analysis kernels of bfloat16 codes on processors with AVX512_BF16: products of pairs of taps.
//
// One instruction adds two products of bfloat16 to each of 16 sums in float32, twice as many as a multiplication in
// float32. The weights are bfloat16 as they come; the taps, a residual kept in float32, are rounded to it, as eager
// PyTorch rounds its residual. For a row of pixels the columns that their patches meet are rounded and copied side by
// side, with a zero at the end of each that has an odd number of taps. A patch is then one run of pairs, neighbours
// share most of it, a pair takes the place of a value, and the kernels of packed_kernels.h do the rest.
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
  template <typename A>
  DSC_HOST_DEVICE static void add(Lanes<float>& sum, float pair, const Lanes<float>& weights) {
    __m512 own = (__m512)sum;
    asm("vdpbf16ps %2, %1, %0" : "+v"(own) : "v"((__m512)weights), "v"(_mm512_set1_ps(pair)));
    sum = (Lanes<float>)own;
  }
};

// Copies of the columns that the patches of a block meet, in bfloat16, row of pixels by row; scratch has them first,
// then a Workspace.
struct ColumnsInPairs {
  static constexpr int64_t segment[1] = {0};
  Patches patches;             // as they lie in the copies
  int64_t base[block_pixels];  // of each pixel of the block
  uint16_t* copies;

  // A column may have one value more than in the plane; pixels have no more columns than their patches together.
  static int64_t bytes(int64_t vectors) {
    return (2 * block_pixels * vectors + 2) * Vector<float>::lanes * int64_t(sizeof(uint16_t));
  }

  ColumnsInPairs(const Patches& whole, char* memory) : patches{}, copies(reinterpret_cast<uint16_t*>(memory)) {
    patches.segments = 1;
    patches.length = patches.size = whole.segments * padded(whole.length, 2) / 2;
    patches.segment = segment;
  }

  const float* plane() const { return reinterpret_cast<const float*>(copies); }

  // `from` is where each pixel's patch lies in the plane, `first` the block's first pixel.
  void copy(const Patches& whole, const float* plane, const int64_t* from, int64_t first, int64_t pixels) {
    const int64_t length = padded(whole.length, 2);
    uint16_t* out = copies;
    for (int64_t t = 0; t < pixels;) {
      const int64_t stop = row_end(whole, first, t, pixels), columns = (stop - t - 1) * whole.fresh + whole.segments;
      const float* in = plane + from[t];
      for (int64_t begin = (out - copies) / 2; t < stop; ++t, begin += whole.fresh * length / 2) base[t] = begin;
      for (int64_t c = 0; c < columns; ++c, in += whole.column, out += length) {
        for (int64_t i = 0; i < whole.length; i += 16) {  // what is too much the zero and the next column overwrite
          __m256i rounded;
          asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(_mm512_loadu_ps(in + i)));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded);
        }
        if (length > whole.length) out[whole.length] = 0;
      }
    }
  }
};

inline int64_t workspace_size_with_pairs(int64_t atoms, int64_t vectors) {
  return ColumnsInPairs::bytes(vectors) + workspace_size<float>(atoms, vectors);
}

// Calls body(problem, scratch) for each block: the problem is that of the block alone, on the copies of its columns.
template <typename Problem, typename Body>
void for_each_block_in_pairs(const Problem& p, char* scratch, const Body& body) {
  ColumnsInPairs pairs(p.patches, scratch);
  Problem part = p;
  part.patches = pairs.patches;
  part.plane = pairs.plane();
  part.base = pairs.base;
  const int64_t bytes = mask_bytes(p.atoms);
  for (int64_t block = 0; block < block_count(p.pixels); ++block) {
    const int64_t first = block * block_pixels;
    part.pixels = block_size(p.pixels, block);
    if (p.start.masks) part.start = {p.start.masks + first * bytes, p.start.places + block, p.start.values};
    pairs.copy(p.patches, p.plane, p.base + first, first, part.pixels);
    body(part, block, scratch + ColumnsInPairs::bytes(p.patches.vectors));
  }
}

inline void packed_analysis_in_pairs(const PackedAnalysis<bfloat16>& p, char* scratch) {
  if (!p.patches.in_pairs) return packed_analysis(p, scratch);
  for_each_block_in_pairs(p, scratch, [&](PackedAnalysis<bfloat16>& part, int64_t block, char* rest) {
    const int64_t first = block * block_pixels;
    part.codes = {p.codes.masks + first * mask_bytes(p.atoms), p.codes.places + block, p.codes.values};
    packed_analysis<bfloat16, PairsOfTaps>(part, rest);
  });
}

inline void dense_analysis_in_pairs(const DenseAnalysis<bfloat16>& p, char* scratch) {
  if (!p.patches.in_pairs) return dense_analysis(p, scratch);
  for_each_block_in_pairs(p, scratch, [&](DenseAnalysis<bfloat16>& part, int64_t block, char* rest) {
    part.first = p.first + block * block_pixels;
    dense_analysis<bfloat16, PairsOfTaps>(part, rest);
  });
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
