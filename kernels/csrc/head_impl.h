// The LM head on one instruction set: included by head_<isa>.cpp after the Simd and Gemm types that it is written in.
//
// S: how the head, the hidden states and the exponentials are stored (float, or uint16_t: bfloat16). Gemm::Op: what its tile
// product reads. Where they differ (bfloat16 on a processor without bfloat16 products) operands are widened when packed.
#pragma once

namespace {

using metis::Backward;
using metis::Forward;
using metis::Head;
using metis::kTokenPad;
using metis::kVocabBlock;
using metis::PartStats;
using Vec = Simd::Vec;
constexpr int W = Simd::kWidth;

// With e^60 a row sum stays finite, and so does its product with anything a head holds; such rows are run again.
constexpr float kLargestExponent = 60.0f;
// below every logit, and its distance to them is finite
constexpr float kLowest = -1e30f;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
// to bfloat16, to nearest even; a NaN stays one
inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline Vec load(const float* p) { return Simd::load(p); }
inline Vec load(const uint16_t* p) { return Simd::load_bf16(p); }
inline void store(float* p, Vec x) { Simd::store(p, x); }
inline void store(uint16_t* p, Vec x) { Simd::store_bf16(p, x); }
template <class S, class Gemm>
struct HeadOf {
  using Op = typename Gemm::Op;
  static constexpr bool kSame = std::is_same_v<S, Op>;
  static constexpr int P = Gemm::kPanel;

  static int64_t depth_of(int64_t hidden) { return round_up(hidden, Gemm::kDepth); }

  // What a part works in. Every piece starts on a cache line.
  struct Scratch {
    float* tile;     // [kRows, Cp] logits of a few rows
    float* stats;    // [3, Cp] statistics of a block
    Op* rows;        // [kRows, depth] widened rows of the head
    Op* block;       // [kVocabBlock, Cp] dL/dz of a block, where it is not read in place
    Op* turned;      // [Cp, kVocabBlock] its transpose
    Op* panel;       // [kVocabBlock, P] columns of a block of the head
    Op* spare;       // [kRows, longest row], for a tile product that must pad

    Scratch(char* base, int64_t tokens, int64_t hidden, bool from_logits) {
      const int64_t cp = round_up(tokens, kTokenPad), depth = depth_of(hidden);
      char* at = base;
      const auto piece = [&at](int64_t bytes) {
        char* const here = at;
        at += round_up(bytes, 64);
        return here;
      };
      tile = (float*)piece(Gemm::kRows * cp * 4);
      stats = (float*)piece(3 * cp * 4);
      rows = (Op*)piece(kSame ? 0 : Gemm::kRows * depth * int64_t(sizeof(Op)));
      block = (Op*)piece(kSame && !from_logits ? 0 : kVocabBlock * cp * int64_t(sizeof(Op)));
      turned = (Op*)piece(cp * kVocabBlock * int64_t(sizeof(Op)));
      panel = (Op*)piece(kVocabBlock * P * int64_t(sizeof(Op)));
      int64_t longest = depth > cp ? depth : cp;
      if (longest < kVocabBlock) longest = kVocabBlock;
      spare = (Op*)piece(Gemm::kDepth < 32 ? 0 : Gemm::kRows * longest * int64_t(sizeof(Op)));
      bytes = at - base;
    }
    int64_t bytes;
  };

  static int64_t scratch_bytes(int64_t tokens, int64_t hidden, bool from_logits) {
    return Scratch(nullptr, tokens, hidden, from_logits).bytes + 64;
  }

  static int64_t panel_bytes(int64_t tokens, int64_t hidden) {
    const int64_t cp = round_up(tokens, kTokenPad);
    const int64_t forward = cp * depth_of(hidden), backward = cp * round_up(hidden, kTokenPad);
    return (forward > backward ? forward : backward) * int64_t(sizeof(Op)) + 64;
  }

  static char* aligned(void* p) { return (char*)round_up(int64_t(p), 64); }

  // element (k, j) of a packed panel
  static Op* at(Op* panel, int64_t k, int64_t j) {
    return sizeof(Op) == 2 ? panel + (k / 2) * 2 * P + 2 * j + k % 2 : panel + k * P + j;
  }

