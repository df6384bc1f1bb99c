// Paged attention on the CPU: write new keys and values into a paged pool, attend over it.
//
// Paging: Kwon et al. 2023, https://arxiv.org/abs/2309.06180. Online softmax over tiles of keys: Milakov and
// Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135.
//
// Work is cut into (request, key/value head, tile of new tokens) and spread over at::parallel_for. The query
// heads of one key/value head are rows of one tile, so every key is read once for all of them. All arithmetic
// is in float, whatever the type of the pool. A token whose slot is -1 is padding: see compiler/ops/dialect/paged.py;
// what a token of a tree sees: compiler/ops/dialect/paged_tree.py.

#pragma once

#include "torch_headers.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cfloat>
#include <cstring>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace optc {
namespace {

using at::Tensor;

const Tile& tile() {
#ifdef OPTC_HAS_AVX2
  static const Tile& chosen = at::get_cpu_capability() == "DEFAULT" ? tile_baseline : tile_avx2;
  return chosen;
#else
  return tile_baseline;
#endif
}

void widen(const c10::BFloat16* from, int64_t count, float* to) { tile().widen_bfloat16(from, count, to); }
void widen(const c10::Half* from, int64_t count, float* to) { tile().widen_half(from, count, to); }

struct Knobs {
  float scale;
  int64_t window;  // tokens that a query sees, itself included; 0: all; -c: those of its own chunk of c
  float softcap;   // 0: none

  // The first position that a query at `position` sees.
  int64_t first(int64_t position) const {
    if (window < 0) return position - position % -window;
    return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
  }
};

constexpr int64_t kPadding = -1;
constexpr int64_t kCausal = -1;  // of a token that is in no tree
constexpr int64_t kMostTree = 63;  // tokens of a tree: bits of an int64 that are no sign

// Sizes of one call, and the tables of where tokens are. `tree` is null where every token sees all before it.
struct Layout {
  int64_t tokens, heads, kv_heads, width, value_width, block_size, num_blocks, max_blocks, requests;
  const int32_t* block_tables;
  const int32_t* context_lens;
  const int32_t* cu_seqlens;
  const int64_t* tree;
  int64_t groups() const { return heads / kv_heads; }
  int64_t past(int64_t request) const {
    return context_lens[request] - (cu_seqlens[request + 1] - cu_seqlens[request]);
  }
  // Whether new token `token` of its request sees the one before it that is `other`; and how many it sees before itself.
  bool sees(int64_t request, int64_t token, int64_t other) const {
    const int64_t bits = tree[cu_seqlens[request] + token];
    return bits == kCausal ? other <= token : other < kMostTree && (bits >> other & 1);
  }
  int64_t depth(int64_t request, int64_t token) const {
    const int64_t bits = tree == nullptr ? kCausal : tree[cu_seqlens[request] + token];
    return bits == kCausal ? token : std::popcount(static_cast<uint64_t>(bits)) - 1;
  }
};

// New tokens [first, last) of a request, in the flattened token axis, of which `position` is the first's.
struct Task {
  int64_t request, kv_head, first, last, position;
};

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool,
                  const Tensor& slot_mapping, const Tensor& block_tables, const Tensor& context_lens,
                  const Tensor& cu_seqlens) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "q, k, v must be [tokens, heads, width]");
  TORCH_CHECK(k_pool.dim() == 4 && v_pool.dim() == 4, "pools must be [blocks, block_size, kv_heads, width]");
  const auto tokens = q.size(0), kv_heads = k.size(1);
  TORCH_CHECK(k.size(0) == tokens && v.size(0) == tokens && slot_mapping.numel() == tokens,
              "q, k, v and slot_mapping differ in tokens");
  TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0 && v.size(1) == kv_heads, "heads do not divide");
  TORCH_CHECK(q.size(2) == k.size(2), "q and k differ in width");
  TORCH_CHECK(k_pool.size(2) == kv_heads && k_pool.size(3) == k.size(2) && v_pool.size(2) == kv_heads &&
                  v_pool.size(3) == v.size(2) && v_pool.size(0) == k_pool.size(0) &&
                  v_pool.size(1) == k_pool.size(1),
              "the pools do not fit k and v");
  TORCH_CHECK(k_pool.is_contiguous() && v_pool.is_contiguous(), "the pools must be contiguous");
  const auto type = v.scalar_type();
  TORCH_CHECK(q.scalar_type() == type && k.scalar_type() == type && k_pool.scalar_type() == type &&
                  v_pool.scalar_type() == type,
              "q, k, v and the pools differ in type");
  TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && block_tables.scalar_type() == at::kInt &&
                  context_lens.scalar_type() == at::kInt && cu_seqlens.scalar_type() == at::kInt,
              "slot_mapping must be int64; block_tables, context_lens and cu_seqlens int32");
  TORCH_CHECK(block_tables.dim() == 2 && context_lens.numel() == block_tables.size(0) &&
                  cu_seqlens.numel() == block_tables.size(0) + 1,
              "block_tables, context_lens and cu_seqlens differ in requests");
}

