#include "attention.h"
#include "head.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd_avx512.h"

#include "gemm.h"

#include "head_impl.h"

const metis::Isa metis::kAvx512 = {
    "avx512", &kAttentionAvx512, HeadOf<float, GemmFloat>::kKernels, HeadOf<uint16_t, GemmFloat>::kKernels};
