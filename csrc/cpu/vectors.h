// Vectors of an instruction set level, and vectors of a packed code's values by the bits of its masks.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dsc::cpu {
namespace DSC_CPU_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <typename A>
struct Vector {
  // Unaligned and allowed to alias: it is loaded from anywhere in an array of A.
  typedef A type __attribute__((vector_size(vector_bytes), aligned(sizeof(A)), may_alias));
  static constexpr int64_t lanes = vector_bytes / sizeof(A);
};

// For each byte: where its set bits are, and for each bit how many stand below it (negative where it is not set).
struct BitTables {
  uint8_t position[256][8];
  int8_t rank[256][8];
  constexpr BitTables() : position(), rank() {
    for (int byte = 0; byte < 256; ++byte) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = byte >> bit & 1;
        rank[byte][bit] = static_cast<int8_t>(set ? count : -128);
        if (set) position[byte][count++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
alignas(64) constexpr BitTables bit_tables;

template <typename A>
using Lanes = typename Vector<A>::type;

template <typename A>
struct MaskElement {
  using type = int32_t;
};
template <>
struct MaskElement<double> {
  using type = int64_t;
};
template <typename A>
struct MaskVector {
  typedef typename MaskElement<A>::type type __attribute__((vector_size(vector_bytes), aligned(sizeof(A)), may_alias));
};
template <typename A>
using LaneMask = typename MaskVector<A>::type;

template <typename A>
DSC_HOST_DEVICE Lanes<A> lanes_at(const A* in) {
  return *reinterpret_cast<const Lanes<A>*>(in);
}

// out[i] = in[i], between half precision and float.
template <typename T>
void widen(const T* in, int64_t size, float* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = load(in[i]);
}
template <typename T>
void narrow(const float* in, int64_t size, T* __restrict out) {
  for (int64_t i = 0; i < size; ++i) out[i] = store<T>(in[i]);
}

#if defined(__F16C__)
template <>
inline void widen(const float16* in, int64_t size, float* __restrict out) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
  for (; i < size; ++i) out[i] = load(in[i]);
}
template <>
inline void narrow(const float* in, int64_t size, float16* __restrict out) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  for (; i < size; ++i) out[i] = store<float16>(in[i]);
}
#endif

// u, or what is nearest to it within [-theta, theta]; theta >= 0. Theta for a NaN, so that u less it is one.
template <typename A>
DSC_HOST_DEVICE Lanes<A> clamped(const Lanes<A>& u, const Lanes<A>& theta) {
  const Lanes<A> below = u < theta ? u : theta;
  return below > -theta ? below : -theta;
}

// Bits of the lanes that are not zero (NaN is not).
template <typename A>
DSC_HOST_DEVICE unsigned nonzero_lanes(const Lanes<A>& v) {
  unsigned bits = 0;
  for (int i = 0; i < Vector<A>::lanes; ++i) bits |= unsigned(v[i] != A(0)) << i;
  return bits;
}

// The next value for each set bit, zero for the others; may read as many values as there are lanes.
template <typename A>
DSC_HOST_DEVICE Lanes<A> expand(unsigned bits, const A* values) {
  Lanes<A> v = {};
  for (int i = 0; i < Vector<A>::lanes; ++i)
    if (bits >> i & 1) v[i] = *values++;
  return v;
}

// The lanes of the set bits, side by side; may write as many values as there are lanes.
template <typename A>
DSC_HOST_DEVICE void compress(unsigned bits, const Lanes<A>& v, A* values) {
  for (int i = 0; i < Vector<A>::lanes; ++i)
    if (bits >> i & 1) *values++ = v[i];
}

template <typename A>
DSC_HOST_DEVICE A sum_of_lanes(const Lanes<A>& v) {
  A sum = v[0];
  for (int i = 1; i < Vector<A>::lanes; ++i) sum += v[i];
  return sum;
}

// Lanes [from, to) from memory, which is not read elsewhere; 0 in the others.
template <typename A>
DSC_HOST_DEVICE Lanes<A> load_between(int64_t from, int64_t to, const A* in) {
  Lanes<A> v = {};
  if (from <= 0 && to >= Vector<A>::lanes) return *reinterpret_cast<const Lanes<A>*>(in);
  for (int64_t i = from > 0 ? from : 0; i < to && i < Vector<A>::lanes; ++i) v[i] = in[i];
  return v;
}
template <typename A>
DSC_HOST_DEVICE void store_between(int64_t from, int64_t to, const Lanes<A>& v, A* out) {
  if (from <= 0 && to >= Vector<A>::lanes)
    *reinterpret_cast<Lanes<A>*>(out) = v;
  else
    for (int64_t i = from > 0 ? from : 0; i < to && i < Vector<A>::lanes; ++i) out[i] = v[i];
}

// sums[i] += the sum of the lanes of v[i].
template <typename A>
DSC_HOST_DEVICE void add_four_sums(const Lanes<A> (&v)[4], A* sums) {
  for (int i = 0; i < 4; ++i) sums[i] += sum_of_lanes<A>(v[i]);
}

// Of 64 bits: for 16 the compiler takes an instruction that waits for what its register had before.
DSC_HOST_DEVICE int64_t bit_count(uint64_t bits) { return __builtin_popcountll(bits); }

DSC_HOST_DEVICE bool any_nonzero(const uint8_t* mask, int64_t bytes) {
  uint64_t any = 0;
  for (int64_t b = 0; b < bytes; b += 8) {
    uint64_t word;
    memcpy(&word, mask + b, 8);
    any |= word;
  }
  return any != 0;
}

inline int64_t count_bits(const uint8_t* masks, int64_t bytes) {
  int64_t count = 0;
  for (int64_t b = 0; b < bytes; b += 8) {
    uint64_t word;
    memcpy(&word, masks + b, 8);
    count += bit_count(word);
  }
  return count;
}

// A pixel's mask, and one of a single word, which is read once. for_each_word calls body(word, its first atom).
struct Mask {
  const uint8_t* memory;
  int64_t bytes;

