// Kernels that try the executor itself.
//
//     selftest                 runs what has to work, under several orders; prints what went wrong, if anything
//     selftest DEFECT          plants a defect; prints the first complaint that some order brings about
//     selftest --list          the names of the defects
//     selftest --speed         measures the switch between threads
//
// Every kernel is ordinary CUDA: nvcc -x cu compiles this file too, and on a GPU the first of these has to work as
// well.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/scalar.h"
#include "cuda/cuda_portable.h"

namespace {

using namespace dsc::cuda;

// clang-format off
#define DSC_DEFECTS(is) \
  is(none) is(no_barrier_before) is(no_barrier_after) is(shared_write_behind) is(shared_read_behind) \
  is(shared_write_before) is(shared_unwritten) is(barrier_divergent) is(barriers_of_two_lines) \
  is(early_return) is(global_write_behind) is(global_read_behind) is(global_race) is(block_sum_not_atomic) \
  is(atomic_and_plain) is(no_fence_before_atomic) is(no_fence_behind_atomic) is(lanes_leave_before_shuffle) \
  is(shuffle_outside_mask) is(mask_without_caller) is(mask_beyond_block) is(shuffle_meets_ballot) \
  is(lane_never_arrives) is(no_syncwarp) is(shuffle_for_syncwarp) is(syncwarp_of_others) \
  is(copy_without_wait) is(copy_waits_too_late) is(copy_of_others_without_barrier) \
  is(copy_over_what_is_read) is(copy_misaligned) is(copy_to_global) is(copy_from_shared) \
  is(load_misaligned) is(store_misaligned) is(load_behind_shared) is(atomic_misaligned) \
  is(mma_by_half_a_warp)
// clang-format on

enum Defect {
#define DSC_NAME(name) name,
  DSC_DEFECTS(DSC_NAME)
#undef DSC_NAME
};

constexpr unsigned full = 0xffffffffu;

#if defined(__CUDACC__)
constexpr bool simulated = false;
const char* complaint() { return cudaGetErrorString(cudaGetLastError()); }
void* allocate(size_t bytes) {
  void* memory = nullptr;
  cudaMallocManaged(&memory, bytes);
  return memory;
}
void release(void* memory) { cudaFree(memory); }
bool finish() { return cudaDeviceSynchronize() == cudaSuccess; }
void seed(int) {}
#else
constexpr bool simulated = true;
const char* complaint() { return cuda_sim::complaint().c_str(); }
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }
bool finish() { return true; }
void seed(int value) { cuda_sim::seed(static_cast<uint64_t>(value)); }
#endif

// An array in a piece of memory of exactly its size.
template <typename T>
class Array {
 public:
  explicit Array(size_t size, T value = T()) : size_(size), memory_(static_cast<T*>(allocate(size * sizeof(T)))) {
    for (size_t i = 0; i < size; ++i) memory_[i] = value;
  }
  Array(const Array&) = delete;
  ~Array() { release(memory_); }
  T* data() { return memory_; }
  T& operator[](size_t i) { return memory_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  T* memory_;
};

std::string error;  // the first one of a test

void expect(bool condition, const std::string& what) {
  if (!condition && error.empty()) error = what;
}

template <typename... Parameters, typename... Arguments>
void launch(dim3 grid, unsigned threads, size_t dynamic_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  if (!error.empty()) return;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = dynamic_bytes;
  if (cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...) != cudaSuccess || !finish()) error = complaint();
}

// --- shared memory and barriers --------------------------------------------------------------------------------------

// out[block, round] = (round + 1) times the sum of the block's part of x; both rounds use the same shared memory.
__global__ void sum_kernel(const float* x, float* out, Defect defect) {
  constexpr int threads = 96;
  DSC_SHARED(float, sums, threads);
  const int thread = threadIdx.x;
  if (defect == early_return && thread == 7) return;
  const int shift = (defect == shared_write_behind) - (defect == shared_write_before);
  for (int round = 0; round < 2; ++round) {
    if (defect != shared_unwritten || thread != 5)
      sums[thread + shift] = static_cast<float>(round + 1) * x[blockIdx.x * threads + thread];
    if (defect == barrier_divergent) {
      if (thread < 64) __syncthreads();
    } else if (defect == barriers_of_two_lines && thread < 32) {
      __syncthreads();
    } else if (defect != no_barrier_before) {
      __syncthreads();
    }
    if (thread == 40) {
      float sum = 0;
      for (int i = 0; i < threads + (defect == shared_read_behind); ++i) sum += sums[i];
      out[2 * blockIdx.x + round] = sum;
    }
    if (defect != no_barrier_after) __syncthreads();
  }
}

