#include "attention.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd_portable.h"

#include "gemm.h"

#include "attention_impl.h"

const metis::AttentionIsa metis::kAttentionPortable = {
    AttentionOf<float, GemmFloat>::kKernels, AttentionOf<uint16_t, GemmFloat>::kKernels};
