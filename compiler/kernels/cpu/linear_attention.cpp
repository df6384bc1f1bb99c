// optc::cached_linear_attention on the CPU: the recurrence itself, head by head.
//
// What it computes, and from whom it comes: compiler/ops/dialect/recurrent.py. A head's state [K, V] is some tens of
// kilobytes, which stay in cache while its tokens go by; heads and rows are spread over at::parallel_for. Keys and queries
// may be expanded over heads: every axis but the last is read by its stride.

#include "torch_headers.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace optc {
namespace {

using at::Tensor;

// A tensor [B, S, H, ...] of floats, of which one head's numbers of one token lie side by side.
struct Stream {
  explicit Stream(const Tensor& tensor)
      : held(tensor.dim() == 4 && tensor.size(3) > 1 && tensor.stride(3) != 1 ? tensor.contiguous() : tensor),
        data(held.const_data_ptr<float>()),
        strides(held.strides().vec()) {}
  const float* at(int64_t row, int64_t token, int64_t head) const {
    return data + row * strides[0] + token * strides[1] + head * strides[2];
  }
  Tensor held;
  const float* data;
  std::vector<int64_t> strides;
};

struct Sizes {
  int64_t rows, tokens, heads, keys, values;
};

Sizes check_inputs(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& decay,
                   const std::optional<Tensor>& beta, const Tensor& state) {
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key and value must be [B, S, H, D]");
  TORCH_CHECK(query.sizes() == key.sizes(), "query and key differ in shape");
  const Sizes sizes{key.size(0), key.size(1), key.size(2), key.size(3), value.size(3)};
  TORCH_CHECK(value.sizes().slice(0, 3) == key.sizes().slice(0, 3), "key and value differ in rows, tokens or heads");
  TORCH_CHECK((decay.dim() == 3 && decay.sizes() == key.sizes().slice(0, 3)) || decay.sizes() == key.sizes(),
              "decay must be [B, S, H] or [B, S, H, K]");
  TORCH_CHECK(!beta || beta->sizes() == key.sizes().slice(0, 3), "beta must be [B, S, H]");
  TORCH_CHECK(state.sizes() == at::IntArrayRef({sizes.rows, sizes.heads, sizes.keys, sizes.values}),
              "the state must be [B, H, K, V]");
  for (const auto& tensor : {query, key, value, decay, state, beta.value_or(state)}) {
    TORCH_CHECK(tensor.scalar_type() == at::kFloat, "every tensor must be float32");
  }
  return sizes;
}

// One token: `held` [K, V] is moved on, and `out` [V] is read from it. `update` is room for V numbers.
void move_on(const Sizes& sizes, const float* query, const float* key, const float* value, const float* decay,
             bool per_key, const float* beta, float* __restrict held, float* __restrict update, float* __restrict out) {
  const int64_t keys = sizes.keys, values = sizes.values;
  const float common = per_key ? 0.0f : std::exp(decay[0]);
  for (int64_t i = 0; i < keys; ++i) {
    const float factor = per_key ? std::exp(decay[i]) : common;
    float* __restrict row = held + i * values;
    for (int64_t j = 0; j < values; ++j) row[j] *= factor;
  }
  for (int64_t j = 0; j < values; ++j) update[j] = value[j];
  if (beta != nullptr) {
    for (int64_t i = 0; i < keys; ++i) {
      const float* row = held + i * values;
      for (int64_t j = 0; j < values; ++j) update[j] -= key[i] * row[j];
    }
    for (int64_t j = 0; j < values; ++j) update[j] *= *beta;
  }
  for (int64_t j = 0; j < values; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < keys; ++i) {
    float* __restrict row = held + i * values;
    for (int64_t j = 0; j < values; ++j) {
      row[j] += key[i] * update[j];
      out[j] += query[i] * row[j];
    }
  }
}

std::tuple<Tensor, Tensor> cached_linear_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const Tensor& decay, const std::optional<Tensor>& beta,
                                                   const Tensor& state) {
  const Sizes sizes = check_inputs(query, key, value, decay, beta, state);
  const Stream queries(query), keys(key), values(value), decays(decay), betas(beta.value_or(decay));
  const bool per_key = decay.dim() == 4;
  Tensor out = at::empty(value.sizes(), value.options());
  Tensor moved = state.clone(at::MemoryFormat::Contiguous);
  float* results = out.mutable_data_ptr<float>();
  float* states = moved.mutable_data_ptr<float>();
  const int64_t matrix = sizes.keys * sizes.values;
  at::parallel_for(0, sizes.rows * sizes.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> update(sizes.values);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / sizes.heads, head = task % sizes.heads;
      for (int64_t token = 0; token < sizes.tokens; ++token) {
        float* result = results + ((row * sizes.tokens + token) * sizes.heads + head) * sizes.values;
        move_on(sizes, queries.at(row, token, head), keys.at(row, token, head), values.at(row, token, head),
                decays.at(row, token, head), per_key, beta ? betas.at(row, token, head) : nullptr,
                states + task * matrix, update.data(), result);
      }
    }
  });
  return {out, moved};
}

}  // namespace
}  // namespace optc

TORCH_LIBRARY_FRAGMENT(optc, library) {
  if (!c10::Dispatcher::singleton().findSchema({"optc::cached_linear_attention", ""})) {
    library.def(OPTC_SCHEMA);
  }
}

TORCH_LIBRARY_IMPL(optc, CPU, library) { library.impl("cached_linear_attention", &optc::cached_linear_attention); }