void sums(Defect defect) {
  constexpr int blocks = 5;
  Array<float> x(blocks * 96), out(blocks * 2, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  launch(blocks, 96, 0, sum_kernel, x.data(), out.data(), defect);
  for (int b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int i = 0; i < 96; ++i) sum += x[b * 96 + i];
    for (int round = 0; round < 2; ++round)
      expect(out[2 * b + round] == static_cast<float>(round + 1) * sum, "wrong result: the sum of a block");
  }
}

struct Pair {
  double first;
  int second;
};

__device__ float* shared_place(bool write) {
  DSC_SHARED(float, place, 3);
  if (write && threadIdx.x < 3) place[threadIdx.x] = 1;
  return place;
}

__device__ unsigned modulo(const void* address, unsigned divisor) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(address) % divisor);
}

// Shared memory is aligned as declared and no better, and is the same at every call.
__global__ void alignment_kernel(int* wrong) {
  DSC_SHARED(uint8_t, bytes, 5);
  DSC_SHARED(Pair, pairs, 3);
  DSC_SHARED(Vector16<float>, vectors, 2);
  DSC_DYNAMIC_SHARED(float, dynamic);
  const bool well = modulo(bytes, 2) == 1 && modulo(pairs, 16) == 8 && modulo(vectors, 32) == 16 &&
                    modulo(dynamic, 32) == 16 && modulo(shared_place(true), 8) == 4 &&
                    shared_place(false) == shared_place(true);
  if (!well) atomicAdd(wrong, 1);
}

// Every thread sees the NaN of a new block, though the block before has written there.
__global__ void fill_kernel(int* wrong) {
  DSC_SHARED(float, values, 64);
  DSC_DYNAMIC_SHARED(double, dynamic);
  if (!std::isnan(values[threadIdx.x]) || !std::isnan(dynamic[threadIdx.x])) atomicAdd(wrong, 1);
  values[threadIdx.x] = 1;
  dynamic[threadIdx.x] = 1;
}

[[maybe_unused]] void shared_memory(Defect) {
  Array<int> wrong(1, 0);
  launch(3, 64, 16, alignment_kernel, wrong.data());
  expect(wrong[0] == 0, "shared memory is not aligned as declared");
}

[[maybe_unused]] void shared_memory_starts_as_nan(Defect) {
  Array<int> wrong(1, 0);
  launch(3, 64, 64 * sizeof(double), fill_kernel, wrong.data());
  expect(wrong[0] == 0, "shared memory is not NaN at first");
}

// Neighbouring bytes and halves belong to different threads.
__global__ void bytes_kernel(uint8_t* out) {
  DSC_SHARED(uint8_t, bytes, 64);
  DSC_SHARED(uint16_t, halves, 64);
  const int thread = threadIdx.x;
  bytes[thread] = static_cast<uint8_t>(thread);
  halves[thread] = static_cast<uint16_t>(thread);
  __syncthreads();
  out[thread] = static_cast<uint8_t>(bytes[63 - thread] + halves[thread]);
}

void bytes(Defect) {
  Array<uint8_t> out(64, 0);
  launch(1, 64, 0, bytes_kernel, out.data());
  for (int i = 0; i < 64; ++i) expect(out[i] == 63, "wrong result: bytes of neighbouring threads");
}

// --- global memory, atomics, grids -----------------------------------------------------------------------------------