  DSC_HOST_DEVICE Mask(const uint8_t* memory_, int64_t bytes_) : memory(memory_), bytes(bytes_) {}
  DSC_HOST_DEVICE bool any() const { return any_nonzero(memory, bytes); }
  DSC_HOST_DEVICE int64_t count() const { return count_bits(memory, bytes); }
  template <typename Body>
  DSC_HOST_DEVICE void for_each_word(const Body& body) const {
    for (int64_t b = 0; b < bytes; b += 8) {
      uint64_t word;
      memcpy(&word, memory + b, 8);
      body(word, 8 * b);
    }
  }
};
struct WordMask {
  const uint8_t* memory;
  uint64_t bits;

  DSC_HOST_DEVICE WordMask(const uint8_t* memory_, int64_t) : memory(memory_) { memcpy(&bits, memory, 8); }
  DSC_HOST_DEVICE bool any() const { return bits != 0; }
  DSC_HOST_DEVICE int64_t count() const { return bit_count(bits); }
  template <typename Body>
  DSC_HOST_DEVICE void for_each_word(const Body& body) const {
    body(bits, int64_t{0});
  }
};

// Calls body(atom) for each set bit.
template <typename AnyMask, typename Body>
DSC_HOST_DEVICE void for_each_nonzero(const AnyMask& mask, const Body& body) {
  mask.for_each_word([&](uint64_t word, int64_t first) __attribute__((always_inline)) {
    for (; word; word &= word - 1) body(first + __builtin_ctzll(word));
  });
}
template <typename Body>
DSC_HOST_DEVICE void for_each_nonzero(const uint8_t* mask, int64_t bytes, const Body& body) {
  for_each_nonzero(Mask(mask, bytes), body);
}

#if defined(__AVX512F__)
// Zero, in a register of its own. On a Zen 5 the instructions that expand and compress wait for what their register had
// before, also where they write all of it, which takes three times as long; they do not wait for a zero.
template <typename A>
DSC_HOST_DEVICE Lanes<A> zero_register() {
  Lanes<A> zero = {};
  asm("" : "+v"(zero));
  return zero;
}
// The first lanes of v in those of the set bits, in order; 0 in the others.
template <typename A>
DSC_HOST_DEVICE Lanes<A> expanded(unsigned bits, const Lanes<A>& v) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_mask_expand_ps((__m512)zero_register<A>(), static_cast<__mmask16>(bits), (__m512)v);
  else
    return (Lanes<A>)_mm512_mask_expand_pd((__m512d)zero_register<A>(), static_cast<__mmask8>(bits), (__m512d)v);
}
// The lanes of the set bits, side by side; then 0.
template <typename A>
DSC_HOST_DEVICE Lanes<A> compressed(unsigned bits, const Lanes<A>& v) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_mask_compress_ps((__m512)zero_register<A>(), static_cast<__mmask16>(bits), (__m512)v);
  else
    return (Lanes<A>)_mm512_mask_compress_pd((__m512d)zero_register<A>(), static_cast<__mmask8>(bits), (__m512d)v);
}

