#include "attention.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_avx512.h"

#include "gemm.h"

#include "gemm_amx.h"

#include "attention_impl.h"

const metis::AttentionIsa metis::kAttentionAmx = {
    AttentionOf<float, GemmFloat>::kKernels, AttentionOf<uint16_t, GemmAmx>::kKernels};