__global__ void global_kernel(float* x, int size, float* sum, Defect defect) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size + (defect == global_write_behind)) x[i] = static_cast<float>(i % 5);
  if (defect == global_read_behind && i < size) x[i] += 0 * x[i + 1];
  if (defect == global_race && i == 3) x[0] = x[1];
  if (i >= size) return;
  if (defect == block_sum_not_atomic) {
    if (threadIdx.x == 0) *sum += 1;
  } else if (defect == atomic_and_plain && i == 0) {
    *sum = 0;
  } else if (defect == atomic_misaligned) {
    atomicAdd(reinterpret_cast<float*>(reinterpret_cast<char*>(sum) + 2), 1.0f);
  } else {
    atomicAdd(sum, 1.0f);
  }
}

void global_memory(Defect defect) {
  constexpr int size = 61;
  Array<float> x(size, NAN), sum(2, 0);
  launch(4, 16, 0, global_kernel, x.data(), size, sum.data(), defect);
  for (int i = 0; i < size; ++i) expect(x[i] == static_cast<float>(i % 5), "wrong result: an element");
  if (defect == none) expect(sum[0] == size, "wrong result: the number of elements");
}

__global__ void atomics_kernel(int* i, unsigned* u, unsigned long long* l, float* f) {
  const int x = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(i, -x);
  atomicAdd(u, static_cast<unsigned>(x));
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, 0.5f);
  atomicMax(i + 1, x - 1000);
  atomicMax(u + 1, static_cast<unsigned>(x));
  atomicMax(l + 1, static_cast<unsigned long long>(x) << 33);
}

void atomics(Defect) {
  Array<int> i(2, -5000);
  Array<unsigned> u(2, 0);
  Array<unsigned long long> l(2, 0);
  Array<float> f(1, 0);
  launch(3, 100, 0, atomics_kernel, i.data(), u.data(), l.data(), f.data());
  expect(i[0] == -5000 - 299 * 150 && u[0] == 299 * 150 && l[0] == 300ull << 33 && f[0] == 150, "wrong atomicAdd");
  expect(i[1] == -701 && u[1] == 299 && l[1] == 299ull << 33, "wrong atomicMax");
}

__global__ void grid_kernel(int* visits, int* order, int* next) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned i = block * blockDim.x + threadIdx.x;
  ++visits[i];
  order[atomicAdd(next, 1)] = static_cast<int>(i);
}

// Every thread of every block runs once; their order differs from seed to seed.
void grids(Defect) {
  constexpr int count = 3 * 4 * 5 * 33;
  std::vector<int> before;
  for (int run = 0; run < 2; ++run) {
    Array<int> visits(count, 0), order(count, -1), next(1, 0);
    seed(run);
    launch(dim3(3, 4, 5), 33, 0, grid_kernel, visits.data(), order.data(), next.data());
    std::vector<int> now;
    for (int i = 0; i < count; ++i) {
      expect(visits[i] == 1, "a thread did not run once");
      now.push_back(order[i]);
    }
    if (simulated) expect(now != before, "the order of threads does not depend on the seed");
    if (simulated) expect(now[0] / 33 == now[32] / 33, "blocks do not run one after another");
    before = now;
  }
}

// The block that comes last adds up what all have written.
__global__ void last_block_kernel(float* partials, unsigned* finished, float* out, Defect defect) {
  DSC_SHARED(int, last, 1);
  if (threadIdx.x == 32) partials[2 * blockIdx.x] = 1;
  if (threadIdx.x == 0) partials[2 * blockIdx.x + 1] = 2;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (defect != no_fence_before_atomic) __threadfence();
    last[0] = atomicAdd(finished, 1u) == gridDim.x - 1;
    if (defect != no_fence_behind_atomic) __threadfence();
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 5) return;
  float sum = 0;
  for (unsigned i = 0; i < 2 * gridDim.x; ++i) sum += partials[i];
  *out = sum;
}

void last_block(Defect defect) {
  Array<float> partials(14, NAN), out(1, NAN);
  Array<unsigned> finished(1, 0);
  launch(7, 64, 0, last_block_kernel, partials.data(), finished.data(), out.data(), defect);
  expect(out[0] == 21, "wrong result: the last block's sum");
}

// --- operations of a warp --------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffle_kernel(const T* x, T* out, int width) {
  const int thread = threadIdx.x, lane = thread % 32, threads = blockDim.x;
  const T value = x[thread];
  out[thread] = __shfl_sync(full, value, lane * 3 + 1, width);
  out[threads + thread] = __shfl_up_sync(full, value, 3, width);
  out[2 * threads + thread] = __shfl_down_sync(full, value, 3, width);
  out[3 * threads + thread] = __shfl_xor_sync(full, value, 5, width);
}

