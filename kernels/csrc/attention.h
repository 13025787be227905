// Attention of packed groups on the CPU: what the op library (attention_ops.cpp) asks of one instruction set.
//
// A family is a prompt and the rollouts that see it; families do not see each other. A task is one family and one key/value
// head with the R query heads that share it: tasks share nothing, so their results do not depend on the number of threads.
// A task copies its rows into scratch, every segment padded to kSegmentPad rows of zeros, and works in blocks of
// kAttentionBlock keys x kAttentionBlock queries whose scores stay in the cache.
//
// Shapes: N tokens of a pack, H query heads, K key/value heads, D head size, Dp: D rounded up to kSegmentPad, n padded tokens of a family.
#pragma once
#include <cstdint>

namespace metis {

inline constexpr int64_t kSegmentPad = 32;
inline constexpr int64_t kAttentionBlock = 128;

// [N, heads, D], the last axis contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t token_stride, head_stride;  // in elements
};

struct Attention {
  int64_t heads, kv_heads, head_size;
  const int64_t* family;  // [F + 1] first segment of each family; its first segment is the prompt
  const int64_t* start;   // [S] first token of each segment, in the order of the families
  const int64_t* stop;
  float scale;
  bool causal;  // whether a token sees of its own segment only what is before it, or all
  Rows<const void> query, key, value;
  Rows<void> out;         // written by forward, read by backward
  float* lse;             // [N, H]
  Rows<const void> d_out;  // backward
  Rows<void> d_query, d_key, d_value;
};

struct AttentionKernels {
  // of a task of a family of n padded tokens
  int64_t (*scratch_bytes)(int64_t n, int64_t head_size, bool backward);
  void (*forward)(const Attention&, int64_t family, int64_t kv_head, char* scratch);
  void (*backward)(const Attention&, int64_t family, int64_t kv_head, char* scratch);
};

struct AttentionIsa {
  AttentionKernels float32, bfloat16;
};

extern const AttentionIsa kAttentionPortable, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16, kAttentionAmx,
    kAttentionAmxEmulated;

}  // namespace metis