template <>
DSC_HOST_DEVICE unsigned nonzero_lanes<float>(const Lanes<float>& v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
}
template <>
DSC_HOST_DEVICE Lanes<float> expand(unsigned bits, const float* values) {
  __m512 v = _mm512_loadu_ps(values);
  asm("" : "+v"(v));  // from memory the instruction takes several times as long
  return expanded<float>(bits, (Lanes<float>)v);
}
template <>
DSC_HOST_DEVICE void compress(unsigned bits, const Lanes<float>& v, float* values) {
  *reinterpret_cast<Lanes<float>*>(values) = compressed<float>(bits, v);
}
template <>
DSC_HOST_DEVICE float sum_of_lanes<float>(const Lanes<float>& v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
DSC_HOST_DEVICE unsigned nonzero_lanes<double>(const Lanes<double>& v) {
  return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NEQ_UQ);
}
template <>
DSC_HOST_DEVICE Lanes<double> expand(unsigned bits, const double* values) {
  __m512d v = _mm512_loadu_pd(values);
  asm("" : "+v"(v));  // from memory the instruction takes several times as long
  return expanded<double>(bits, (Lanes<double>)v);
}
template <>
DSC_HOST_DEVICE void compress(unsigned bits, const Lanes<double>& v, double* values) {
  *reinterpret_cast<Lanes<double>*>(values) = compressed<double>(bits, v);
}
template <>
DSC_HOST_DEVICE void add_four_sums<float>(const Lanes<float> (&v)[4], float* sums) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
}

// By one instruction: the smaller absolute value, with the sign of u.
template <>
DSC_HOST_DEVICE Lanes<float> clamped<float>(const Lanes<float>& u, const Lanes<float>& theta) {
  return (Lanes<float>)_mm512_range_ps((__m512)u, (__m512)theta, 2);
}
template <>
DSC_HOST_DEVICE Lanes<double> clamped<double>(const Lanes<double>& u, const Lanes<double>& theta) {
  return (Lanes<double>)_mm512_range_pd((__m512d)u, (__m512d)theta, 2);
}

