#include "attention.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_avx2.h"

#include "gemm.h"

#include "attention_impl.h"

const metis::AttentionIsa metis::kAttentionAvx2 = {
    AttentionOf<float, GemmFloat>::kKernels, AttentionOf<uint16_t, GemmFloat>::kKernels};