// A request of padding alone: neither its length nor its blocks are looked at.
bool is_padding(const Layout& at, const int64_t* slots, int64_t request) {
  return std::all_of(slots + at.cu_seqlens[request], slots + at.cu_seqlens[request + 1],
                     [](int64_t slot) { return slot == kPadding; });
}

// Every index that the kernel will follow, checked: a bad one would read or write foreign memory.
void check_tables(const Layout& at, const int64_t* slots) {
  const auto num_slots = at.num_blocks * at.block_size;
  for (int64_t i = 0; i < at.tokens; ++i) {
    TORCH_CHECK(slots[i] >= kPadding && slots[i] < num_slots, "slot ", slots[i], " is outside the pool of ", num_slots);
  }
  TORCH_CHECK(at.cu_seqlens[0] == 0 && at.cu_seqlens[at.requests] == at.tokens,
              "cu_seqlens must run from 0 to the number of tokens");
  for (int64_t r = 0; r < at.requests; ++r) {
    TORCH_CHECK(at.cu_seqlens[r] <= at.cu_seqlens[r + 1], "cu_seqlens must not fall");
  }
  for (int64_t r = 0; r < at.requests; ++r) {
    if (is_padding(at, slots, r)) continue;
    const int64_t fresh = at.cu_seqlens[r + 1] - at.cu_seqlens[r], length = at.context_lens[r];
    TORCH_CHECK(fresh <= length, "request ", r, " has ", fresh, " new tokens, but a context of ", length);
    TORCH_CHECK(length <= at.max_blocks * at.block_size, "the context of request ", r, " exceeds its block table");
    for (int64_t i = 0; i * at.block_size < length; ++i) {
      const auto block = at.block_tables[r * at.max_blocks + i];
      TORCH_CHECK(block >= 0 && block < at.num_blocks, "block ", block, " is outside the pool of ", at.num_blocks);
    }
  }
}

// A token of a tree sees itself, and nothing behind it.
void check_tree(const Layout& at) {
  for (int64_t r = 0; r < at.requests; ++r) {
    for (int64_t i = at.cu_seqlens[r]; i < at.cu_seqlens[r + 1]; ++i) {
      const int64_t bits = at.tree[i], own = i - at.cu_seqlens[r];
      TORCH_CHECK(bits == kCausal || (bits > 0 && own < kMostTree && bits >> own == 1), "token ", own, " of request ", r,
                  " sees ", bits, ", which does not end with itself");
    }
  }
}

// pool[slot] = row, for one token per slot, but for padding. `row` elements of the token are contiguous in the pool.
void write_pool(const Tensor& fresh, const Tensor& pool, const int64_t* slots) {
  const auto source = fresh.contiguous();
  const int64_t bytes = source.size(1) * source.size(2) * source.element_size();
  const auto* from = static_cast<const char*>(source.const_data_ptr());
  auto* to = static_cast<char*>(pool.mutable_data_ptr());
  at::parallel_for(0, source.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slots[i] != kPadding) std::memcpy(to + slots[i] * bytes, from + i * bytes, bytes);
    }
  });
}

