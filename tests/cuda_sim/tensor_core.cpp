// With group = lane / 4 and t = lane % 4, as the PTX ISA has it:
//
//   d[i]   row group + 8 (i / 2),        column 2 t + i % 2           both shapes
//   tf32   a[i]: row group + 8 (i % 2),  k = t + 4 (i / 2)            b[i]: k = t + 4 i,          column group
//   half   a[i]: row group + 8 (i % 2),  k = 2 t + 8 (i / 2) + half   b[i]: k = 2 t + 8 i + half, column group
//
// half: 0 for the low 16 bits of a register, 1 for the high ones.
#include "tensor_core.h"

#include <cstdint>
#include <cstring>

#include "core/scalar.h"

namespace cuda_sim {
namespace {

constexpr int rows = 16, columns = 8;

// Sums in float, in the order of k. A tensor core's sums are rounded otherwise; how is not documented.
template <int depth>
void multiply(float* const* d, const float (&a)[rows][depth], const float (&b)[depth][columns]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = d[lane][i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      d[lane][i] = sum;
    }
  }
}

// The low 13 bits of a float are not there for a tensor core.
float tf32(unsigned bits) { return dsc::bit_cast<float>(bits & 0xffffe000u); }

template <typename Half>
void multiply_halves(float* const* d, const unsigned* const* a, const unsigned* const* b) {
  float wide_a[rows][16], wide_b[16][columns];
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const auto number = [half](unsigned bits) {
        return dsc::load(Half{static_cast<uint16_t>(half ? bits >> 16 : bits)});
      };
      for (int i = 0; i < 4; ++i)
        wide_a[lane / 4 + 8 * (i % 2)][2 * (lane % 4) + 8 * (i / 2) + half] = number(a[lane][i]);
      for (int i = 0; i < 2; ++i) wide_b[2 * (lane % 4) + 8 * i + half][lane / 4] = number(b[lane][i]);
    }
  }
  multiply(d, wide_a, wide_b);
}

}  // namespace

void multiply_tf32(float* const* d, const unsigned* const* a, const unsigned* const* b) {
  float wide_a[rows][8], wide_b[8][columns];
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) wide_a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = tf32(a[lane][i]);
    for (int i = 0; i < 2; ++i) wide_b[lane % 4 + 4 * i][lane / 4] = tf32(b[lane][i]);
  }
  multiply(d, wide_a, wide_b);
}

void multiply_bf16(float* const* d, const unsigned* const* a, const unsigned* const* b) {
  multiply_halves<dsc::bfloat16>(d, a, b);
}

void multiply_f16(float* const* d, const unsigned* const* a, const unsigned* const* b) {
  multiply_halves<dsc::float16>(d, a, b);
}

}  // namespace cuda_sim