// The lane that each of the four reads.
int source_of(int operation, int lane, int width) {
  const int first = lane / width * width, position = lane % width;
  if (operation == 0) return first + (lane * 3 + 1) % width;
  if (operation == 1) return position >= 3 ? lane - 3 : lane;
  if (operation == 2) return position + 3 < width ? lane + 3 : lane;
  return (lane ^ 5) < first + width ? lane ^ 5 : lane;
}

template <typename T>
void shuffles_of(T step) {
  constexpr int threads = 96;
  for (const int width : {1, 2, 8, 32}) {
    Array<T> x(threads), out(4 * threads);
    for (int i = 0; i < threads; ++i) x[i] = static_cast<T>(i) * step;
    launch(1, threads, 0, shuffle_kernel<T>, x.data(), out.data(), width);
    for (int i = 0; i < 4 * threads; ++i) {
      const int thread = i % threads, source = thread / 32 * 32 + source_of(i / threads, thread % 32, width);
      expect(out[i] == x[source], "wrong result: a shuffle");
    }
  }
}

void shuffles(Defect) {
  shuffles_of<int>(-3);
  shuffles_of<unsigned>(3u << 25);
  shuffles_of<float>(0.1f);
  shuffles_of<double>(0.1);
  shuffles_of<long long>(-(1ll << 40));
  shuffles_of<unsigned long>(1ul << 57);
}

// The lanes of a warp go two ways, in which they meet among themselves; the last warp has 8 lanes.
__global__ void ballot_kernel(unsigned* out) {
  const int thread = threadIdx.x, lane = thread % 32;
  const unsigned all = thread < 32 ? full : 0xffu, odd = all & 0xaaaaaaaau, mask = lane % 2 ? odd : all & ~odd;
  unsigned value;
  if (lane % 2) {
    value = __ballot_sync(mask, lane % 3 == 0);
    value = __shfl_sync(mask, value, 3) + (__any_sync(mask, lane == 5) ? 1 : 0);
  } else {
    value = __ballot_sync(mask, lane % 3 == 1);
    value = __shfl_sync(mask, value, 4) + (__all_sync(mask, lane % 2 == 0) ? 1 : 0);
  }
  out[thread] = value + (__any_sync(all, lane == 40) ? 2 : 0) + (__all_sync(all, lane != 3) ? 4 : 0);
}

void ballots(Defect) {
  Array<unsigned> out(40, 0);
  launch(1, 40, 0, ballot_kernel, out.data());
  for (int i = 0; i < 40; ++i) {
    unsigned bits = 0;
    for (int lane = i % 2; lane < (i < 32 ? 32 : 8); lane += 2)
      bits |= static_cast<unsigned>(lane % 3 == (i % 2 ? 0 : 1)) << lane;
    expect(out[i] == bits + 1, "wrong result: a ballot");
  }
}

// The lower half of a warp writes what the upper half reads.
__global__ void sync_warp_kernel(int* out, Defect defect) {
  DSC_SHARED(int, values, 32);
  const int lane = threadIdx.x;
  if (lane < 16) values[lane] = lane;
  if (defect == shuffle_for_syncwarp) {
    __shfl_xor_sync(full, lane, 16);
  } else if (defect == syncwarp_of_others) {
    if (lane < 8 || lane >= 24) __syncwarp(0xff0000ffu);
  } else if (defect != no_syncwarp) {
    __syncwarp();
  }
  if (lane >= 16) out[lane] = values[lane - 16];
  __syncwarp();
  if (lane < 16) values[lane] = -1;
}

void sync_warp(Defect defect) {
  Array<int> out(32, -2);
  launch(1, 32, 0, sync_warp_kernel, out.data(), defect);
  for (int i = 16; i < 32; ++i) expect(out[i] == i - 16, "wrong result: a value passed on in a warp");
}

