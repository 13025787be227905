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
// V: of the panel's two vectors those that are computed, the first or both.
template <class Kernel, int V, int... R>
void run_rows(int rows, const typename Kernel::Op* a, int64_t lda, const typename Kernel::Op* panel, int64_t depth, float* c,
              int64_t ldc, bool accumulate, std::integer_sequence<int, R...>) {
  using Run = void (*)(const typename Kernel::Op*, int64_t, const typename Kernel::Op*, int64_t, float*, int64_t, bool);
  static constexpr Run kRuns[] = {&Kernel::template tile<R + 1, V>...};
  kRuns[rows - 1](a, lda, panel, depth, c, ldc, accumulate);
}

struct GemmFloat {
  using Op = float;
  static constexpr int kRows = Simd::kRows, kPanel = 2 * Simd::kWidth, kDepth = 1, kBlock = 64;

  template <int R, int V>
  static void tile(const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    constexpr int W = Simd::kWidth;
    Simd::Vec acc[R][V];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = Simd::zero();
    for (int64_t k = 0; k < depth; ++k) {
      Simd::Vec b[V];
      for (int v = 0; v < V; ++v) b[v] = Simd::load(panel + k * kPanel + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Simd::Vec x = Simd::set(a[i * lda + k]);
        for (int v = 0; v < V; ++v) acc[i][v] = Simd::fma(x, b[v], acc[i][v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) {
        float* const to = c + i * ldc + v * W;
        Simd::store(to, accumulate ? Simd::add(acc[i][v], Simd::load(to)) : acc[i][v]);
      }
  }

  static void begin() {}
  static void end() {}
  static void run(int rows, const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc, bool accumulate,
                  float*) {
    run_rows<GemmFloat, 2>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
  // the first half of the panel's columns alone
  static void run_half(int rows, const float* a, int64_t lda, const float* panel, int64_t depth, float* c, int64_t ldc,
                       bool accumulate, float*) {
    run_rows<GemmFloat, 1>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
};

#ifdef __AVX512BF16__
struct GemmBf16 {
  using Op = uint16_t;
  static constexpr int kRows = Simd::kRows, kPanel = 2 * Simd::kWidth, kDepth = 2, kBlock = 256;

  template <int R, int V>
  static void tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc, bool accumulate) {
    __m512 acc[R][V];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh b[V];
      for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(panel + (k + v) * kPanel);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        int pair;
        std::memcpy(&pair, a + i * lda + k, sizeof pair);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < V; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], x, b[v]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) {
        float* const to = c + i * ldc + v * 16;
        Simd::store(to, accumulate ? Simd::add(acc[i][v], Simd::load(to)) : acc[i][v]);
      }
  }

  static Simd::Vec pair(const uint16_t* low, const uint16_t* high) { return Simd::pair(low, high); }
  static void begin() {}
  static void end() {}
  static void run(int rows, const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, uint16_t*) {
    run_rows<GemmBf16, 2>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
  static void run_half(int rows, const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc,
                       bool accumulate, uint16_t*) {
    run_rows<GemmBf16, 1>(rows, a, lda, panel, depth, c, ldc, accumulate, std::make_integer_sequence<int, kRows>());
  }
};
#endif

}  // namespace
