#include "attention.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_avx512.h"

#include "gemm.h"

#include "attention_impl.h"

const metis::AttentionIsa metis::kAttentionAvx512Bf16 = {
    AttentionOf<float, GemmFloat>::kKernels, AttentionOf<uint16_t, GemmBf16>::kKernels};
