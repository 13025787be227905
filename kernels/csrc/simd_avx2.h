// 8 floats: the vector operations that head_impl.h is written in, AVX2 and FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;  // 6 rows x 2 vectors of accumulators, 2 of the panel, 1 broadcast: 15 of 16 registers

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  // of a NaN and a number the NaN comes out where it is the second argument
  static Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

  // exp to about 1 ulp for -87 <= x <= 88 (see simd_avx512.h); flushed to 0 below, NaN kept
  static Vec exp(Vec x) {
    const Vec flushed = _mm256_cmp_ps(x, set(-87.0f), _CMP_LT_OQ);
    const Vec y = max(set(-87.0f), x);
    const Vec n = _mm256_round_ps(mul(y, set(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec f = _mm256_fnmadd_ps(n, set(0.693359375f), y);
    f = _mm256_fnmadd_ps(n, set(-2.12194440e-4f), f);
    Vec p = set(1.9875691500e-4f);
    p = fma(p, f, set(1.3981999507e-3f));
    p = fma(p, f, set(8.3334519073e-3f));
    p = fma(p, f, set(4.1665795894e-2f));
    p = fma(p, f, set(1.6666665459e-1f));
    p = fma(p, f, set(5.0000001201e-1f));
    p = fma(p, mul(f, f), add(f, set(1.0f)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(flushed, mul(p, _mm256_castsi256_ps(power)));
  }

  static Vec load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }

  static void store_bf16(uint16_t* p, Vec x) {
    // round to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }

  // 8 x 8 numbers of 32 bits, in place
  static void transpose(Vec (&r)[8]) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) t[i] = r[i];
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(t[i], r[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(t[i], r[i + 4], 0x31);
    }
  }
};

}  // namespace
