// torch.ops.metis_kernels_cpu.attention_*: attention of packed groups on the CPU, through PyTorch's stable ABI. What is computed:
// attention.h. The host side is metis_kernels/prefix_attention/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "head.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const metis::AttentionIsa& attention_isa() {
  const metis::Isa* const isa = metis::chosen_isa();
  STD_TORCH_CHECK(isa != nullptr, "this processor does not have what METIS_CPU_ISA asks for");
  return *isa->attention;
}

template <class T>
metis::Rows<T> rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.stride(2) == 1, "expected [N, heads, D] whose last axis is contiguous");
  return {(T*)x.data_ptr(), x.stride(0), x.stride(1)};
}

const int64_t* table(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Long, "expected contiguous int64 tables");
  return (const int64_t*)x.const_data_ptr();
}

metis::Attention make(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& family, const Tensor& start,
                      const Tensor& stop, double scale, bool causal, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(lse.is_contiguous() && lse.scalar_type() == ScalarType::Float, "lse: expected contiguous float32");
  metis::Attention a{};
  a.heads = query.size(1);
  a.kv_heads = key.size(1);
  a.head_size = query.size(2);
  a.family = table(family);
  a.start = table(start);
  a.stop = table(stop);
  a.scale = float(scale);
  a.causal = causal;
  a.query = rows_of<const void>(query);
  a.key = rows_of<const void>(key);
  a.value = rows_of<const void>(value);
  a.out = rows_of<void>(out);
  a.lse = (float*)lse.data_ptr();
  return a;
}

// Padded tokens of a family.
int64_t padded(const metis::Attention& a, int64_t which) {
  int64_t n = 0;
  for (int64_t s = a.family[which]; s < a.family[which + 1]; ++s)
    n += (a.stop[s] - a.start[s] + metis::kSegmentPad - 1) / metis::kSegmentPad * metis::kSegmentPad;
  return n;
}

// run(task) for every family and key head, over torch's own OpenMP threads; a thread's scratch is that of its largest task
void over_tasks(const Tensor& like, const metis::Attention& a, int64_t families, bool backward) {
  const metis::AttentionIsa& isa = attention_isa();
  const metis::AttentionKernels& k = like.scalar_type() == ScalarType::Float ? isa.float32 : isa.bfloat16;
  torch::stable::parallel_for(0, families * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    int64_t bytes = 0;
    for (int64_t task = begin; task < end; ++task) bytes = std::max(bytes, k.scratch_bytes(padded(a, task / a.kv_heads), a.head_size, backward));
    Tensor scratch = torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
    for (int64_t task = begin; task < end; ++task)
      (backward ? k.backward : k.forward)(a, task / a.kv_heads, task % a.kv_heads, (char*)scratch.data_ptr());
  });
}

void attention_forward(Tensor query, Tensor key, Tensor value, Tensor family, Tensor start, Tensor stop, double scale, Tensor out,
                       Tensor lse, bool causal) {
  const metis::Attention a = make(query, key, value, family, start, stop, scale, causal, out, lse);
  over_tasks(query, a, family.size(0) - 1, false);
}

void attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor family, Tensor start,
                        Tensor stop, double scale, Tensor d_query, Tensor d_key, Tensor d_value, bool causal) {
  metis::Attention a = make(query, key, value, family, start, stop, scale, causal, out, lse);
  a.d_out = rows_of<const void>(d_out);
  a.d_query = rows_of<void>(d_query);
  a.d_key = rows_of<void>(d_key);
  a.d_value = rows_of<void>(d_value);
  over_tasks(query, a, family.size(0) - 1, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(metis_kernels_cpu, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor family, Tensor start, Tensor stop, float scale, "
      "Tensor(a!) out, Tensor(b!) lse, bool causal=True) -> ()");
  m.def(
      "attention_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor family, Tensor "
      "start, Tensor stop, float scale, Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_value, bool causal=True) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(metis_kernels_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