__global__ void masks_kernel(int* out, Defect defect) {
  const int lane = threadIdx.x % 32;
  int value = lane;
  if (defect == lanes_leave_before_shuffle && lane >= 16) return;
  if (defect == shuffle_outside_mask && lane < 16) value = __shfl_down_sync(0xffffu, value, 1);
  if (defect == mask_without_caller) value = __shfl_xor_sync(0xffffu, value, 1);
  if (defect == mask_beyond_block && threadIdx.x >= 32) value = __shfl_xor_sync(full, value, 1);
  if (defect == lane_never_arrives && lane == 3) __syncthreads();
  if (defect == shuffle_meets_ballot && threadIdx.x == 3) {
    value = static_cast<int>(__ballot_sync(full, 1));
  } else if (threadIdx.x < 32) {
    value = __shfl_xor_sync(full, value, 1);
  }
  out[threadIdx.x] = value;
}

void masks(Defect defect) {
  Array<int> out(40, 0);
  launch(1, 40, 0, masks_kernel, out.data(), defect);
}

__global__ void arithmetic_kernel(const unsigned* x, unsigned* out, int size) {
  const int i = threadIdx.x;
  if (i >= size) return;
  const unsigned long long wide = static_cast<unsigned long long>(x[i]) << 20;
  out[i] =
      static_cast<unsigned>(__popc(x[i]) + 100 * __ffs(static_cast<int>(x[i])) + 10000 * __clz(static_cast<int>(x[i])));
  out[size + i] = static_cast<unsigned>(__popcll(wide) + 100 * __ffsll(static_cast<long long>(wide)) +
                                        10000 * __clzll(static_cast<long long>(wide)));
  out[2 * size + i] = __brev(x[i]);
  out[3 * size + i] = __float_as_uint(fmaf(__uint_as_float(x[i]), 2.0f, 0.0f));
}

void arithmetic(Defect) {
  const std::vector<unsigned> values = {0, 1, 2, 0x80000000u, full, 0x00ff1234u, 0x3f800000u, 0x40490fdbu};
  const int size = static_cast<int>(values.size());
  Array<unsigned> x(values.size()), out(4 * values.size());
  for (int i = 0; i < size; ++i) x[i] = values[i];
  launch(1, 32, 0, arithmetic_kernel, x.data(), out.data(), size);
  for (int i = 0; i < size; ++i) {
    unsigned counts[] = {0, 0, 32, 0, 0, 64}, reversed = 0;  // set bits, first, leading zeros: of 32 and of 64 bits
    for (unsigned bit = 0; bit < 32; ++bit) {
      if (!(values[i] >> bit & 1)) continue;
      ++counts[0];
      if (counts[1] == 0) counts[1] = bit + 1;
      counts[2] = 31 - bit;
      reversed |= 1u << (31 - bit);
    }
    counts[3] = counts[0];
    counts[4] = counts[1] ? counts[1] + 20 : 0;
    counts[5] = counts[1] ? counts[2] + 12 : 64;
    expect(out[i] == counts[0] + 100 * counts[1] + 10000 * counts[2], "wrong result: bits of 32");
    expect(out[size + i] == counts[3] + 100 * counts[4] + 10000 * counts[5], "wrong result: bits of 64");
    expect(out[2 * size + i] == reversed, "wrong result: __brev");
    if (i >= 6) expect(out[3 * size + i] == values[i] + (1u << 23), "wrong result: bits of a float");
  }
}

// --- accesses of 16 bytes, asynchronous copies -----------------------------------------------------------------------

__global__ void vectors_kernel(const float* x, float* out, const dsc::bfloat16* halves, dsc::bfloat16* out_halves,
                               Defect defect) {
  DSC_DYNAMIC_SHARED(float, stage);
  const int thread = threadIdx.x;
  Vector16<float> vector = load16(x + 4 * thread + (defect == load_misaligned && thread == 3 ? 1 : 0));
  for (float& value : vector.values) value += 1;
  store16(stage + 4 * thread + (defect == store_misaligned && thread == 3 ? 1 : 0), vector);
  __syncthreads();
  const int other = static_cast<int>(blockDim.x) - 1 - thread + (defect == load_behind_shared && thread == 0 ? 1 : 0);
  store16(out + 4 * thread, load16(stage + 4 * other));
  store16(out_halves + 8 * thread, load16(halves + 8 * thread));
}