// out[token] = 0 for padding.
void clear_padding(const Tensor& out, const int64_t* slots) {
  const int64_t bytes = out.size(1) * out.size(2) * out.element_size();
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < out.size(0); ++i) {
    if (slots[i] == kPadding) std::memset(to + i * bytes, 0, bytes);
  }
}

std::vector<Task> cut(const Layout& at, const int64_t* slots) {
  std::vector<Task> tasks;
  const int64_t step = std::max<int64_t>(1, kMaxRows / at.groups());
  for (int64_t r = 0; r < at.requests; ++r) {
    if (is_padding(at, slots, r)) continue;
    const int64_t begin = at.cu_seqlens[r], end = at.cu_seqlens[r + 1], past = at.context_lens[r] - (end - begin);
    for (int64_t first = begin; first < end; first += step) {
      for (int64_t head = 0; head < at.kv_heads; ++head) {
        tasks.push_back({r, head, first, std::min(first + step, end), past + first - begin});
      }
    }
  }
  return tasks;
}

// Buffers of one thread.
struct Scratch {
  std::vector<float> queries, out, keys, values, scores, top, sum;
  std::array<const float*, kTileKeys> key_rows{}, value_rows{};

  Scratch(int64_t rows, int64_t width, int64_t value_width)
      : queries(rows * width), out(rows * value_width), keys(kTileKeys * width), values(kTileKeys * value_width),
        scores(rows * kTileKeys), top(rows), sum(rows) {}
};

// Pointers to `count` rows of a pool as floats: the pool's own rows, or converted copies in `copy`. Pointers up
// to the next multiple of 8 repeat the last one.
template <typename T>
void find_rows(const T* pool, int64_t width, const Layout& at, const Task& task, int64_t start, int64_t count,
               std::vector<float>& copy, std::array<const float*, kTileKeys>& rows) {
  const int32_t* block = at.block_tables + task.request * at.max_blocks + start / at.block_size;
  int64_t inside = start % at.block_size;
  for (int64_t j = 0; j < count; ++j) {
    const T* row = pool + ((*block * at.block_size + inside) * at.kv_heads + task.kv_head) * width;
    if constexpr (std::is_same_v<T, float>) {
      rows[j] = row;
    } else {
      rows[j] = copy.data() + j * width;
      widen(row, width, copy.data() + j * width);
    }
    if (++inside == at.block_size) {
      inside = 0;
      ++block;
    }
  }
  for (int64_t j = count; j % 8; ++j) rows[j] = rows[count - 1];
}

