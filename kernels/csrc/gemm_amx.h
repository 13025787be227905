// Tile products in AMX: c[32, 32] in four tiles of 16 x 16, float32 sums of bfloat16 products.
//
// With METIS_EMULATE_AMX the tile instructions are done in C, so that the indexing around them is tested on any processor.
#pragma once
#include <immintrin.h>

#include <cstring>

namespace {

#ifdef METIS_EMULATE_AMX
// What TILELOADD, TILESTORED, TILEZERO and TDPBF16PS do to full tiles of 16 rows of 64 bytes.
struct Tiles {
  struct Tile {
    alignas(64) char bytes[16][64];
  };
  static inline thread_local Tile tile[8];
  static inline thread_local bool configured = false;

  static void config(const void*) { configured = true; }
  static void release() { configured = false; }
  template <int T>
  static void zero() {
    std::memset(&tile[T], 0, sizeof(Tile));
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
    if (!configured) __builtin_trap();
    for (int i = 0; i < 16; ++i) std::memcpy(tile[T].bytes[i], (const char*)p + i * stride, 64);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy((char*)p + i * stride, tile[T].bytes[i], 64);
  }
  template <int C, int A, int B>
  static void dot() {
    const auto half = [](const Tile& t, int i, int j) {
      uint16_t x;
      std::memcpy(&x, t.bytes[i] + 2 * j, 2);
      const uint32_t bits = uint32_t(x) << 16;
      float y;
      std::memcpy(&y, &bits, 4);
      return y;
    };
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float sum;
        std::memcpy(&sum, tile[C].bytes[i] + 4 * j, 4);
        for (int k = 0; k < 16; ++k)
          for (int odd = 0; odd < 2; ++odd) sum += half(tile[A], i, 2 * k + odd) * half(tile[B], k, 2 * j + odd);
        std::memcpy(tile[C].bytes[i] + 4 * j, &sum, 4);
      }
  }
};
#else
struct Tiles {
  static void config(const void* p) { _tile_loadconfig(p); }
  static void release() { _tile_release(); }
  // the intrinsics are macros that want a literal tile number
#define METIS_TILE_CASES(CASE) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
  template <int T>
  static void zero() {
#define METIS_ZERO(N) \
  if constexpr (T == N) _tile_zero(N);
    METIS_TILE_CASES(METIS_ZERO)
#undef METIS_ZERO
  }
  template <int T>
  static void load(const void* p, int64_t stride) {
#define METIS_LOAD(N) \
  if constexpr (T == N) _tile_loadd(N, p, stride);
    METIS_TILE_CASES(METIS_LOAD)
#undef METIS_LOAD
  }
  template <int T>
  static void store(void* p, int64_t stride) {
#define METIS_STORE(N) \
  if constexpr (T == N) _tile_stored(N, p, stride);
    METIS_TILE_CASES(METIS_STORE)
#undef METIS_STORE
  }
#undef METIS_TILE_CASES
  template <int C, int A, int B>
  static void dot() {
    static_assert((C == 0 && A == 4 && B == 6) || (C == 1 && A == 4 && B == 7) || (C == 2 && A == 5 && B == 6) ||
                  (C == 3 && A == 5 && B == 7));
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
  }
};
#endif

struct GemmAmx {
  using Op = uint16_t;
  static constexpr int kRows = 32, kPanel = 32, kDepth = 32, kBlock = 1024;

  static Simd::Vec pair(const uint16_t* low, const uint16_t* high) { return Simd::pair(low, high); }

  static void begin() {
    // palette 1; all eight tiles have 16 rows of 64 bytes
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    Tiles::config(&config);
  }
  static void end() { Tiles::release(); }

  // 32 rows, depth a multiple of 32
  static void whole(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc) {
    const int64_t c_stride = ldc * 4, a_stride = lda * 2;
    Tiles::zero<0>();
    Tiles::zero<1>();
    Tiles::zero<2>();
    Tiles::zero<3>();
    for (int64_t k = 0; k < depth; k += 32) {
      const uint16_t* const b = panel + k * kPanel;  // 16 rows of 32 pairs
      Tiles::load<4>(a + k, a_stride);
      Tiles::load<6>(b, kPanel * 4);
      Tiles::dot<0, 4, 6>();
      Tiles::load<7>(b + 32, kPanel * 4);
      Tiles::dot<1, 4, 7>();
      Tiles::load<5>(a + 16 * lda + k, a_stride);
      Tiles::dot<2, 5, 6>();
      Tiles::dot<3, 5, 7>();
    }
    Tiles::store<0>(c, c_stride);
    Tiles::store<1>(c + 16, c_stride);
    Tiles::store<2>(c + 16 * ldc, c_stride);
    Tiles::store<3>(c + 16 * ldc + 16, c_stride);
  }

  // Tiles read whole: fewer rows, or a depth that is no multiple of 32, go through a padded copy. The panel is padded with
  // zeros already. spare: [32, depth rounded up].
  static void run(int rows, const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, uint16_t* spare) {
    const int64_t padded = (depth + 31) / 32 * 32;
    if (rows < kRows || padded != depth) {
      for (int i = 0; i < kRows; ++i) {
        if (i < rows) std::memcpy(spare + i * padded, a + i * lda, depth * 2);
        const int64_t from = i < rows ? depth : 0;
        std::memset(spare + i * padded + from, 0, (padded - from) * 2);
      }
      a = spare;
      lda = padded;
    }
    if (rows == kRows && !accumulate) return whole(a, lda, panel, padded, c, ldc);
    alignas(64) float part[kRows * kPanel];
    whole(a, lda, panel, padded, part, kPanel);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < kPanel; j += 16) {
        const Simd::Vec sum = Simd::load(part + i * kPanel + j);
        Simd::store(c + i * ldc + j, accumulate ? Simd::add(sum, Simd::load(c + i * ldc + j)) : sum);
      }
  }
  // the whole panel: there is room for all of its columns, and half of the tiles would wait for the other half
  static void run_half(int rows, const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth, float* c, int64_t ldc,
                       bool accumulate, uint16_t* spare) {
    run(rows, a, lda, panel, depth, c, ldc, accumulate, spare);
  }
};

}  // namespace
