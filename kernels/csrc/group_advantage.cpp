// Grouped advantages: see metis_kernels/group_advantage/api.py for the contract. PyTorch's stable ABI, float64 throughout.
//
// A batch is a few hundred rollouts, microseconds of work: one thread, since waking others would take longer.

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A = (r - mean) / (std + epsilon) over members, indices into rewards and out; out is left alone, hence 0, where the rewards
// are all equal. Returns whether they are not. NaN is not equal to anything, itself included.
bool channel(const double* rewards, const std::vector<int64_t>& members, bool norm_by_std, double epsilon, double* out) {
  bool signal = false;
  double sum = 0;
  for (const int64_t i : members) {
    signal |= rewards[i] != rewards[members.front()];
    sum += rewards[i];
  }
  if (!signal) {
    return false;
  }
  const double size = static_cast<double>(members.size());
  const double mean = sum / size;
  double squares = 0;
  for (const int64_t i : members) {
    out[i] = rewards[i] - mean;
    squares += out[i] * out[i];
  }
  if (norm_by_std) {
    // members.size() == 1 here only for a NaN
    const double divisor = std::sqrt(squares / (size - 1)) + epsilon;
    for (const int64_t i : members) {
      out[i] /= divisor;
    }
  }
  return true;
}

// Division by the standard deviation over the batch. The sums of a group add up to 0, and so does the batch.
void normalise_over_batch(std::vector<double>& sums, int64_t num_valid, double epsilon) {
  double squares = 0;
  for (const double sum : sums) {
    squares += sum * sum;
  }
  const double divisor = std::sqrt(squares / static_cast<double>(num_valid - 1)) + epsilon;
  for (double& sum : sums) {
    // what is 0 stays 0 where a NaN reward elsewhere makes the divisor NaN
    if (sum != 0) {
      sum /= divisor;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_advantage(
    Tensor r_acc,
    Tensor r_tool,
    Tensor correct,
    Tensor valid,
    Tensor num_tokens,
    Tensor offsets,
    std::string estimator,
    double alpha,
    double epsilon,
    bool norm_by_std,
    bool use_acc,
    bool use_tool) {
  for (const Tensor* tensor : {&r_acc, &r_tool, &correct, &valid, &num_tokens, &offsets}) {
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->is_contiguous(), "group_advantage: expected contiguous vectors");
  }
  const int64_t num = r_acc.numel();
  for (const Tensor* tensor : {&r_tool, &correct, &valid, &num_tokens}) {
    STD_TORCH_CHECK(tensor->numel() == num, "group_advantage: expected vectors of one length");
  }
  const int64_t num_groups = offsets.numel() - 1;
  const bool hdpo = estimator == "hdpo";
  const bool coupled = estimator == "coupled";
  const bool gdpo = estimator == "gdpo";
  STD_TORCH_CHECK(hdpo || coupled || gdpo || estimator == "grpo", "group_advantage: unknown estimator ", estimator);

  Tensor adv_acc_out = torch::stable::new_empty(r_acc, {num}, ScalarType::Float);
  Tensor adv_tool_out = torch::stable::new_empty(r_acc, {num}, ScalarType::Float);
  Tensor in_tool_out = torch::stable::new_zeros(r_acc, {num}, ScalarType::Bool);
  Tensor needs_gradient_out = torch::stable::new_zeros(r_acc, {num}, ScalarType::Bool);
  Tensor signal_acc_out = torch::stable::new_empty(r_acc, {num_groups}, ScalarType::Bool);
  Tensor signal_tool_out = torch::stable::new_empty(r_acc, {num_groups}, ScalarType::Bool);
  Tensor num_sampled_out = torch::stable::new_empty(r_acc, {2}, ScalarType::Long);

  const double* reward_acc = r_acc.const_data_ptr<double>();
  const double* reward_tool = r_tool.const_data_ptr<double>();
  const bool* is_correct = correct.const_data_ptr<bool>();
  const bool* is_valid = valid.const_data_ptr<bool>();
  const int64_t* tokens = num_tokens.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  bool* in_tool = in_tool_out.mutable_data_ptr<bool>();
  bool* needs_gradient = needs_gradient_out.mutable_data_ptr<bool>();
  bool* signal_acc = signal_acc_out.mutable_data_ptr<bool>();
  bool* signal_tool = signal_tool_out.mutable_data_ptr<bool>();

  std::vector<double> adv_acc(num), adv_tool(num);
  std::vector<double> combined(coupled ? num : 0), second(gdpo ? num : 0);
  std::vector<int64_t> members, qualifying;
  int64_t num_valid = 0, num_acc = 0, num_tool = 0;
  for (int64_t p = 0; p < num_groups; ++p) {
    members.clear();
    qualifying.clear();
    for (int64_t i = offset[p]; i < offset[p + 1]; ++i) {
      if (!is_valid[i]) {
        continue;
      }
      members.push_back(i);
      num_acc += tokens[i];
      if (hdpo && is_correct[i]) {
        qualifying.push_back(i);
      }
      if (coupled) {
        combined[i] = reward_acc[i] + alpha * reward_tool[i];
      }
    }
    num_valid += static_cast<int64_t>(members.size());

    signal_acc[p] = channel(coupled ? combined.data() : reward_acc, members, norm_by_std, epsilon, adv_acc.data());
    if (gdpo) {
      const bool signal = channel(reward_tool, members, norm_by_std, epsilon, second.data());
      for (const int64_t i : members) {
        adv_acc[i] += alpha * second[i];
      }
      signal_acc[p] |= signal && alpha > 0;
    }
    for (const int64_t i : members) {
      needs_gradient[i] = signal_acc[p] && use_acc;
    }

    signal_tool[p] = channel(reward_tool, qualifying, norm_by_std, epsilon, adv_tool.data());
    if (signal_tool[p]) {
      for (const int64_t i : qualifying) {
        in_tool[i] = true;
        needs_gradient[i] |= use_tool;
        num_tool += tokens[i];
      }
    }
  }
  if (gdpo && norm_by_std) {
    normalise_over_batch(adv_acc, num_valid, epsilon);
  }

  float* acc = adv_acc_out.mutable_data_ptr<float>();
  float* tool = adv_tool_out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < num; ++i) {
    acc[i] = static_cast<float>(adv_acc[i]);
    tool[i] = static_cast<float>(adv_tool[i]);
  }
  int64_t* num_sampled = num_sampled_out.mutable_data_ptr<int64_t>();
  num_sampled[0] = num_acc;
  num_sampled[1] = num_tool;
  return {adv_acc_out, adv_tool_out, in_tool_out, needs_gradient_out, signal_acc_out, signal_tool_out, num_sampled_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(metis_kernels_cpu, m) {
  m.def(
      "group_advantage(Tensor r_acc, Tensor r_tool, Tensor correct, Tensor valid, Tensor num_tokens, Tensor offsets, "
      "str estimator, float alpha, float epsilon, bool norm_by_std, bool use_acc, bool use_tool) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(metis_kernels_cpu, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
}
