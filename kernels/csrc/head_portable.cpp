#include "attention.h"
#include "head.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd_portable.h"

#include "gemm.h"

#include "head_impl.h"

const metis::Isa metis::kPortable = {
    "portable", &kAttentionPortable, HeadOf<float, GemmFloat>::kKernels, HeadOf<uint16_t, GemmFloat>::kKernels};
