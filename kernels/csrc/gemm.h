// Tile products: c[rows, kPanel] (+)= a[rows, depth] * panel[depth, kPanel], float32 sums.
//
// A product is summed from 0 and then added to c, so that sums over many blocks lose what sqrt(blocks) roundings lose, and
// not what each single product does. For the same reason long products are cut into kBlock of depth by the caller.
//
// a is read in place, row by row. The panel is packed: [depth][kPanel] for float32, [depth / 2][kPanel][2] for bfloat16,
// the layout that both VDPBF16PS and TDPBF16PS want.
#pragma once
#include <cstring>

namespace {

// rows is a compile-time number in the inner loops, so that the accumulators stay in registers; a table picks the loop.
template <class Kernel, int... R>
void run_rows(int rows, const typename Kernel::Op* a, int64_t lda, const typename Kernel::Op* panel, int64_t depth, float* c,
              int64_t ldc, bool accumulate, std::integer_sequence<int, R...>) {
  using Run = void (*)(const typename Kernel::Op*, int64_t, const typename Kernel::Op*, int64_t, float*, int64_t, bool);
  static constexpr Run kRuns[] = {&Kernel::template tile<R + 1>...};
  kRuns[rows - 1](a, lda, panel, depth, c, ldc, accumulate);
}

struct GemmFloat {
  using Op = float;
  static constexpr int kRows = Simd::kRows, kPanel = 2 * Simd::kWidth, kDepth = 1, kBlock = 64;

  template <int R>
  static void tile(const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    constexpr int W = Simd::kWidth;
    Simd::Vec acc[R][2];
    for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = Simd::zero();
    for (int64_t k = 0; k < depth; ++k) {
      const Simd::Vec b0 = Simd::load(panel + k * kPanel), b1 = Simd::load(panel + k * kPanel + W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Simd::Vec x = Simd::set(a[i * lda + k]);
        acc[i][0] = Simd::fma(x, b0, acc[i][0]);
        acc[i][1] = Simd::fma(x, b1, acc[i][1]);
      }
    }
    for (int i = 0; i < R; ++i) {
      Simd::store(c + i * ldc, accumulate ? Simd::add(acc[i][0], Simd::load(c + i * ldc)) : acc[i][0]);
      Simd::store(c + i * ldc + W, accumulate ? Simd::add(acc[i][1], Simd::load(c + i * ldc + W)) : acc[i][1]);
    }
  }

  static void begin() {}
  static void end() {}
  static void run(int rows, const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc, bool accumulate,
                  float*) {
    run_rows<GemmFloat>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
};

#ifdef __AVX512BF16__
struct GemmBf16 {
  using Op = uint16_t;
  static constexpr int kRows = Simd::kRows, kPanel = 2 * Simd::kWidth, kDepth = 2, kBlock = 256;

  template <int R>
  static void tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    __m512 acc[R][2];
    for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * kPanel);
      const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * kPanel + kPanel);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        int pair;
        std::memcpy(&pair, a + i * lda + k, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
      }
    }
    for (int i = 0; i < R; ++i) {
      Simd::store(c + i * ldc, accumulate ? Simd::add(acc[i][0], Simd::load(c + i * ldc)) : acc[i][0]);
      Simd::store(c + i * ldc + 16, accumulate ? Simd::add(acc[i][1], Simd::load(c + i * ldc + 16)) : acc[i][1]);
    }
  }

  static Simd::Vec pair(const uint16_t* low, const uint16_t* high) { return Simd::pair(low, high); }
  static void begin() {}
  static void end() {}
  static void run(int rows, const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, uint16_t*) {
    run_rows<GemmBf16>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
};
#endif

}  // namespace