void vectors(Defect defect) {
  constexpr int threads = 32;
  Array<float> x(4 * threads + 4), out(4 * threads);
  Array<dsc::bfloat16> halves(8 * threads), out_halves(8 * threads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  for (size_t i = 0; i < halves.size(); ++i) halves[i].bits = static_cast<uint16_t>(i);
  launch(1, threads, threads * 16, vectors_kernel, x.data(), out.data(), halves.data(), out_halves.data(), defect);
  for (int i = 0; i < 4 * threads; ++i)
    expect(out[i] == x[4 * (threads - 1 - i / 4) + i % 4] + 1, "wrong result: a vector of floats");
  for (int i = 0; i < 8 * threads; ++i) expect(out_halves[i].bits == i, "wrong result: a vector of halves");
}

// Sums of tiles of x, each copied while the one before is added up.
__global__ void pipeline_kernel(const float* x, float* sums, int tiles, Defect defect) {
  constexpr int threads = 64, tile = 4 * threads;
  DSC_SHARED(Vector16<float>, stages, 2 * threads);
  const int thread = threadIdx.x;
  float* const values = stages[0].values;
  const auto copy = [&](int i) {
    copy_async16(values + i % 2 * tile + 4 * thread + (defect == copy_misaligned && thread == 9 ? 2 : 0),
                 x + i * tile + 4 * thread);
    copy_async_commit();
  };
  if (defect == copy_to_global) copy_async16(sums, x);
  if (defect == copy_from_shared) copy_async16(values, values + 4);
  copy(0);
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) {
      copy(i + 1);
      if (defect != copy_without_wait && defect != copy_waits_too_late) copy_async_wait<1>();
      if (defect == copy_waits_too_late) copy_async_wait<2>();
    } else if (defect != copy_without_wait) {
      copy_async_wait<0>();
    }
    if (defect != copy_of_others_without_barrier) __syncthreads();
    if (thread == 17) {
      float sum = 0;
      for (int k = 0; k < tile; ++k) sum += values[i % 2 * tile + k];
      sums[i] = sum;
    }
    if (defect != copy_over_what_is_read) __syncthreads();
  }
}

void pipeline(Defect defect) {
  constexpr int tiles = 5, tile = 256;
  Array<float> x(tiles * tile), sums(tiles, NAN);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 11);
  launch(1, 64, 0, pipeline_kernel, x.data(), sums.data(), tiles, defect);
  for (int i = 0; i < tiles; ++i) {
    float sum = 0;
    for (int k = 0; k < tile; ++k) sum += x[i * tile + k];
    expect(sums[i] == sum, "wrong result: the sum of a tile");
  }
}

// --- tensor cores ----------------------------------------------------------------------------------------------------

struct Tf32 {
  static constexpr int depth = 8, packed = 1;
  static unsigned encode(float x) { return dsc::bit_cast<unsigned>(x) | 0x1fffu; }  // the low bits have no effect
  static __device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_tf32(d, a, b); }
};

struct Bf16 {
  static constexpr int depth = 16, packed = 2;
  static unsigned encode(float x) { return dsc::store<dsc::bfloat16>(x).bits; }
  static __device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_bf16(d, a, b); }
};

struct F16 {
  static constexpr int depth = 16, packed = 2;
  static unsigned encode(float x) { return dsc::store<dsc::float16>(x).bits; }
  static __device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { mma_f16(d, a, b); }
};

// c += a b for row-major a (16, depth), c (16, 8) and column-major b, whose registers hold `packed` neighbours along
// the depth. Per lane, with group = lane / 4 and t = lane % 4: a has rows group and group + 8, b column group, c
// columns 2 t and 2 t + 1; register by register the depth is t, and t + 4.
template <typename Format>
__global__ void mma_kernel(const unsigned* a, const unsigned* b, float* c, Defect defect) {
  constexpr int pitch = Format::depth / Format::packed;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const unsigned a_fragment[4] = {a[group * pitch + t], a[(group + 8) * pitch + t], a[group * pitch + t + 4],
                                  a[(group + 8) * pitch + t + 4]};
  const unsigned b_fragment[2] = {b[group * pitch + t], b[group * pitch + t + 4]};
  float* const upper = c + group * 8 + 2 * t;
  float* const lower = upper + 64;
  float d[4] = {upper[0], upper[1], lower[0], lower[1]};
  if (defect == mma_by_half_a_warp && lane >= 16) return;
  Format::mma(d, a_fragment, b_fragment);
  upper[0] = d[0];
  upper[1] = d[1];
  lower[0] = d[2];
  lower[1] = d[3];
}

