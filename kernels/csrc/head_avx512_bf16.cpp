#include "attention.h"
#include "head.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd_avx512.h"

#include "gemm.h"

#include "head_impl.h"

const metis::Isa metis::kAvx512Bf16 = {
    "avx512_bf16", &kAttentionAvx512Bf16, HeadOf<float, GemmFloat>::kKernels, HeadOf<uint16_t, GemmBf16>::kKernels};
