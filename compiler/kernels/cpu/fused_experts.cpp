// optc::fused_experts on the CPU: for each expert the tokens that chose it, in two products of torch's.
//
// What it computes: compiler/ops/packed/cuda_experts.py. Weights of experts that no token chose are not read.

#include "torch_headers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string_view>
#include <vector>

namespace optc {
namespace {

using at::Tensor;

enum class Activation { kNone, kSilu, kGelu, kGeluTanh, kRelu };

Activation named(std::string_view name) {
  if (name.empty()) return Activation::kNone;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "no activation is called ", name);
  return Activation::kRelu;
}

float activate(float x, Activation which) {
  switch (which) {
    case Activation::kSilu: return x / (1.0f + std::exp(-x));
    case Activation::kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x > 0.0f ? x : 0.0f;
    default: return x;
  }
}

// A token that chose an expert, and by how much.
struct Choice {
  int64_t token;
  float share;
};

std::vector<std::vector<Choice>> choices_of(const Tensor& indices, const Tensor& weights, int64_t experts) {
  const Tensor chosen = indices.contiguous(), shares = weights.contiguous();
  const int64_t* expert = chosen.const_data_ptr<int64_t>();
  const float* share = shares.const_data_ptr<float>();
  std::vector<std::vector<Choice>> found(experts);
  const int64_t slots = chosen.size(1);
  for (int64_t i = 0; i < chosen.numel(); ++i) {
    if (expert[i] >= 0 && expert[i] < experts) found[expert[i]].push_back({i / slots, share[i]});
  }
  return found;
}

void check_inputs(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& indices, const Tensor& weights,
                  bool gated) {
  TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && down.dim() == 3, "x must be [T, K], up and down [E, N, K]");
  TORCH_CHECK(up.size(0) == down.size(0) && up.size(2) == x.size(1) && up.size(1) == (gated ? 2 : 1) * down.size(2),
              "the weights of experts do not fit");
  TORCH_CHECK(indices.dim() == 2 && indices.size(0) == x.size(0) && indices.sizes() == weights.sizes(),
              "indices and weights must be [T, S]");
  TORCH_CHECK(indices.scalar_type() == at::kLong, "indices must be int64");
}

Tensor activated(const Tensor& x, Activation which) {
  switch (which) {
    case Activation::kSilu: return at::silu(x);
    case Activation::kGelu: return at::gelu(x);
    case Activation::kGeluTanh: return at::gelu(x, "tanh");
    case Activation::kRelu: return at::relu(x);
    default: return x;
  }
}

// Every expert on every token, as the reference computes it: for calls of other programs than those of the CPU, which come
// here too in a process that has loaded this library.
Tensor every_expert(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& indices, const Tensor& weights,
                    const std::optional<Tensor>& residual, Activation which, bool gated) {
  const Tensor values = x.to(at::kFloat), shares = weights.to(at::kFloat);
  Tensor sum = residual ? residual->to(at::kFloat) : at::zeros({x.size(0), down.size(1)}, values.options());
  for (int64_t e = 0; e < up.size(0); ++e) {
    Tensor hidden = at::linear(values, up.select(0, e).to(at::kFloat));
    if (gated) {
      const auto halves = hidden.chunk(2, -1);
      hidden = activated(halves[0], which).mul(halves[1]);
    } else {
      hidden = activated(hidden, which);
    }
    const Tensor share = shares.masked_fill(indices.ne(e), 0.0).sum(-1, true);
    sum = sum.add(at::linear(hidden, down.select(0, e).to(at::kFloat)).mul(share));
  }
  return sum.to(x.scalar_type());
}

Tensor fused_experts(const Tensor& x, const Tensor& up, const Tensor& down, const Tensor& indices, const Tensor& weights,
                     const std::optional<Tensor>& residual, std::string_view activation, bool gated) {
  check_inputs(x, up, down, indices, weights, gated);
  const Activation which = named(activation);
  bool plain = gated && !residual;
  for (const auto& tensor : {x, up, down, weights}) plain = plain && tensor.scalar_type() == at::kFloat;
  if (!plain) return every_expert(x, up, down, indices, weights, residual, which, gated);
  const Tensor tokens = x.contiguous();
  const int64_t width = x.size(1), inner = down.size(2), columns = down.size(1);
  Tensor out = at::empty({x.size(0), columns}, x.options());
  float* results = out.mutable_data_ptr<float>();
  std::fill_n(results, out.numel(), 0.0f);
  const auto choices = choices_of(indices, weights, up.size(0));
  for (int64_t e = 0; e < up.size(0); ++e) {
    const auto& own = choices[e];
    if (own.empty()) continue;
    const int64_t count = static_cast<int64_t>(own.size());
    Tensor rows = at::empty({count, width}, x.options());
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(rows.mutable_data_ptr<float>() + r * width, tokens.const_data_ptr<float>() + own[r].token * width,
                  width * sizeof(float));
    }
    const Tensor both = at::mm(rows, up.select(0, e).t()).contiguous();
    Tensor hidden = at::empty({count, inner}, x.options());
    const float* halves = both.const_data_ptr<float>();
    float* middle = hidden.mutable_data_ptr<float>();
    at::parallel_for(0, count * inner, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* row = halves + i / inner * 2 * inner;
        middle[i] = activate(row[i % inner], which) * row[inner + i % inner];
      }
    });
    const Tensor part = at::mm(hidden, down.select(0, e).t()).contiguous();
    const float* parts = part.const_data_ptr<float>();
    for (int64_t r = 0; r < count; ++r) {
      float* target = results + own[r].token * columns;
      for (int64_t c = 0; c < columns; ++c) target[c] += own[r].share * parts[r * columns + c];
    }
  }
  return out;
}

}  // namespace
}  // namespace optc

TORCH_LIBRARY_FRAGMENT(optc, library) {
  if (!c10::Dispatcher::singleton().findSchema({"optc::fused_experts", ""})) {
    library.def(OPTC_SCHEMA);
  }
}

TORCH_LIBRARY_IMPL(optc, CPU, library) { library.impl("fused_experts", &optc::fused_experts); }