template <typename Format>
void mma_of(Defect defect) {
  constexpr int depth = Format::depth, packed = Format::packed, bits = 32 / packed;
  // Small integers, whose products and sums are exact in every order.
  const auto a_at = [](int row, int k) { return static_cast<float>((row * 5 + k * 3) % 17 - 8); };
  const auto b_at = [](int k, int column) { return static_cast<float>((k * 7 + column * 11) % 13 - 6); };
  Array<unsigned> a(16 * depth / packed, 0), b(8 * depth / packed, 0);
  Array<float> c(16 * 8);
  for (int k = 0; k < depth; ++k) {
    const int shift = k % packed * bits % 32;
    for (int row = 0; row < 16; ++row) a[(row * depth + k) / packed] |= Format::encode(a_at(row, k)) << shift;
    for (int column = 0; column < 8; ++column)
      b[(column * depth + k) / packed] |= Format::encode(b_at(k, column)) << shift;
  }
  for (int i = 0; i < 16 * 8; ++i) c[i] = static_cast<float>(i);
  launch(1, 32, 0, mma_kernel<Format>, a.data(), b.data(), c.data(), defect);
  for (int i = 0; i < 16 * 8; ++i) {
    float sum = static_cast<float>(i);
    for (int k = 0; k < depth; ++k) sum += a_at(i / 8, k) * b_at(k, i % 8);
    expect(c[i] == sum, "wrong result: mma");
  }
}

void tensor_cores(Defect defect) {
  mma_of<Tf32>(defect);
  mma_of<Bf16>(defect);
  mma_of<F16>(defect);
}

// --- launches that a device refuses ----------------------------------------------------------------------------------

__global__ void empty_kernel(int) {}
__global__ void large_kernel(int) {}

cudaError_t try_launch(void (*kernel)(int), dim3 grid, dim3 block, size_t dynamic_bytes) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  const cudaError_t result = cudaLaunchKernelEx(&config, kernel, 0);
  expect(cudaGetLastError() == result && cudaGetLastError() == cudaSuccess, "cudaGetLastError has another error");
  return result;
}

