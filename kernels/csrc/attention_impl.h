// Attention on one instruction set: included by attention_<isa>.cpp after the Simd and Gemm types that it is written in.
//
// S: dtype of the tensors (float, or uint16_t: bfloat16). Gemm::Op: what the tile product reads. Two packings of n rows of Dp
// numbers: "columns" (rows become the columns of panels, depth is Dp) and "depth" (rows are the depth of a block's product, in panels of P
// of the Dp columns).
#pragma once

namespace {

using metis::Attention;
using metis::kAttentionBlock;
using metis::kSegmentPad;
using Vec = Simd::Vec;
constexpr int W = Simd::kWidth;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
// to bfloat16, to nearest even; a NaN stays one
inline void narrow(float x, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *out = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, float* out) { *out = x; }
inline void store(float* p, Vec x) { Simd::store(p, x); }
inline void store(uint16_t* p, Vec x) { Simd::store_bf16(p, x); }
// by halves, which are vectors again
inline float sum_of(Vec x) {
  float wide[W];
  Simd::store(wide, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) wide[i] += wide[i + half];
  return wide[0];
}
inline float max_of(Vec x) {
  float wide[W];
  Simd::store(wide, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) {
      const float other = wide[i + half];
      wide[i] = other > wide[i] || other != other ? other : wide[i];
    }
  return wide[0];
}

template <class S, class Gemm>
struct AttentionOf {
  using Op = typename Gemm::Op;
  static constexpr int P = Gemm::kPanel;
  static constexpr int64_t B = kAttentionBlock;

  struct Segment {
    int64_t start, length, local;  // first token, tokens, first padded row
  };

  // The family's segments, one after another in padded rows.
  struct Family {
    const Attention& a;
    int64_t first, count;
    Segment segment(int64_t i) const {
      int64_t local = 0;
      for (int64_t k = 0; k < i; ++k) local += round_up(a.stop[first + k] - a.start[first + k], kSegmentPad);
      return {a.start[first + i], a.stop[first + i] - a.start[first + i], local};
    }
    int64_t rows() const {
      const Segment last = segment(count - 1);
      return last.local + round_up(last.length, kSegmentPad);
    }
  };

  struct Arena {
    char* at;
    template <class T>
    T* take(int64_t count) {
      T* const here = (T*)at;
      at += round_up(count * int64_t(sizeof(T)), 64);
      return here;
    }
  };

  static Op to_op(S x) {
    if constexpr (std::is_same_v<S, Op>)
      return x;
    else
      return widen(x);
  }

  // element (k, j) of a packed panel
  static Op* at(Op* panel, int64_t k, int64_t j) {
    return sizeof(Op) == 2 ? panel + (k / 2) * 2 * P + 2 * j + k % 2 : panel + k * P + j;
  }

  // rows of one head, padded with zeros: [n, Dp]
  static void copy_rows(const Family& family, metis::Rows<const void> from, int64_t head, int64_t size, Op* to) {
    const int64_t wide = round_up(size, kSegmentPad);
    std::memset((void*)to, 0, family.rows() * wide * sizeof(Op));
    for (int64_t i = 0; i < family.count; ++i) {
      const Segment s = family.segment(i);
      for (int64_t t = 0; t < s.length; ++t) {
        const S* const row = (const S*)from.data + (s.start + t) * from.token_stride + head * from.head_stride;
        for (int64_t d = 0; d < size; ++d) to[(s.local + t) * wide + d] = to_op(row[d]);
      }
    }
  }

  // W rows as 32-bit numbers (for bfloat16 pairs of neighbours), transposed: kept in registers, W x W at a time
  static void pack_columns(const Op* from, int64_t n, int64_t wide, Op* to) {
    constexpr int64_t kPair = 4 / int64_t(sizeof(Op));
    for (int64_t t = 0; t < n; t += W)
      for (int64_t d = 0; d < wide; d += W * kPair) {
        Vec r[W];
        for (int i = 0; i < W; ++i) r[i] = Simd::load((const float*)(from + (t + i) * wide + d));
        Simd::transpose(r);
        Op* const panel = to + t / P * P * wide;
        for (int i = 0; i < W; ++i) Simd::store((float*)at(panel, d + i * kPair, t % P), r[i]);
      }
  }