  static void pack_x(const Head& head, int64_t begin, int64_t end) {
    const int64_t depth = depth_of(head.hidden);
    Op* const out = (Op*)aligned(head.x_panels);
    for (int64_t t = begin * kTokenPad; t < end * kTokenPad; ++t) {
      Op* const panel = out + t / P * depth * P;
      const int64_t inside = t < head.tokens ? head.hidden : 0;
      const S* const row = inside ? token_row(head, t) : nullptr;
      for (int64_t k = 0; k < inside; ++k) *at(panel, k, t % P) = to_op(row[k]);
      for (int64_t k = inside; k < depth; ++k) *at(panel, k, t % P) = Op(0);
    }
  }

  static void pack_scaled(const Head& head, int64_t begin, int64_t end) {
    const int64_t depth = head.token_stride;
    const int64_t first = begin * kTokenPad, last = end * kTokenPad, inside = last < head.hidden ? last : head.hidden;
    Op* const out = (Op*)aligned(head.x_panels);
    for (int64_t t = 0; t < depth; ++t) {
      const bool real = t < head.tokens;
      const S* const row = real ? token_row(head, t) : nullptr;
      for (int64_t h = first; h < last; ++h)
        *at(out + h / P * depth * P, t, h % P) = real && h < inside ? scaled<Op>(widen(row[h]) * head.scale[t]) : Op(0);
    }
  }

  template <class To>
  static To scaled(float x) {
    if constexpr (sizeof(To) == 4)
      return x;
    else
      return narrow(x);
  }

  static Op to_op(S x) {
    if constexpr (kSame)
      return x;
    else
      return widen(x);
  }

  static const S* token_row(const Head& head, int64_t t) { return (const S*)head.x + head.rows[t] * head.x_stride; }

  static const S* head_row(const Head& head, int64_t v) { return (const S*)head.w + v * head.w_stride; }

  // `count` rows of the head from row v, as the tile product reads them
  static const Op* rows_of(const Head& head, int64_t v, int count, const Scratch& scratch, int64_t* stride) {
    if constexpr (kSame) {
      *stride = head.w_stride;
      return head_row(head, v);
    } else {
      const int64_t depth = depth_of(head.hidden);
      for (int i = 0; i < count; ++i) {
        int64_t k = 0;
        for (; k + W <= head.hidden; k += W) Simd::store(scratch.rows + i * depth + k, load(head_row(head, v + i) + k));
        for (; k < depth; ++k) scratch.rows[i * depth + k] = k < head.hidden ? widen(head_row(head, v + i)[k]) : 0.0f;
      }
      *stride = depth;
      return scratch.rows;
    }
  }

