// The LM head on the CPU: what the op library (head_ops.cpp) asks of one instruction set.
//
// Shapes: C tokens of a chunk, H hidden size, V rows of the head (of this rank's shard). Cp: C rounded up to kTokenPad.
//
// Work is cut into vocabulary ranges, one a thread. A range goes in blocks of kVocabBlock rows: the logits of a block are
// made, used and dropped (or written once as exponentials) while they are in the cache. The head is read in place; only
// the operands of a chunk, which are small, are packed.
#pragma once
#include <cstdint>

namespace metis {

inline constexpr int64_t kTokenPad = 32;     // tokens are padded to a whole number of panels on every instruction set
inline constexpr int64_t kVocabBlock = 256;  // rows of the head whose logits are in the cache at once

struct Head {
  int64_t tokens, hidden, vocab;  // C, H, V
  int64_t token_stride;           // Cp
  const void* x;                  // [T, H] hidden states
  int64_t x_stride;               // elements between rows of x
  const int64_t* rows;            // [C] which rows of x the chunk takes
  const float* scale;             // [C] backward: factor of each row
  const void* w;                  // [V, H] head
  int64_t w_stride;               // elements between rows of w
  const int64_t* sorted_target;   // [C] local rows of the targets, ascending; -1: not on this rank
  const int64_t* sorted_token;    // [C] the token each of them belongs to
  float inv_temperature;
  void* x_panels;                 // packed x, written by pack_x or pack_scaled
  char* scratch;                  // one piece of scratch_bytes a part
  int64_t scratch_bytes;
};

// Statistics of one part of the vocabulary, [C] each.
struct PartStats {
  double* max;     // running maximum (forward_stats), else unused
  double* sum;     // sum of exp(z - reference)
  double* moment;  // sum of exp(z - reference) * (z - reference)
};

struct Forward {
  Head head;
  const float* anchor;  // [Cp], the reference of the exponentials; null: the running maximum
  void* exponentials;   // [V, Cp] in the dtype of the head, or null
  float* logits;        // [V, Cp] z / temperature - anchor, or null
  bool moment;
  float* target;        // [C] z / temperature of the targets that are on this rank; others untouched
  float* target_exp;    // [C] with an anchor: their exponentials, as they were summed; others untouched
};

struct Backward {
  Head head;
  void* exponentials;   // as written by forward, the target's element replaced; or null, then:
  const float* logits;  // with the four vectors below, [Cp] each
  const float* log_sum;    // ln S
  const float* g;          // -dL/dlogp / temperature
  const float* bonus;      // h / temperature
  const float* entropy;    // H
  float* d_hidden;      // [Hp / panel, C, panel] of this part, float32, Hp = H rounded up to kTokenPad; or null
  float* d_head;        // [V, H] float32, added to; or null
};

// One instruction set, one dtype. A part is the vocabulary rows [begin, end); begin is a multiple of kVocabBlock.
struct HeadKernels {
  int64_t panel;  // columns of a tile product
  int64_t (*scratch_bytes)(int64_t tokens, int64_t hidden, bool from_logits);
  int64_t (*panel_bytes)(int64_t tokens, int64_t hidden);
  // Pack x for forward (panels of tokens) and for backward (panels of hidden columns). In units of kTokenPad of them.
  void (*pack_x)(const Head&, int64_t begin, int64_t end);
  void (*pack_scaled)(const Head&, int64_t begin, int64_t end);
  void (*forward)(const Forward&, int64_t begin, int64_t end, int64_t part, const PartStats&);
  void (*backward)(const Backward&, int64_t begin, int64_t end, int64_t part);
};

struct AttentionIsa;

struct Isa {
  const char* name;
  const AttentionIsa* attention;
  HeadKernels float32, bfloat16;
};

// Defined in one translation unit each, compiled with that instruction set; all but the portable one on x86-64 Linux alone.
extern const Isa kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated;

// The best that the processor has, or what METIS_CPU_ISA asks for; null: it does not have that. Chosen once a process
// (head_ops.cpp).
const Isa* chosen_isa();

}  // namespace metis