// The values of a mask's lanes from memory, which is not read elsewhere; `other` in the others.
template <typename A>
DSC_HOST_DEVICE Lanes<A> load_lanes(const Lanes<A>& other, unsigned mask, const A* in) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_mask_loadu_ps((__m512)other, static_cast<__mmask16>(mask), in);
  else
    return (Lanes<A>)_mm512_mask_loadu_pd((__m512d)other, static_cast<__mmask8>(mask), in);
}
// v in the lanes of the mask, 0 in the others, whatever v is.
template <typename A>
DSC_HOST_DEVICE Lanes<A> only_lanes(unsigned mask, const Lanes<A>& v) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), (__m512)v);
  else
    return (Lanes<A>)_mm512_maskz_mov_pd(static_cast<__mmask8>(mask), (__m512d)v);
}
template <typename A>
DSC_HOST_DEVICE Lanes<A> broadcast(A value) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_set1_ps(value);
  else
    return (Lanes<A>)_mm512_set1_pd(value);
}
// `other` in the lanes of the mask, v in the others.
template <typename A>
DSC_HOST_DEVICE Lanes<A> with_lanes(const Lanes<A>& v, unsigned mask, const Lanes<A>& other) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_mask_mov_ps((__m512)v, static_cast<__mmask16>(mask), (__m512)other);
  else
    return (Lanes<A>)_mm512_mask_mov_pd((__m512d)v, static_cast<__mmask8>(mask), (__m512d)other);
}
template <typename A>
DSC_HOST_DEVICE void store_lanes(unsigned mask, const Lanes<A>& v, A* out) {
  if constexpr (sizeof(A) == 4)
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(mask), (__m512)v);
  else
    _mm512_mask_storeu_pd(out, static_cast<__mmask8>(mask), (__m512d)v);
}

// Bits of the lanes [from, to).
DSC_HOST_DEVICE unsigned lanes_between(int64_t from, int64_t to) {
  const uint32_t below = to < 0 ? 0 : _bzhi_u32(~0u, to < 32 ? static_cast<unsigned>(to) : 32u);
  return from <= 0 ? below : below & ~_bzhi_u32(~0u, from < 32 ? static_cast<unsigned>(from) : 32u);
}
template <>
DSC_HOST_DEVICE Lanes<float> load_between(int64_t from, int64_t to, const float* in) {
  if (from <= 0 && to >= Vector<float>::lanes) return *reinterpret_cast<const Lanes<float>*>(in);
  return load_lanes<float>(Lanes<float>{}, lanes_between(from, to), in);
}
template <>
DSC_HOST_DEVICE Lanes<double> load_between(int64_t from, int64_t to, const double* in) {
  return load_lanes<double>(Lanes<double>{}, lanes_between(from, to), in);
}
template <>
DSC_HOST_DEVICE void store_between(int64_t from, int64_t to, const Lanes<float>& v, float* out) {
  if (from <= 0 && to >= Vector<float>::lanes)
    *reinterpret_cast<Lanes<float>*>(out) = v;
  else
    store_lanes<float>(lanes_between(from, to), v, out);
}
template <>
DSC_HOST_DEVICE void store_between(int64_t from, int64_t to, const Lanes<double>& v, double* out) {
  store_lanes<double>(lanes_between(from, to), v, out);
}

// The lanes of the bits `from` of v in those of `to`, in order; 0 in the others.
template <typename A>
DSC_HOST_DEVICE Lanes<A> move_lanes(unsigned from, const Lanes<A>& v, unsigned to) {
  return expanded<A>(to, compressed<A>(from, v));
}