void launches(Defect) {
  const auto ask = [](int bytes) {
    const cudaError_t result = cudaFuncSetAttribute(large_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaGetLastError();
    return result;
  };
  expect(try_launch(empty_kernel, 1, 1024, 48 << 10) == cudaSuccess, "a launch with 48 KB was refused");
  expect(try_launch(empty_kernel, 1, 32, (48 << 10) + 1) == cudaErrorInvalidValue, "a launch with too much memory");
  expect(ask(100 << 10) == cudaSuccess, "100 KB were refused");
  expect(try_launch(large_kernel, 1, 32, 100 << 10) == cudaSuccess, "a launch with 100 KB was refused");
  expect(try_launch(large_kernel, 1, 32, (100 << 10) + 1) == cudaErrorInvalidValue,
         "a launch with more than asked for");
  expect(ask((227 << 10) + 1) == cudaErrorInvalidValue, "more than 227 KB were granted");
  expect(ask(227 << 10) == cudaSuccess && try_launch(large_kernel, 1, 32, 227 << 10) == cudaSuccess, "227 KB refused");
  expect(try_launch(empty_kernel, 1, 1025, 0) != cudaSuccess, "1025 threads");
  expect(try_launch(empty_kernel, 0, 32, 0) != cudaSuccess, "no block");
  expect(try_launch(empty_kernel, dim3(1, 65536), 32, 0) != cudaSuccess, "65536 blocks in y");
  expect(try_launch(empty_kernel, dim3(1, 1, 65536), 32, 0) != cudaSuccess, "65536 blocks in z");

  int device = -1, processors = 0, shared = 0;
  expect(cudaGetDevice(&device) == cudaSuccess && device == 0, "cudaGetDevice");
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  expect(processors == 132 && shared == 227 << 10, "cudaDeviceGetAttribute");

  Array<int> x(3, 1), y(3, 1);
  cudaMemsetAsync(x.data(), 0, 2 * sizeof(int), nullptr);
  cudaMemcpyAsync(y.data(), x.data(), 3 * sizeof(int), cudaMemcpyDeviceToDevice, nullptr);
  expect(finish() && y[0] == 0 && y[1] == 0 && y[2] == 1, "cudaMemsetAsync, cudaMemcpyAsync");
}

// --- running them ----------------------------------------------------------------------------------------------------

struct Test {
  const char* name;
  void (*run)(Defect);
  Defect first, last;  // the defects that it knows; none, none: no defect
};

const Test tests[] = {
    {"sums", sums, no_barrier_before, early_return},
    {"bytes", bytes, none, none},
    {"global memory", global_memory, global_write_behind, atomic_and_plain},
    {"misaligned atomic", global_memory, atomic_misaligned, atomic_misaligned},
    {"atomics", atomics, none, none},
    {"grids", grids, none, none},
    {"last block", last_block, no_fence_before_atomic, no_fence_behind_atomic},
    {"masks", masks, lanes_leave_before_shuffle, lane_never_arrives},
    {"shuffles", shuffles, none, none},
    {"ballots", ballots, none, none},
    {"sync warp", sync_warp, no_syncwarp, syncwarp_of_others},
    {"arithmetic", arithmetic, none, none},
    {"pipeline", pipeline, copy_without_wait, copy_from_shared},
    {"vectors", vectors, load_misaligned, load_behind_shared},
    {"tensor cores", tensor_cores, mma_by_half_a_warp, mma_by_half_a_warp},
    {"launches", launches, none, none},
};

#if !defined(__CUDACC__)

const char* const defect_names[] = {
#define DSC_NAME(name) #name,
    DSC_DEFECTS(DSC_NAME)
#undef DSC_NAME
};

constexpr int seeds = 20;

__global__ void shuffles_kernel(unsigned* out, int rounds) {
  unsigned value = threadIdx.x;
  for (int i = 0; i < rounds; ++i) value += __shfl_xor_sync(full, value, i % 32);
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void barriers_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
}

void measure() {
  const auto time = [](const char* what, const auto& run) {
    const uint64_t before = cuda_sim::switches();
    const auto start = std::chrono::steady_clock::now();
    run();
    const double ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
    const double count = static_cast<double>(cuda_sim::switches() - before);
    std::printf("%s: %.0f thousand switches, %.1f ns each\n", what, count / 1e3, ns / count);
  };
  Array<unsigned> out(20 * 512);
  time("shuffles", [&] { launch(20, 512, 0, shuffles_kernel, out.data(), 200); });
  time("barriers", [&] { launch(20, 512, 0, barriers_kernel, 200); });
}

#endif

void run_all() {
  for (const Test& test : tests) {
    if (!error.empty()) return;
    test.run(none);
    if (!error.empty()) error = std::string(test.name) + ": " + error;
  }
}

}  // namespace

#if defined(__CUDACC__)

int main() {
  run_all();
  std::printf("%s\n", error.empty() ? "every test passed" : error.c_str());
  return error.empty() ? 0 : 1;
}

#else

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  if (name == "--speed") return measure(), 0;
  if (name == "--list") {
    for (const char* const defect : defect_names)
      if (std::strcmp(defect, "none") != 0) std::printf("%s\n", defect);
    return 0;
  }
  for (int i = 1; i <= seeds && error.empty(); ++i) {
    seed(i);
    if (name.empty()) {
      run_all();
      shared_memory(none);
#if !defined(__SANITIZE_THREAD__)
      shared_memory_starts_as_nan(none);  // which reads what no thread has written
#endif
      continue;
    }
    for (const Test& test : tests)
      for (int defect = test.first; defect <= test.last; ++defect)
        if (defect != none && name == defect_names[defect]) test.run(static_cast<Defect>(defect));
  }
  std::printf("%s\n", error.empty() ? "every test passed" : error.c_str());
  return error.empty() ? 0 : 1;
}

#endif
