// 4 floats: the vector operations that head_impl.h is written in, by the vector types of GCC and Clang, for any processor: SSE2
// on x86-64, NEON on aarch64, scalar code where there is nothing. Products and sums are fused where the processor can do that
// (-ffp-contract=fast).
#pragma once
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  using Vec [[gnu::vector_size(16)]] = float;
  using Bits [[gnu::vector_size(16)]] = uint32_t;
  using Half [[gnu::vector_size(8)]] = uint16_t;
  static constexpr int kWidth = 4;
#ifdef __aarch64__
  static constexpr int kRows = 12;  // 12 rows x 2 vectors of accumulators, 2 of the panel, 1 broadcast: 27 of 32 registers
#else
  static constexpr int kRows = 6;  // 15 of 16
#endif

  static Vec zero() { return Vec{}; }
  static Vec set(float x) { return Vec{x, x, x, x}; }
  static Vec load(const float* p) { return read<Vec>(p); }
  static void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec sub(Vec a, Vec b) { return a - b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
  // of a NaN and a number the NaN comes out where it is the second argument
  static Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }

  // exp to about 1 ulp for -87 <= x <= 88 (see simd_avx512.h); flushed to 0 below, NaN kept
  static Vec exp(Vec x) {
    const Vec y = max(set(-87.0f), x);
    const Vec shift = set(12582912.0f);  // 1.5 * 2^23: a sum with it has no fraction, and the integer in its low bits
    const Vec shifted = fma(y, set(1.44269504088896341f), shift);
    const Vec n = shifted - shift;
    Vec f = y - n * set(0.693359375f);
    f = f - n * set(-2.12194440e-4f);
    Vec p = set(1.9875691500e-4f);
    p = fma(p, f, set(1.3981999507e-3f));
    p = fma(p, f, set(8.3334519073e-3f));
    p = fma(p, f, set(4.1665795894e-2f));
    p = fma(p, f, set(1.6666665459e-1f));
    p = fma(p, f, set(5.0000001201e-1f));
    p = fma(p, mul(f, f), add(f, set(1.0f)));
    const Vec power = (Vec)(((Bits)shifted + 127) << 23);
    return x < set(-87.0f) ? zero() : p * power;
  }

  static Vec load_bf16(const uint16_t* p) { return (Vec)(__builtin_convertvector(read<Half>(p), Bits) << 16); }

  static void store_bf16(uint16_t* p, Vec x) {
    // round to nearest even; a NaN stays one
    const Bits bits = (Bits)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Bits nan = Bits{} + 0x7fc0;
    const Half packed = __builtin_convertvector(x == x ? rounded : nan, Half);
    std::memcpy(p, &packed, sizeof packed);
  }

  // 4 x 4 numbers of 32 bits, in place
  static void transpose(Vec (&r)[4]) {
    const Vec a = {r[0][0], r[1][0], r[2][0], r[3][0]}, b = {r[0][1], r[1][1], r[2][1], r[3][1]};
    const Vec c = {r[0][2], r[1][2], r[2][2], r[3][2]}, d = {r[0][3], r[1][3], r[2][3], r[3][3]};
    r[0] = a, r[1] = b, r[2] = c, r[3] = d;
  }

 private:
  template <class T>
  static T read(const void* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
};

}  // namespace
