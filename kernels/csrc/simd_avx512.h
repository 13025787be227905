// 16 floats: the vector operations that head_impl.h is written in, AVX-512 (F, BW, VL, DQ).
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 14;  // 14 rows x 2 vectors of accumulators, 2 of the panel, 1 broadcast: 31 of 32 registers

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  // of a NaN and a number the NaN comes out where it is the second argument
  static Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

  // exp to about 1 ulp for x <= 88: 2^n * polynomial on [-ln2/2, ln2/2] (Cephes expf coefficients); 0 below -104, NaN kept
  static Vec exp(Vec x) {
    x = max(set(-110.0f), x);
    const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    Vec f = _mm512_fnmadd_ps(n, set(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), f);
    Vec p = set(1.9875691500e-4f);
    p = fma(p, f, set(1.3981999507e-3f));
    p = fma(p, f, set(8.3334519073e-3f));
    p = fma(p, f, set(4.1665795894e-2f));
    p = fma(p, f, set(1.6666665459e-1f));
    p = fma(p, f, set(5.0000001201e-1f));
    p = fma(p, mul(f, f), add(f, set(1.0f)));
    return _mm512_scalef_ps(p, n);
  }

  static Vec load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }

  static void store_bf16(uint16_t* p, Vec x) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
    // round to nearest even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
#endif
  }

  // 16 pairs (low[i], high[i]) of 16-bit numbers
  static Vec pair(const uint16_t* low, const uint16_t* high) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
    return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }

  // 16 x 16 numbers of 32 bits, in place
  static void transpose(Vec (&r)[16]) {
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      const auto d = [](Vec x) { return _mm512_castps_pd(x); };
      r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(t[i]), d(t[i + 2])));
      r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(t[i]), d(t[i + 2])));
      r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(t[i + 1]), d(t[i + 3])));
      r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(t[i + 1]), d(t[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

}  // namespace
