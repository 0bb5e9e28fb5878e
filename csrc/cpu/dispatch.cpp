#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace dsc::cpu {
namespace {

struct Level {
  const char* name;
  const KernelSet* kernels;
  bool available;
};

// Slowest first. DSC_CPU_LEVELS, those of setup.py, are 3 where simd_kernels.cpp was compiled for AVX2 and AVX-512 too
// (x86-64), else 1.
const std::vector<Level>& levels() {
#if DSC_CPU_LEVELS == 3
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
#endif
  static const std::vector<Level> all = {
      {"default", &kernels_baseline, true},
#if DSC_CPU_LEVELS == 3
      {"avx2", &kernels_avx2,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
      {"avx512", &kernels_avx512, avx512},
      {"avx512_bf16", &kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16")},
#endif
  };
  return all;
}

const Level* best() {
  const Level* found = nullptr;
  for (const Level& level : levels())
    if (level.available) found = &level;
  return found;
}

std::atomic<const Level*>& current() {
  static std::atomic<const Level*> level{best()};
  return level;
}

}  // namespace

std::vector<std::string> available_capabilities() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.available) names.push_back(level.name);
  return names;
}

std::string capability() { return current().load()->name; }

void set_capability(const std::string& name) {
  for (const Level& level : levels())
    if (level.available && name == level.name) {
      current() = &level;
      return;
    }
  std::string message = "the CPU capability '" + name + "' is not available here; this machine has";
  for (const std::string& available : available_capabilities()) message += " " + available;
  throw std::invalid_argument(message);
}

template <>
const Kernels<float>& kernels() {
  return current().load(std::memory_order_relaxed)->kernels->float32;
}
template <>
const Kernels<double>& kernels() {
  return current().load(std::memory_order_relaxed)->kernels->float64;
}
template <>
const Kernels<bfloat16>& kernels() {
  return current().load(std::memory_order_relaxed)->kernels->bf16;
}
template <>
const Kernels<float16>& kernels() {
  return current().load(std::memory_order_relaxed)->kernels->fp16;
}

}  // namespace dsc::cpu
