// torch.ops.metis_kernels_cpu.*: the LM head on the CPU, through PyTorch's stable ABI. What is computed: head.h. The host
// side (chunks, ranks, the loss) is Python: metis_kernels/{linear_logprob,hdpo_loss}/cpu.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#ifdef METIS_X86  // Linux on x86-64 (CMakeLists.txt)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <tuple>

#include "head.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef METIS_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  if (!bf16 || !tile) return false;
  // Linux hands out the tile registers on request only, once a process: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif

// The best that the processor has; METIS_CPU_ISA in the environment takes a lesser one. Null: it does not have that.
const metis::Isa* choose_isa() {
#ifdef METIS_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && has_avx512(), bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  const struct {
    const metis::Isa* isa;
    bool runs, only_asked;
  } all[] = {
#ifdef METIS_X86
      {&metis::kAmx, bf16 && has_amx(), false},
      {&metis::kAmxEmulated, bf16, true},
      {&metis::kAvx512Bf16, bf16, false},
      {&metis::kAvx512, avx512, false},
      {&metis::kAvx2, avx2, false},
#endif
      {&metis::kPortable, true, false}};
  const char* const asked = std::getenv("METIS_CPU_ISA");
  for (const auto& each : all)
    if (each.runs && (asked ? !std::strcmp(asked, each.isa->name) : !each.only_asked)) return each.isa;
  return nullptr;
}

const metis::Isa* isa() { return metis::chosen_isa(); }

std::string isa_name() { return isa() ? isa()->name : ""; }

const metis::HeadKernels& kernels(const Tensor& head) {
  STD_TORCH_CHECK(isa() != nullptr, "this processor does not have what METIS_CPU_ISA asks for");
  const ScalarType type = head.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "head: expected float32 or bfloat16");
  return type == ScalarType::Float ? isa()->float32 : isa()->bfloat16;
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Where everything lies in the workspace, which Python allocates so that it is seen as a tensor.
struct Layout {
  int64_t token_stride, padded_hidden, parts, scratch_bytes;
  int64_t scratch, stats, target, d_hidden, bytes;  // offsets; the panels of x are at 0

  Layout(const metis::HeadKernels& k, int64_t tokens, int64_t hidden, int64_t vocab, bool with_d_hidden, bool from_logits) {
    token_stride = round_up(tokens, metis::kTokenPad);
    padded_hidden = round_up(hidden, metis::kTokenPad);
    const int64_t blocks = round_up(vocab, metis::kVocabBlock) / metis::kVocabBlock;
    parts = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), blocks));
    scratch_bytes = round_up(k.scratch_bytes(tokens, hidden, from_logits), 64);
    scratch = round_up(k.panel_bytes(tokens, hidden), 64);
    stats = scratch + parts * scratch_bytes;
    target = stats + parts * 3 * tokens * int64_t(sizeof(double));
    d_hidden = round_up(target + 2 * tokens * 4, 64);
    bytes = d_hidden + (with_d_hidden ? parts * tokens * padded_hidden * 4 : 0);
  }
};

std::tuple<int64_t, int64_t> workspace(Tensor head, int64_t tokens, bool with_d_hidden, bool from_logits) {
  const Layout layout(kernels(head), tokens, head.size(1), head.size(0), with_d_hidden, from_logits);
  return {layout.token_stride, layout.bytes};
}

// body(i) for every i in [0, count), over torch's own OpenMP threads
void parallel(int64_t count, const std::function<void(int64_t)>& body) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// body(part, first row, row after the last) for parts of whole blocks
void over_vocab(const Layout& layout, int64_t vocab, const std::function<void(int64_t, int64_t, int64_t)>& body) {
  const int64_t blocks = round_up(vocab, metis::kVocabBlock) / metis::kVocabBlock;
  parallel(layout.parts, [&](int64_t part) {
    const auto row = [&](int64_t p) { return std::min(vocab, p * blocks / layout.parts * metis::kVocabBlock); };
    body(part, row(part), row(part + 1));
  });
}

// body(begin, end) over `count` panels, for packing
void over_panels(const Layout& layout, int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  parallel(layout.parts, [&](int64_t part) { body(part * count / layout.parts, (part + 1) * count / layout.parts); });
}