  // a block starts at to + row * Dp; its depth is its rows rounded up to kSegmentPad
  static void pack_depth(const Family& family, const Op* from, int64_t wide, Op* to) {
    for (int64_t i = 0; i < family.count; ++i) {
      const Segment s = family.segment(i);
      for (int64_t t0 = 0; t0 < s.length; t0 += B) {
        const int64_t depth = round_up(s.length - t0 < B ? s.length - t0 : B, kSegmentPad);
        const Op* const block = from + (s.local + t0) * wide;
        for (int64_t d = 0; d < wide; d += W) {
          Op* const panel = to + (s.local + t0) * wide + d / P * P * depth;
          if constexpr (sizeof(Op) == 4)
            for (int64_t t = 0; t < depth; ++t) Simd::store(at(panel, t, d % P), Simd::load(block + t * wide + d));
          else
            for (int64_t t = 0; t < depth; t += 2)
              Simd::store((float*)at(panel, t, d % P), Gemm::pair(block + t * wide + d, block + (t + 1) * wide + d));
        }
      }
    }
  }

  // ds [keys, queries] to [queries, keys]; both padded, rows of B
  static void turn(const Op* from, int64_t keys, int64_t queries, Op* to) {
    constexpr int64_t kPair = 4 / int64_t(sizeof(Op));
    for (int64_t k = 0; k < keys; k += W * kPair)
      for (int64_t q = 0; q < queries; q += W) {
        Vec r[W];
        for (int64_t i = 0; i < W; ++i) {
          if constexpr (sizeof(Op) == 4)
            r[i] = Simd::load(from + (k + i) * B + q);
          else
            r[i] = Gemm::pair(from + (k + 2 * i) * B + q, from + (k + 2 * i + 1) * B + q);
        }
        Simd::transpose(r);
        for (int64_t i = 0; i < W; ++i) Simd::store((float*)(to + (q + i) * B + k), r[i]);
      }
  }

  // c[rows, columns] (+)= a[rows, depth] * panels, `panel_stride` apart; there is room for the columns of whole panels in c
  static void product(int64_t rows, const Op* a, int64_t lda, const Op* panels, int64_t panel_stride, int64_t columns, int64_t depth,
                      float* c, int64_t ldc, bool accumulate, Op* spare) {
    for (int64_t j = 0; j < columns; j += P)
      for (int64_t i = 0; i < rows; i += Gemm::kRows) {
        const int count = int(rows - i < Gemm::kRows ? rows - i : Gemm::kRows);
        const auto run = columns - j > W ? &Gemm::run : &Gemm::run_half;
        run(count, a + i * lda, lda, panels + j / P * panel_stride, depth, c + i * ldc + j, ldc, accumulate, spare);
      }
  }

  static int64_t spare_size(int64_t wide) { return Gemm::kDepth < 32 ? 0 : Gemm::kRows * (wide > B ? wide : B); }

  static int64_t scratch_bytes(int64_t n, int64_t head_size, bool backward) {
    const int64_t wide = round_up(head_size, kSegmentPad), rows = n * wide;
    const int64_t ops = (backward ? 8 * rows + 3 * B * B : 5 * rows + B * B) + spare_size(wide);
    const int64_t floats = backward ? 3 * rows + 2 * n + 2 * B * B : B * B + B * wide + 3 * B;
    return (ops * int64_t(sizeof(Op)) + floats * 4) + 64 * 32;
  }