// Lanes [from, from + lanes) of a and b side by side, and the index that tells join_lanes so.
template <typename A>
DSC_HOST_DEVICE __m512i lanes_from(int64_t from) {
  typename MaskElement<A>::type index[Vector<A>::lanes];
  for (int64_t i = 0; i < Vector<A>::lanes; ++i) index[i] = static_cast<typename MaskElement<A>::type>(i + from);
  return _mm512_loadu_si512(index);
}
template <typename A>
DSC_HOST_DEVICE Lanes<A> join_lanes(const Lanes<A>& a, __m512i index, const Lanes<A>& b) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_permutex2var_ps((__m512)a, index, (__m512)b);
  else
    return (Lanes<A>)_mm512_permutex2var_pd((__m512d)a, index, (__m512d)b);
}
// Lanes [from, from + lanes) of a and b side by side, those of the mask alone; 0 in the others.
template <int from, typename A>
DSC_HOST_DEVICE Lanes<A> from_lane(unsigned mask, const Lanes<A>& a, const Lanes<A>& b) {
  if constexpr (sizeof(A) == 4)
    return (Lanes<A>)_mm512_maskz_alignr_epi32(static_cast<__mmask16>(mask), (__m512i)b, (__m512i)a, from);
  else
    return (Lanes<A>)_mm512_maskz_alignr_epi64(static_cast<__mmask8>(mask), (__m512i)b, (__m512i)a, from);
}
#elif defined(__AVX2__)
template <>
DSC_HOST_DEVICE unsigned nonzero_lanes<float>(const Lanes<float>& v) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
template <>
DSC_HOST_DEVICE Lanes<float> expand(unsigned bits, const float* values) {
  const __m128i rank = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bit_tables.rank[bits]));
  const __m256i index = _mm256_cvtepi8_epi32(rank);
  const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
  return (Lanes<float>)_mm256_blendv_ps(v, _mm256_setzero_ps(), _mm256_castsi256_ps(index));
}
template <>
DSC_HOST_DEVICE void compress(unsigned bits, const Lanes<float>& v, float* values) {
  const __m128i position = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bit_tables.position[bits]));
  _mm256_storeu_ps(values, _mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(position)));
}
template <>
DSC_HOST_DEVICE float sum_of_lanes<float>(const Lanes<float>& v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
template <>
DSC_HOST_DEVICE void add_four_sums<float>(const Lanes<float> (&v)[4], float* sums) {
  const __m256 low = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), high = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 all = _mm256_hadd_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
}
#endif

