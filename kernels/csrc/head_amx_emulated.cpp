#define METIS_EMULATE_AMX
#include "attention.h"
#include "head.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "simd_avx512.h"

#include "gemm.h"

#include "gemm_amx.h"

#include "head_impl.h"

const metis::Isa metis::kAmxEmulated = {
    "amx_emulated", &kAttentionAmxEmulated, HeadOf<float, GemmFloat>::kKernels, HeadOf<uint16_t, GemmAmx>::kKernels};