  // First of the sorted targets that is at least v.
  static int64_t first_target(const Head& head, int64_t v) {
    int64_t low = 0, high = head.tokens;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (head.sorted_target[middle] < v)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  static void forward(const Forward& f, int64_t begin, int64_t end, int64_t part, const PartStats& out) {
    const Head& head = f.head;
    const Scratch scratch(aligned(head.scratch + part * head.scratch_bytes), head.tokens, head.hidden, false);
    const int64_t cp = head.token_stride, depth = depth_of(head.hidden);
    const Op* const panels = (const Op*)aligned(head.x_panels);
    float *const peak = scratch.stats, *const sum = scratch.stats + cp, *const moment = scratch.stats + 2 * cp;
    for (int64_t t = 0; t < head.tokens; ++t) out.max[t] = kLowest, out.sum[t] = out.moment[t] = 0;
    int64_t next = first_target(head, begin);
    Gemm::begin();
    for (int64_t v0 = begin; v0 < end; v0 += kVocabBlock) {
      const int64_t stop = v0 + kVocabBlock < end ? v0 + kVocabBlock : end;
      for (int64_t t = 0; t < cp; ++t) peak[t] = kLowest, sum[t] = moment[t] = 0;
      for (int64_t v = v0; v < stop; v += Gemm::kRows) {
        const int count = int(stop - v < Gemm::kRows ? stop - v : Gemm::kRows);
        int64_t stride;
        const Op* const rows = rows_of(head, v, count, scratch, &stride);
        const int64_t length = kSame ? head.hidden : depth;
        for (int64_t t = 0; t < cp; t += P)
          for (int64_t k = 0; k < length; k += Gemm::kBlock) {
            const int64_t part_length = length - k < Gemm::kBlock ? length - k : Gemm::kBlock;
            Gemm::run(count, rows + k, stride, panels + t * depth + k * P, part_length, scratch.tile + t, cp, k > 0, scratch.spare);
          }
        if (f.anchor)
          anchored(f, v, count, scratch.tile, sum, moment);
        else
          running(f, count, scratch.tile, peak, sum, moment);
        for (; next < head.tokens && head.sorted_target[next] < v + count; ++next) {
          const int64_t t = head.sorted_token[next];
          const float z = scratch.tile[(head.sorted_target[next] - v) * cp + t];
          f.target[t] = z * head.inv_temperature;
          if (f.anchor) f.target_exp[t] = exponential(z, head.inv_temperature, f.anchor[t]);
        }
      }
      // totals in double: a sum over a vocabulary of 150,000 would lose 2e-5 in float
      for (int64_t t = 0; t < head.tokens; ++t) {
        if (f.anchor) {
          out.sum[t] += sum[t];
          out.moment[t] += moment[t];
          continue;
        }
        const double top = out.max[t] > peak[t] ? out.max[t] : double(peak[t]);
        const double old_share = std::exp(out.max[t] - top), new_share = std::exp(peak[t] - top);
        out.moment[t] = old_share * (out.moment[t] + (out.max[t] - top) * out.sum[t]) +
                        new_share * (moment[t] + (peak[t] - top) * double(sum[t]));
        out.sum[t] = old_share * out.sum[t] + new_share * double(sum[t]);
        out.max[t] = top;
      }
    }
    Gemm::end();
  }

  // one of the exponentials of `anchored`, to the bit
  static float exponential(float z, float scale, float anchor) {
    float wide[W];
    const Vec exponent = Simd::fms(Simd::set(z), Simd::set(scale), Simd::set(anchor));
    Simd::store(wide, Simd::exp(Simd::min(Simd::set(kLargestExponent), exponent)));
    return wide[0];
  }

  // exp(z - anchor): summed, and stored
  static void anchored(const Forward& f, int64_t v, int count, const float* tile, float* sum, float* moment) {
    const int64_t cp = f.head.token_stride;
    const Vec scale = Simd::set(f.head.inv_temperature), limit = Simd::set(kLargestExponent);
    for (int64_t t = 0; t < cp; t += W) {
      const Vec anchor = Simd::load(f.anchor + t);
      Vec s = Simd::zero(), m = Simd::zero();
      for (int i = 0; i < count; ++i) {
        const Vec z = Simd::fms(Simd::load(tile + i * cp + t), scale, anchor);
        const Vec e = Simd::exp(Simd::min(limit, z));
        s = Simd::add(s, e);
        if (f.exponentials) store((S*)f.exponentials + (v + i) * cp + t, e);
        if (f.moment) m = Simd::fma(e, z, m);
        if (f.logits) Simd::store(f.logits + (v + i) * cp + t, z);
      }
      Simd::store(sum + t, Simd::add(Simd::load(sum + t), s));
      if (f.moment) Simd::store(moment + t, Simd::add(Simd::load(moment + t), m));
    }
  }

  // exp(z - running maximum): summed
  static void running(const Forward& f, int count, const float* tile, float* peak, float* sum, float* moment) {
    const int64_t cp = f.head.token_stride;
    const Vec scale = Simd::set(f.head.inv_temperature);
    for (int64_t t = 0; t < cp; t += W) {
      const Vec old = Simd::load(peak + t);
      Vec top = old;
      for (int i = 0; i < count; ++i) top = Simd::max(Simd::mul(Simd::load(tile + i * cp + t), scale), top);
      const Vec share = Simd::exp(Simd::sub(old, top)), old_sum = Simd::load(sum + t);
      Vec s = Simd::zero(), m = Simd::zero();
      for (int i = 0; i < count; ++i) {
        const Vec z = Simd::fms(Simd::load(tile + i * cp + t), scale, top);
        const Vec e = Simd::exp(z);
        s = Simd::add(s, e);
        m = Simd::fma(e, z, m);
      }
      const Vec old_moment = Simd::fma(Simd::sub(old, top), old_sum, Simd::load(moment + t));
      Simd::store(peak + t, top);
      Simd::store(sum + t, Simd::fma(share, old_sum, s));
      Simd::store(moment + t, Simd::fma(share, old_moment, m));
    }
  }

  static void backward(const Backward& b, int64_t begin, int64_t end, int64_t part) {
    const Head& head = b.head;
    const Scratch scratch(aligned(head.scratch + part * head.scratch_bytes), head.tokens, head.hidden, !b.exponentials);
    const int64_t cp = head.token_stride, padded = round_up(head.hidden, kTokenPad);
    const Op* const panels = (const Op*)aligned(head.x_panels);
    Gemm::begin();
    for (int64_t v0 = begin; v0 < end; v0 += kVocabBlock) {
      const int64_t count = v0 + kVocabBlock < end ? kVocabBlock : end - v0;
      const Op* const d_z = block_of(b, v0, count, scratch);
      if (b.d_hidden) {
        const int64_t depth = round_up(count, Gemm::kDepth);
        turn(d_z, cp, count, depth, scratch.turned);
        for (int64_t h = 0; h < padded; h += P) {
          pack_columns(head, v0, count, depth, h, scratch.panel);
          for (int64_t t = 0; t < head.tokens; t += Gemm::kRows) {
            const int rows = int(head.tokens - t < Gemm::kRows ? head.tokens - t : Gemm::kRows);
            Gemm::run(rows, scratch.turned + t * kVocabBlock, kVocabBlock, scratch.panel, depth,
                      b.d_hidden + h * head.tokens + t * P, P, true, scratch.spare);
          }
        }
      }
      if (b.d_head)
        for (int64_t v = 0; v < count; v += Gemm::kRows) {
          const int rows = int(count - v < Gemm::kRows ? count - v : Gemm::kRows);
          for (int64_t h = 0; h < head.hidden; h += P) {
            float* const out = b.d_head + (v0 + v) * head.hidden + h;
            const Op* const panel = panels + h * cp;
            if (h + P <= head.hidden) {
              // the gradient comes from memory: on its way while the product runs
              for (int i = 0; i < rows; ++i)
                for (int j = 0; j < P; j += 16) __builtin_prefetch(out + i * head.hidden + P + j, 1);
              Gemm::run(rows, d_z + v * cp, cp, panel, cp, out, head.hidden, true, scratch.spare);
            } else {
              Gemm::run(rows, d_z + v * cp, cp, panel, cp, scratch.tile, P, false, scratch.spare);
              for (int i = 0; i < rows; ++i)
                for (int64_t j = 0; j < head.hidden - h; ++j) out[i * head.hidden + j] += scratch.tile[i * P + j];
            }
          }
        }
    }
    Gemm::end();
  }

  // dL/dz of a block [count, Cp] (up to the factor of the row that x is scaled by), as the tile product reads it
  static const Op* block_of(const Backward& b, int64_t v0, int64_t count, const Scratch& scratch) {
    const Head& head = b.head;
    const int64_t cp = head.token_stride;
    if (b.exponentials) {
      const S* const stored = (const S*)b.exponentials + v0 * cp;
      if constexpr (kSame) {
        return stored;
      } else {
        for (int64_t i = 0; i < count * cp; i += W) Simd::store(scratch.block + i, load(stored + i));
        return scratch.block;
      }
    }
    for (int64_t t = 0; t < cp; t += W) {
      const Vec log_sum = Simd::load(b.log_sum + t), g = Simd::load(b.g + t);
      const Vec bonus = Simd::load(b.bonus + t), entropy = Simd::load(b.entropy + t);
      for (int64_t i = 0; i < count; ++i) {
        const Vec log_p = Simd::sub(Simd::load(b.logits + (v0 + i) * cp + t), log_sum);
        const Vec p = Simd::exp(log_p);
        store(scratch.block + i * cp + t, Simd::mul(p, Simd::fma(bonus, Simd::add(log_p, entropy), g)));
      }
    }
    for (int64_t n = first_target(head, v0); n < head.tokens && head.sorted_target[n] < v0 + count; ++n) {
      const int64_t t = head.sorted_token[n], i = head.sorted_target[n] - v0;
      const float log_p = b.logits[(v0 + i) * cp + t] - b.log_sum[t], p = std::exp(log_p);
      scratch.block[i * cp + t] = scaled<Op>(p * (b.bonus[t] * (log_p + b.entropy[t]) + b.g[t]) - b.g[t]);
    }
    return scratch.block;
  }

  // columns h .. h + P of `count` rows of the head, packed; rows up to `depth` and columns beyond the head are 0
  static void pack_columns(const Head& head, int64_t v0, int64_t count, int64_t depth, int64_t h, Op* panel) {
    const bool whole = h + P <= head.hidden;
    // the columns after these are fetched while the product with these runs: no hardware prefetcher follows this stride
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < P * int64_t(sizeof(S)); j += 64) __builtin_prefetch((const char*)(head_row(head, v0 + k) + h + P) + j, 0, 2);
    if constexpr (sizeof(Op) == 4) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < P; j += W) {
          if (whole) {
            Simd::store(panel + k * P + j, load(head_row(head, v0 + k) + h + j));
            continue;
          }
          for (int64_t i = j; i < j + W; ++i) panel[k * P + i] = h + i < head.hidden ? widen(head_row(head, v0 + k)[h + i]) : 0.0f;
        }
    } else {
      int64_t k = 0;
      if (whole)
        for (; k + 2 <= count; k += 2)
          for (int64_t j = 0; j < P; j += 16) {
            const S *const low = head_row(head, v0 + k) + h + j, *const high = low + head.w_stride;
            Simd::store((float*)(panel + k * P + 2 * j), Gemm::pair(low, high));
          }
      for (; k < depth; ++k)
        for (int64_t j = 0; j < P; ++j) *at(panel, k, j) = k < count && h + j < head.hidden ? head_row(head, v0 + k)[h + j] : Op(0);
    }
  }

  // [count, Cp] to [Cp, depth], rows of kVocabBlock; columns from `count` on are 0
  static void turn(const Op* from, int64_t cp, int64_t count, int64_t depth, Op* to) {
    constexpr int kSquare = W;                             // rows and columns of 32 bits
    constexpr int kSpan = kSquare * 4 / int(sizeof(Op));  // rows of the block that make them
    const int64_t whole = count / kSpan * kSpan;
    for (int64_t v = 0; v < whole; v += kSpan) {
      // the next rows, which nothing has touched since they were written a pass ago
      const char* const next = (const char*)(from + (v + kSpan) * cp);
      for (int64_t byte = 0; byte < kSpan * cp * int64_t(sizeof(Op)); byte += 64) __builtin_prefetch(next + byte, 0, 2);
      for (int64_t t = 0; t < cp; t += W) {
        Vec r[kSquare];
        for (int i = 0; i < kSquare; ++i) {
          if constexpr (sizeof(Op) == 4)
            r[i] = Simd::load(from + (v + i) * cp + t);
          else
            r[i] = Gemm::pair(from + (v + 2 * i) * cp + t, from + (v + 2 * i + 1) * cp + t);
        }
        Simd::transpose(r);
        for (int i = 0; i < kSquare; ++i) Simd::store((float*)(to + (t + i) * kVocabBlock + v), r[i]);
      }
    }
    for (int64_t t = 0; t < cp; ++t)
      for (int64_t v = whole; v < depth; ++v) to[t * kVocabBlock + v] = v < count ? from[v * cp + t] : Op(0);
  }

  static constexpr metis::HeadKernels kKernels = {P, &scratch_bytes, &panel_bytes, &pack_x, &pack_scaled, &forward, &backward};
};

}  // namespace