// Row r of the tile is token task.first + r / groups, head task.kv_head * groups + r % groups.
template <typename T>
void attend(const T* q, const T* k_pool, const T* v_pool, T* out, const Layout& at, const Task& task,
            const Knobs& knobs, Scratch& scratch) {
  const int64_t groups = at.groups(), rows = (task.last - task.first) * groups;
  const auto offset = [&](int64_t row, int64_t width) {
    return ((task.first + row / groups) * at.heads + task.kv_head * groups + row % groups) * width;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const T* source = q + offset(r, at.width);
    for (int64_t d = 0; d < at.width; ++d) {
      scratch.queries[r * at.width + d] = static_cast<float>(source[d]) * knobs.scale;
    }
  }
  std::fill_n(scratch.out.data(), rows * at.value_width, 0.0f);
  std::fill_n(scratch.top.data(), rows, kLowest);
  std::fill_n(scratch.sum.data(), rows, 0.0f);

  const int64_t end = task.position + (task.last - task.first);  // one past the last key that a row sees
  const int64_t past = at.past(task.request), nearest = at.tree == nullptr ? task.position : past;
  const int64_t begin = knobs.first(nearest);
  for (int64_t start = begin; start < end; start += kTileKeys) {
    const int64_t count = std::min<int64_t>(kTileKeys, end - start);
    find_rows(k_pool, at.width, at, task, start, count, scratch.keys, scratch.key_rows);
    find_rows(v_pool, at.value_width, at, task, start, count, scratch.values, scratch.value_rows);
    tile().scores(scratch.queries.data(), rows, scratch.key_rows.data(), count, at.width, scratch.scores.data());
    if (knobs.softcap > 0) tile().cap(scratch.scores.data(), rows, knobs.softcap);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t own = task.position - past + r / groups, position = past + at.depth(task.request, own);
      const int64_t from = std::max<int64_t>(0, knobs.first(position) - start);
      const int64_t to = std::clamp<int64_t>(past + own + 1 - start, 0, count);
      float* scores = scratch.scores.data() + r * kTileKeys;
      std::fill(scores, scores + std::min(from, to), -FLT_MAX);
      std::fill(scores + to, scores + kTileKeys, -FLT_MAX);
      if (at.tree == nullptr) continue;
      for (int64_t key = std::max(start, past); key < start + to; ++key) {
        const bool near = past + at.depth(task.request, key - past) >= knobs.first(position);
        if (!near || !at.sees(task.request, own, key - past)) scores[key - start] = -FLT_MAX;
      }
    }
    tile().soften(scratch.scores.data(), rows, scratch.top.data(), scratch.sum.data(), scratch.out.data(),
                  at.value_width);
    tile().accumulate(scratch.scores.data(), rows, scratch.value_rows.data(), count, at.value_width,
                      scratch.out.data());
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* target = out + offset(r, at.value_width);
    const float share = 1.0f / scratch.sum[r];
    for (int64_t d = 0; d < at.value_width; ++d) {
      target[d] = static_cast<T>(scratch.out[r * at.value_width + d] * share);
    }
  }
}

Tensor attend_paged(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_pool, Tensor& v_pool,
                        const Tensor& slot_mapping, const Tensor& block_tables, const Tensor& context_lens,
                        const Tensor& cu_seqlens, const int64_t* tree, double scale, int64_t window, double softcap) {
  check_inputs(q, k, v, k_pool, v_pool, slot_mapping, block_tables, context_lens, cu_seqlens);
  const auto queries = q.contiguous(), slots = slot_mapping.contiguous(), tables = block_tables.contiguous();
  const auto lengths = context_lens.contiguous(), starts = cu_seqlens.contiguous();
  const Layout layout{q.size(0), q.size(1), k.size(1), q.size(2), v.size(2), k_pool.size(1), k_pool.size(0),
                      tables.size(1), tables.size(0), tables.const_data_ptr<int32_t>(),
                      lengths.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(), tree};
  check_tables(layout, slots.const_data_ptr<int64_t>());
  if (tree != nullptr) check_tree(layout);
  write_pool(k, k_pool, slots.const_data_ptr<int64_t>());
  write_pool(v, v_pool, slots.const_data_ptr<int64_t>());

  auto out = at::empty({layout.tokens, layout.heads, layout.value_width}, v.options());
  const auto tasks = cut(layout, slots.const_data_ptr<int64_t>());
  const Knobs knobs{static_cast<float>(scale), window, static_cast<float>(softcap)};
  const int64_t rows = std::max<int64_t>(kMaxRows, layout.groups());
  const auto compute = [&](auto zero) {
    using T = decltype(zero);
    const auto *from = queries.const_data_ptr<T>(), *keys = k_pool.const_data_ptr<T>();
    const auto* values = v_pool.const_data_ptr<T>();
    auto* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(rows, layout.width, layout.value_width);
      for (int64_t i = begin; i < end; ++i) attend(from, keys, values, to, layout, tasks[i], knobs, scratch);
    });
  };
  switch (v.scalar_type()) {
    case at::kFloat: compute(float{}); break;
    case at::kBFloat16: compute(c10::BFloat16{}); break;
    case at::kHalf: compute(c10::Half{}); break;
    default: TORCH_CHECK(false, "paged attention has no kernel for ", v.scalar_type());
  }
  clear_padding(out, slots.const_data_ptr<int64_t>());
  return out;
}

}  // namespace
}  // namespace optc
