// csrc/core/scalar.h over arrays: the conversions between bits of a half precision type and float.
#include "core/scalar.h"

#define DSC_EXPORT __attribute__((visibility("default")))

extern "C" {

DSC_EXPORT void load_bfloat16(const uint16_t* bits, float* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = dsc::load(dsc::bfloat16{bits[i]});
}

DSC_EXPORT void load_float16(const uint16_t* bits, float* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = dsc::load(dsc::float16{bits[i]});
}

DSC_EXPORT void store_bfloat16(const float* x, uint16_t* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = dsc::store<dsc::bfloat16>(x[i]).bits;
}

DSC_EXPORT void store_float16(const float* x, uint16_t* out, int64_t size) {
  for (int64_t i = 0; i < size; ++i) out[i] = dsc::store<dsc::float16>(x[i]).bits;
}
}
