// The kernels on packed codes for float64, bfloat16 and float16.
#include "packed_steps.h"

namespace dsc::cuda {

template class Packed<double>;
template class Packed<bfloat16>;
template class Packed<float16>;

}  // namespace dsc::cuda