  static void forward(const Attention& a, int64_t which, int64_t kv_head, char* scratch) {
    const Family family{a, a.family[which], a.family[which + 1] - a.family[which]};
    const int64_t size = a.head_size, wide = round_up(size, kSegmentPad), n = family.rows();
    const int64_t deep_size = round_up(size, Gemm::kDepth);  // of a row's product: its zeros beyond add nothing
    Arena arena{(char*)round_up(int64_t(scratch), 64)};
    Op *const rows = arena.template take<Op>(n * wide), *const keys = arena.template take<Op>(n * wide);
    Op *const values = arena.template take<Op>(n * wide), *const queries = arena.template take<Op>(n * wide);
    Op *const p = arena.template take<Op>(B * B), *const spare = arena.template take<Op>(spare_size(wide));
    float *const scores = arena.template take<float>(B * B), *const out = arena.template take<float>(B * wide);
    float *const peak = arena.template take<float>(B), *const sum = arena.template take<float>(B);

    Gemm::begin();
    copy_rows(family, a.key, kv_head, size, rows);
    pack_columns(rows, n, wide, keys);
    copy_rows(family, a.value, kv_head, size, rows);
    pack_depth(family, rows, wide, values);
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      copy_rows(family, a.query, head, size, queries);
      for (int64_t i = 0; i < family.count; ++i) {
        const Segment own = family.segment(i), prompt = family.segment(0);
        for (int64_t q0 = 0; q0 < own.length; q0 += B) {
          const int64_t num = own.length - q0 < B ? own.length - q0 : B;
          for (int64_t q = 0; q < num; ++q) peak[q] = -INFINITY, sum[q] = 0;
          std::memset(out, 0, num * wide * sizeof(float));
          // keys of `segment` up to `visible`, and of those the query q sees up to `visible + q` of a diagonal block
          const auto over = [&](const Segment& segment, int64_t visible, bool causal) {
            for (int64_t k0 = 0; k0 < visible; k0 += B) {
              const int64_t count = visible - k0 < B ? visible - k0 : B, depth = round_up(count, kSegmentPad);
              const int64_t stored = round_up(segment.length - k0 < B ? segment.length - k0 : B, kSegmentPad);
              const Op* const key_panels = keys + (segment.local + k0) * wide;
              product(num, queries + (own.local + q0) * wide, wide, key_panels, P * wide, depth, deep_size, scores, B, false, spare);
              for (int64_t q = 0; q < num; ++q) {
                const int64_t seen = causal && k0 + count > q0 + q + 1 ? q0 + q + 1 - k0 : count;
                softmax_row(scores + q * B, seen, depth, a.scale, peak + q, sum + q, out + q * wide, wide, p + q * B);
              }
              product(num, p, B, values + (segment.local + k0) * wide, P * stored, size, depth, out, wide, true, spare);
            }
          };
          if (i > 0) over(prompt, prompt.length, false);
          over(own, a.causal ? q0 + num : own.length, a.causal);
          for (int64_t q = 0; q < num; ++q) {
            const int64_t token = own.start + q0 + q;
            S* const to = (S*)a.out.data + token * a.out.token_stride + head * a.out.head_stride;
            for (int64_t d = 0; d < size; ++d) narrow(out[q * wide + d] / sum[q], to + d);
            a.lse[token * a.heads + head] = peak[q] + std::log(sum[q]);
          }
        }
      }
    }
    Gemm::end();
  }

  // One row of a block: new maximum, exponentials (0 beyond `seen`), old sums rescaled.
  static void softmax_row(float* scores, int64_t seen, int64_t depth, float scale, float* peak, float* sum, float* out, int64_t wide,
                          Op* p) {
    for (int64_t k = seen < 0 ? 0 : seen; k < depth; ++k) scores[k] = -INFINITY;
    Vec top = Simd::set(-INFINITY);
    for (int64_t k = 0; k < depth; k += W) top = Simd::max(Simd::load(scores + k), top);
    const float block_top = max_of(top) * scale;
    const float new_peak = block_top > *peak || block_top != block_top ? block_top : *peak;
    if (new_peak == -INFINITY) {  // this query sees no key of this block, nor of one before
      std::memset((void*)p, 0, depth * sizeof(Op));
      return;
    }
    const float share = *peak == -INFINITY ? 0.0f : *peak == new_peak ? 1.0f : std::exp(*peak - new_peak);
    const Vec base = Simd::set(new_peak), factor = Simd::set(scale);
    Vec total = Simd::zero();
    for (int64_t k = 0; k < depth; k += W) {
      const Vec e = Simd::exp(Simd::fms(Simd::load(scores + k), factor, base));
      total = Simd::add(total, e);
      store(p + k, e);
    }
    if (seen < depth)  // exp of minus infinity is not quite 0 everywhere
      for (int64_t k = seen < 0 ? 0 : seen; k < depth; ++k) p[k] = Op(0);
    *sum = *sum * share + sum_of(total);
    *peak = new_peak;
    if (share != 1.0f)
      for (int64_t d = 0; d < wide; d += W) Simd::store(out + d, Simd::mul(Simd::load(out + d), Simd::set(share)));
  }