// Keeps the compiler from reading a vector again for each of its uses.
template <typename A>
DSC_HOST_DEVICE Lanes<A> in_register(Lanes<A> v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// sum += sign(x) g. A sign is changed in a vector register: the way to the others takes as long as a store.
#if defined(__AVX2__)
DSC_HOST_DEVICE void add_signed(const float* x, const float* g, float* sum) {
  const __m128 sign = _mm_and_ps(_mm_load_ss(x), _mm_set_ss(-0.0f));
  _mm_store_ss(sum, _mm_add_ss(_mm_load_ss(sum), _mm_xor_ps(_mm_load_ss(g), sign)));
}
DSC_HOST_DEVICE void add_signed(const double* x, const double* g, double* sum) {
  const __m128d sign = _mm_and_pd(_mm_load_sd(x), _mm_set_sd(-0.0));
  _mm_store_sd(sum, _mm_add_sd(_mm_load_sd(sum), _mm_xor_pd(_mm_load_sd(g), sign)));
}
#else
template <typename A>
DSC_HOST_DEVICE void add_signed(const A* x, const A* g, A* sum) {
  *sum += __builtin_signbit(*x) ? -*g : *g;
}
#endif

// Where an atom's row of so many vectors stands in tables. It is kept in a register, since the compiler else makes an
// address for each vector: these loops take as long as they have instructions.
template <int vectors, typename A>
struct Row {
  using V = Lanes<A>;
  int64_t bytes;

  DSC_HOST_DEVICE explicit Row(int64_t atom) : bytes(atom * static_cast<int64_t>(vectors * sizeof(V))) {
    asm("" : "+r"(bytes));
  }
  DSC_HOST_DEVICE const V& read(const A* table, int v) const {
    return *reinterpret_cast<const V*>(reinterpret_cast<const char*>(table) + bytes + v * sizeof(V));
  }
  DSC_HOST_DEVICE V* of(A* table) const {
    V* row = reinterpret_cast<V*>(reinterpret_cast<char*>(table) + bytes);
    asm("" : "+r"(row));
    return row;
  }
};

// out[i] += the sum of the lanes that multiply(atom, lanes) gives for each set bit of a mask: four at a time, whose
// lanes are summed together. Moves out on to the next pixel's.
template <typename A, typename AnyMask, typename Multiply>
DSC_HOST_DEVICE void add_dots_of_nonzeros(const AnyMask& mask, A*& out, const Multiply& multiply) {
  mask.for_each_word([&](uint64_t word, int64_t first) __attribute__((always_inline)) {
    const auto next = [&](Lanes<A>& dot) __attribute__((always_inline)) {
      const int64_t atom = first + __builtin_ctzll(word);
      word &= word - 1;
      multiply(atom, dot);
    };
    int64_t left = __builtin_popcountll(word);
    for (; left >= 4; left -= 4, out += 4) {
      Lanes<A> dots[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) next(dots[i]);
      add_four_sums<A>(dots, out);
    }
    if (left == 1) {
      Lanes<A> last;
      next(last);
      *out += sum_of_lanes<A>(last);
    } else if (left == 2) {
      Lanes<A> dots[4] = {};
      next(dots[0]);
      next(dots[1]);
      add_four_sums<A>(dots, out);
    } else if (left == 3) {
      Lanes<A> dots[4] = {};
      next(dots[0]);
      next(dots[1]);
      next(dots[2]);
      add_four_sums<A>(dots, out);
    }
    out += left;
  });
}

// turned[m][t] = in[t * stride + m], 8 x 8.
template <typename A>
DSC_HOST_DEVICE void turn(const A* in, int64_t stride, A (&turned)[8][8]) {
  for (int t = 0; t < 8; ++t)
    for (int m = 0; m < 8; ++m) turned[m][t] = in[t * stride + m];
}

#if defined(__AVX2__)
template <>
DSC_HOST_DEVICE void turn(const float* in, int64_t stride, float (&turned)[8][8]) {
  __m256 pairs[8], quads[8];
  for (int t = 0; t < 8; t += 2) {
    const __m256 even = _mm256_loadu_ps(in + t * stride), odd = _mm256_loadu_ps(in + (t + 1) * stride);
    pairs[t] = _mm256_unpacklo_ps(even, odd);
    pairs[t + 1] = _mm256_unpackhi_ps(even, odd);
  }
  for (int t = 0; t < 8; t += 4)
    for (int i = 0; i < 2; ++i) {
      quads[t + 2 * i] = _mm256_shuffle_ps(pairs[t + i], pairs[t + 2 + i], 0x44);
      quads[t + 2 * i + 1] = _mm256_shuffle_ps(pairs[t + i], pairs[t + 2 + i], 0xee);
    }
  for (int m = 0; m < 4; ++m) {
    _mm256_storeu_ps(turned[m], _mm256_permute2f128_ps(quads[m], quads[m + 4], 0x20));
    _mm256_storeu_ps(turned[m + 4], _mm256_permute2f128_ps(quads[m], quads[m + 4], 0x31));
  }
}
#endif

// Bits of lanes [vector * lanes, (vector + 1) * lanes) of a mask.
template <typename A>
DSC_HOST_DEVICE unsigned lane_bits(const uint8_t* mask, int64_t vector) {
  constexpr int lanes = Vector<A>::lanes;
  if (lanes == 16) {
    uint16_t bits;
    memcpy(&bits, mask + 2 * vector, 2);
    return bits;
  }
  if (lanes == 8) return mask[vector];
  return mask[vector * lanes / 8] >> vector * lanes % 8 & ((1u << lanes) - 1);
}

// Writes the lanes' bits into a mask; vectors come in rising order.
template <typename A>
DSC_HOST_DEVICE void set_lane_bits(uint8_t* mask, int64_t vector, unsigned bits) {
  constexpr int lanes = Vector<A>::lanes;
  if (lanes < 8) {
    const int64_t shift = vector * lanes % 8;
    uint8_t& byte = mask[vector * lanes / 8];
    byte = static_cast<uint8_t>((shift ? byte : 0) | bits << shift);
  } else if (lanes == 8) {
    mask[vector] = static_cast<uint8_t>(bits);
  } else {
    const uint16_t both = static_cast<uint16_t>(bits);
    memcpy(mask + 2 * vector, &both, 2);
  }
}

// Atoms of a row in memory: whole vectors, and whole bytes of a mask.
template <typename A>
DSC_HOST_DEVICE int64_t row_atoms(int64_t atoms) {
  return padded(atoms, Vector<A>::lanes > 8 ? Vector<A>::lanes : 8);
}

// Packs vectors of atoms one after the other: the bits of the non-zeros into a mask, their values side by side.
template <typename A>
struct Packer {
  uint8_t* mask;
  A* values;

  // `width` atoms are to come; the mask's bytes beyond them are zero.
  DSC_HOST_DEVICE Packer(uint8_t* mask_, int64_t bytes, int64_t width, A* values_) : mask(mask_), values(values_) {
    for (int64_t i = width / 8; i < bytes; ++i) mask[i] = 0;
  }
  DSC_HOST_DEVICE void add(int64_t vector, const Lanes<A>& v) {
    const unsigned bits = nonzero_lanes<A>(v);
    set_lane_bits<A>(mask, vector, bits);
    compress(bits, v, values);
    values += bit_count(bits);
  }
};

// Reads the packed values of a pixel as vectors of atoms.
template <typename A>
struct Reader {
  const uint8_t* mask;
  const A* values;

  DSC_HOST_DEVICE Lanes<A> next(int64_t vector) {
    const unsigned bits = lane_bits<A>(mask, vector);
    const Lanes<A> v = expand(bits, values);
    values += bit_count(bits);
    return v;
  }
};

// Writes the values of vectors of atoms where a given mask is set.
template <typename A>
struct Picker {
  const uint8_t* mask;
  A* values;

  DSC_HOST_DEVICE void add(int64_t vector, const Lanes<A>& v) {
    const unsigned bits = lane_bits<A>(mask, vector);
    compress(bits, v, values);
    values += bit_count(bits);
  }
};

// sign(x) g, lane by lane.
template <typename A>
DSC_HOST_DEVICE Lanes<A> with_sign_of(const Lanes<A>& x, const Lanes<A>& g) {
  using I = typename MaskElement<A>::type;
  constexpr I sign = I(1) << (8 * sizeof(I) - 1);
  return (Lanes<A>)((LaneMask<A>)g ^ ((LaneMask<A>)x & sign));
}

// Moves the values of a pixel from one mask to another; where that alone has a bit, 0. Both go on to the next pixel's.
template <typename A>
DSC_HOST_DEVICE void move_by_vectors(const uint8_t* from, const A*& in, const uint8_t* to, A*& out, int64_t vectors) {
  Reader<A> reader{from, in};
  Picker<A> picker{to, out};
  for (int64_t v = 0; v < vectors; ++v) picker.add(v, reader.next(v));
  in = reader.values;
  out = picker.values;
}
template <typename A>
DSC_HOST_DEVICE void move_pixel(const WordMask& from, const A*& in, const WordMask& to, A*& out, int64_t vectors) {
#if defined(__AVX512F__)
  // In one go where there are few.
  const int64_t read = from.count(), written = to.count();
  if (read <= Vector<A>::lanes && written <= Vector<A>::lanes) {
    const uint64_t both = from.bits & to.bits;
    *reinterpret_cast<Lanes<A>*>(out) =
        move_lanes<A>(static_cast<unsigned>(_pext_u64(both, from.bits)), *reinterpret_cast<const Lanes<A>*>(in),
                      static_cast<unsigned>(_pext_u64(both, to.bits)));
    in += read;
    out += written;
    return;
  }
#endif
  move_by_vectors(from.memory, in, to.memory, out, vectors);
}
template <typename A>
DSC_HOST_DEVICE void move_pixel(const Mask& from, const A*& in, const Mask& to, A*& out, int64_t vectors) {
  if (to.bytes == 8)
    move_pixel(WordMask(from.memory, 8), in, WordMask(to.memory, 8), out, vectors);
  else
    move_by_vectors(from.memory, in, to.memory, out, vectors);
}

}  // namespace DSC_CPU_LEVEL
}  // namespace dsc::cpu