metis::Head make_head(const Layout& layout, const Tensor& x, const Tensor& rows, const Tensor& w, const Tensor& sorted_target,
                      const Tensor& sorted_token, double inv_temperature, const Tensor& space) {
  STD_TORCH_CHECK(x.stride(1) == 1 && x.size(1) == w.size(1) && x.scalar_type() == w.scalar_type(), "hidden does not fit head");
  STD_TORCH_CHECK(w.stride(1) == 1 && w.size(1) % 2 == 0, "head: expected contiguous rows of even length");
  STD_TORCH_CHECK(rows.is_contiguous() && sorted_target.is_contiguous() && sorted_token.is_contiguous(), "expected contiguous indices");
  STD_TORCH_CHECK(space.is_contiguous() && space.numel() >= layout.bytes, "workspace is too small");
  metis::Head head{};
  head.tokens = rows.size(0);
  head.hidden = w.size(1);
  head.vocab = w.size(0);
  head.token_stride = layout.token_stride;
  head.x = x.const_data_ptr();
  head.x_stride = x.stride(0);
  head.rows = (const int64_t*)rows.const_data_ptr();
  head.w = w.const_data_ptr();
  head.w_stride = w.stride(0);
  head.sorted_target = (const int64_t*)sorted_target.const_data_ptr();
  head.sorted_token = (const int64_t*)sorted_token.const_data_ptr();
  head.inv_temperature = float(inv_temperature);
  char* const base = (char*)space.mutable_data_ptr();
  head.x_panels = base;
  head.scratch = base + layout.scratch;
  head.scratch_bytes = layout.scratch_bytes;
  return head;
}

float widen(float x) { return x; }
float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
void narrow(float x, float* out) { *out = x; }
void narrow(float x, uint16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *out = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
}

template <class S>
void target_dots(const Tensor& x, const int64_t* rows, const Tensor& w, const int64_t* local, int64_t tokens, float* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (local[t] < 0) continue;
    const S* const a = (const S*)x.const_data_ptr() + rows[t] * x.stride(0);
    const S* const b = (const S*)w.const_data_ptr() + local[t] * w.stride(0);
    double sum = 0;
    for (int64_t h = 0; h < w.size(1); ++h) sum += double(widen(a[h])) * widen(b[h]);
    out[t] = float(sum);
  }
}

// hidden . head[target] of each token, 0 where another rank has the target
Tensor target_logits(Tensor x, Tensor rows, Tensor w, Tensor local) {
  const int64_t tokens = rows.size(0);
  Tensor out = torch::stable::new_empty(x, {tokens}, ScalarType::Float);
  float* const dots = (float*)out.mutable_data_ptr();
  std::fill_n(dots, tokens, 0.0f);
  const auto run = w.scalar_type() == ScalarType::Float ? &target_dots<float> : &target_dots<uint16_t>;
  run(x, (const int64_t*)rows.const_data_ptr(), w, (const int64_t*)local.const_data_ptr(), tokens, dots);
  return out;
}

Tensor head_forward(Tensor x, Tensor rows, Tensor w, Tensor sorted_target, Tensor sorted_token, std::optional<Tensor> anchor,
                    double inv_temperature, std::optional<Tensor> exponentials, std::optional<Tensor> logits, bool moment,
                    Tensor space) {
  const metis::HeadKernels& k = kernels(w);
  const int64_t tokens = rows.size(0), vocab = w.size(0);
  const Layout layout(k, tokens, w.size(1), vocab, false, false);
  metis::Forward f{};
  f.head = make_head(layout, x, rows, w, sorted_target, sorted_token, inv_temperature, space);
  f.anchor = anchor ? (const float*)anchor->const_data_ptr() : nullptr;
  f.exponentials = exponentials ? exponentials->mutable_data_ptr() : nullptr;
  f.logits = logits ? (float*)logits->mutable_data_ptr() : nullptr;
  f.moment = moment;
  Tensor out = torch::stable::new_empty(x, {5, tokens}, ScalarType::Double);
  double* const result = (double*)out.mutable_data_ptr();
  char* const base = (char*)space.mutable_data_ptr();
  float* const target = f.target = (float*)(base + layout.target);
  f.target_exp = target + tokens;
  std::fill_n(target, 2 * tokens, 0.0f);

  double* const stats = (double*)(base + layout.stats);
  over_panels(layout, layout.token_stride / metis::kTokenPad, [&](int64_t a, int64_t b) { k.pack_x(f.head, a, b); });
  over_vocab(layout, vocab, [&](int64_t part, int64_t begin, int64_t end) {
    double* const own = stats + part * 3 * tokens;
    k.forward(f, begin, end, part, {own, own + tokens, own + 2 * tokens});
  });
  // parts are merged in their order, so that the result depends on the number of threads only
  for (int64_t t = 0; t < tokens; ++t) {
    double top = stats[t], sum = 0, first = 0;
    for (int64_t p = 1; p < layout.parts; ++p) top = std::max(top, stats[p * 3 * tokens + t]);
    for (int64_t p = 0; p < layout.parts; ++p) {
      const double* const own = stats + p * 3 * tokens;
      const double shift = f.anchor ? 0 : own[t] - top, share = std::exp(shift);
      sum += share * own[tokens + t];
      first += share * (own[2 * tokens + t] + shift * own[tokens + t]);
    }
    result[t] = top;
    result[tokens + t] = sum;
    result[2 * tokens + t] = first;
    result[3 * tokens + t] = target[t];
    result[4 * tokens + t] = f.target_exp[t];
  }
  return out;
}