  static void backward(const Attention& a, int64_t which, int64_t kv_head, char* scratch) {
    const Family family{a, a.family[which], a.family[which + 1] - a.family[which]};
    const int64_t size = a.head_size, wide = round_up(size, kSegmentPad), n = family.rows();
    const int64_t deep_size = round_up(size, Gemm::kDepth);  // of a row's product: its zeros beyond add nothing
    Arena arena{(char*)round_up(int64_t(scratch), 64)};
    Op *const keys = arena.template take<Op>(n * wide), *const values = arena.template take<Op>(n * wide);
    Op *const keys_deep = arena.template take<Op>(n * wide), *const rows = arena.template take<Op>(n * wide);
    Op *const queries = arena.template take<Op>(n * wide), *const queries_deep = arena.template take<Op>(n * wide);
    Op *const d_outs = arena.template take<Op>(n * wide), *const d_outs_deep = arena.template take<Op>(n * wide);
    Op *const p = arena.template take<Op>(B * B), *const ds = arena.template take<Op>(B * B), *const turned = arena.template take<Op>(B * B);
    Op* const spare = arena.template take<Op>(spare_size(wide));
    float *const d_key = arena.template take<float>(n * wide), *const d_value = arena.template take<float>(n * wide);
    float* const d_query = arena.template take<float>(n * wide);
    float *const lse = arena.template take<float>(n), *const delta = arena.template take<float>(n);
    float *const scores = arena.template take<float>(B * B), *const d_p = arena.template take<float>(B * B);

    Gemm::begin();
    copy_rows(family, a.key, kv_head, size, keys);
    copy_rows(family, a.value, kv_head, size, values);
    pack_depth(family, keys, wide, keys_deep);
    std::memset(d_key, 0, n * wide * sizeof(float));
    std::memset(d_value, 0, n * wide * sizeof(float));
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      copy_rows(family, a.query, head, size, rows);
      pack_columns(rows, n, wide, queries);
      pack_depth(family, rows, wide, queries_deep);
      copy_rows(family, a.d_out, head, size, rows);
      pack_columns(rows, n, wide, d_outs);
      pack_depth(family, rows, wide, d_outs_deep);
      row_numbers(family, head, size, lse, delta);
      std::memset(d_query, 0, n * wide * sizeof(float));
      for (int64_t i = 0; i < family.count; ++i) {
        const Segment seen = family.segment(i);
        for (int64_t k0 = 0; k0 < seen.length; k0 += B) {
          const int64_t num_keys = seen.length - k0 < B ? seen.length - k0 : B, deep_keys = round_up(num_keys, kSegmentPad);
          const int64_t key_row = seen.local + k0;
          // the segment itself, from the diagonal on where that counts; of a prompt also its rollouts, whole
          for (int64_t j = i; j < (i ? i + 1 : family.count); ++j) {
            const Segment by = family.segment(j);
            const bool causal = a.causal && i == j;
            for (int64_t q0 = causal ? k0 : 0; q0 < by.length; q0 += B) {
              const int64_t num = by.length - q0 < B ? by.length - q0 : B, deep = round_up(num, kSegmentPad);
              const int64_t row = by.local + q0;
              product(num_keys, keys + key_row * wide, wide, queries + row * wide, P * wide, deep, deep_size, scores, B, false, spare);
              product(num_keys, values + key_row * wide, wide, d_outs + row * wide, P * wide, deep, deep_size, d_p, B, false, spare);
              for (int64_t k = 0; k < num_keys; ++k) {
                const int64_t from = causal && k0 + k > q0 ? k0 + k - q0 : 0;  // the first query that sees this key
                gradient_row(scores + k * B, d_p + k * B, lse + row, delta + row, a.scale, from, num, deep, p + k * B, ds + k * B);
              }
              product(num_keys, p, B, d_outs_deep + row * wide, P * deep, size, deep, d_value + key_row * wide, wide, true, spare);
              product(num_keys, ds, B, queries_deep + row * wide, P * deep, size, deep, d_key + key_row * wide, wide, true, spare);
              for (int64_t k = num_keys; k < deep_keys; ++k) std::memset((void*)(ds + k * B), 0, deep * sizeof(Op));
              turn(ds, deep_keys, deep, turned);
              product(num, turned, B, keys_deep + key_row * wide, P * deep_keys, size, deep_keys, d_query + row * wide, wide, true, spare);
            }
          }
        }
      }
      write(family, d_query, wide, a.d_query, head, size);
    }
    write(family, d_key, wide, a.d_key, kv_head, size);
    write(family, d_value, wide, a.d_value, kv_head, size);
    Gemm::end();
  }

  // log-sum-exp and sum of d_out * out of every row of a head
  static void row_numbers(const Family& family, int64_t head, int64_t size, float* lse, float* delta) {
    const Attention& a = family.a;
    for (int64_t i = 0; i < family.count; ++i) {
      const Segment s = family.segment(i);
      for (int64_t t = 0; t < round_up(s.length, kSegmentPad); ++t) {
        lse[s.local + t] = delta[s.local + t] = 0;
        if (t >= s.length) continue;
        const int64_t token = s.start + t;
        const S* const out = (const S*)a.out.data + token * a.out.token_stride + head * a.out.head_stride;
        const S* const d_out = (const S*)a.d_out.data + token * a.d_out.token_stride + head * a.d_out.head_stride;
        float sum = 0;
        for (int64_t d = 0; d < size; ++d) sum += widen(out[d]) * widen(d_out[d]);
        lse[s.local + t] = a.lse[token * a.heads + head];
        delta[s.local + t] = sum;
      }
    }
  }

  // One key of a block: p and ds for its queries, 0 where they do not see it.
  static void gradient_row(const float* scores, const float* d_p, const float* lse, const float* delta, float scale, int64_t from,
                           int64_t num, int64_t deep, Op* p, Op* ds) {
    const Vec factor = Simd::set(scale);
    for (int64_t q = 0; q < deep; q += W) {
      const Vec e = Simd::exp(Simd::fms(Simd::load(scores + q), factor, Simd::load(lse + q)));
      store(p + q, e);
      store(ds + q, Simd::mul(Simd::mul(e, factor), Simd::sub(Simd::load(d_p + q), Simd::load(delta + q))));
    }
    for (int64_t q = 0; q < (from < deep ? from : deep); ++q) p[q] = ds[q] = Op(0);
    for (int64_t q = num; q < deep; ++q) p[q] = ds[q] = Op(0);
  }

  static void write(const Family& family, const float* from, int64_t wide, metis::Rows<void> to, int64_t head, int64_t size) {
    for (int64_t i = 0; i < family.count; ++i) {
      const Segment s = family.segment(i);
      for (int64_t t = 0; t < s.length; ++t) {
        S* const row = (S*)to.data + (s.start + t) * to.token_stride + head * to.head_stride;
        for (int64_t d = 0; d < size; ++d) narrow(from[(s.local + t) * wide + d], row + d);
      }
    }
  }

  static constexpr metis::AttentionKernels kKernels = {&scratch_bytes, &forward, &backward};
};

}  // namespace
