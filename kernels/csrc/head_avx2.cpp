#include "attention.h"
#include "head.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd_avx2.h"

#include "gemm.h"

#include "head_impl.h"

const metis::Isa metis::kAvx2 = {
    "avx2", &kAttentionAvx2, HeadOf<float, GemmFloat>::kKernels, HeadOf<uint16_t, GemmFloat>::kKernels};