// The parts' sums, times the factor of the row, rounded once. A row whose factor is 0 is 0, whatever its sums hold.
template <class S>
void write_d_hidden(const Layout& layout, int64_t panel, const metis::Head& head, const float* parts, const Tensor& d_hidden) {
  const int64_t columns = d_hidden.size(1), stride = d_hidden.stride(0), part_size = head.tokens * layout.padded_hidden;
  S* const base = (S*)d_hidden.mutable_data_ptr();
  over_panels(layout, head.tokens, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t h = 0; h < columns; ++h) {
        const int64_t at = (h / panel * head.tokens + t) * panel + h % panel;
        float sum = 0;
        for (int64_t p = 0; p < layout.parts; ++p) sum += parts[p * part_size + at];
        narrow(head.scale[t] == 0 ? 0.0f : head.scale[t] * sum, base + head.rows[t] * stride + h);
      }
  });
}

void head_backward(Tensor x, Tensor rows, Tensor scale, Tensor w, Tensor sorted_target, Tensor sorted_token,
                   std::optional<Tensor> exponentials, std::optional<Tensor> logits, std::optional<Tensor> vectors,
                   std::optional<Tensor> d_hidden, std::optional<Tensor> head_grad, Tensor space) {
  const metis::HeadKernels& k = kernels(w);
  const int64_t tokens = rows.size(0), vocab = w.size(0);
  const Layout layout(k, tokens, w.size(1), vocab, d_hidden.has_value(), logits.has_value());
  metis::Backward b{};
  STD_TORCH_CHECK(scale.is_contiguous() && scale.size(0) == tokens, "scale: expected one factor a token");
  b.head = make_head(layout, x, rows, w, sorted_target, sorted_token, 1.0, space);
  b.head.scale = (const float*)scale.const_data_ptr();
  b.exponentials = exponentials ? exponentials->mutable_data_ptr() : nullptr;
  if (logits) {
    STD_TORCH_CHECK(vectors && vectors->is_contiguous(), "logits need vectors");
    const float* const v = (const float*)vectors->const_data_ptr();
    b.logits = (const float*)logits->const_data_ptr();
    b.log_sum = v;
    b.g = v + layout.token_stride;
    b.bonus = v + 2 * layout.token_stride;
    b.entropy = v + 3 * layout.token_stride;
  }
  b.d_head = head_grad ? (float*)head_grad->mutable_data_ptr() : nullptr;
  float* const parts = (float*)((char*)space.mutable_data_ptr() + layout.d_hidden);
  const int64_t part_size = tokens * layout.padded_hidden;

  over_panels(layout, layout.padded_hidden / metis::kTokenPad, [&](int64_t a, int64_t e) { k.pack_scaled(b.head, a, e); });
  over_vocab(layout, vocab, [&](int64_t part, int64_t begin, int64_t end) {
    metis::Backward own = b;
    if (d_hidden) {
      own.d_hidden = parts + part * part_size;
      std::memset(own.d_hidden, 0, part_size * 4);
    }
    k.backward(own, begin, end, part);
  });
  if (!d_hidden) return;
  const auto write = w.scalar_type() == ScalarType::Float ? &write_d_hidden<float> : &write_d_hidden<uint16_t>;
  write(layout, k.panel, b.head, parts, *d_hidden);
}

}  // namespace

const metis::Isa* metis::chosen_isa() {
  static const metis::Isa* const chosen = choose_isa();
  return chosen;
}

STABLE_TORCH_LIBRARY_FRAGMENT(metis_kernels_cpu, m) {
  m.def("isa() -> str");
  m.def("workspace(Tensor head, int tokens, bool with_d_hidden, bool from_logits) -> (int, int)");
  m.def("target_logits(Tensor hidden, Tensor rows, Tensor head, Tensor local_targets) -> Tensor");
  m.def(
      "head_forward(Tensor hidden, Tensor rows, Tensor head, Tensor sorted_target, Tensor sorted_token, Tensor? anchor, float "
      "inv_temperature, Tensor(a!)? exponentials, Tensor(b!)? logits, bool moment, Tensor(c!) workspace) -> Tensor");
  m.def(
      "head_backward(Tensor hidden, Tensor rows, Tensor scale, Tensor head, Tensor sorted_target, Tensor sorted_token, "
      "Tensor(a!)? exponentials, Tensor? logits, Tensor? vectors, Tensor(b!)? d_hidden, Tensor(c!)? head_grad, Tensor(d!) "
      "workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(metis_kernels_cpu, CPU, m) {
  m.impl("workspace", TORCH_BOX(&workspace));
  m.impl("target_logits", TORCH_BOX(&target_logits));
  m.impl("head_forward", TORCH_BOX(&head_forward));
  m.impl("head_backward", TORCH_BOX(&head_backward));
}

STABLE_TORCH_LIBRARY_IMPL(metis_kernels_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa_name)); }
