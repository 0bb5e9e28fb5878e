// The kernels on packed codes for float32.
#include "packed_steps.h"

namespace dsc::cuda {

template class Packed<float>;

}  // namespace dsc::cuda
