// optc::paged_tree_attention_ on the CPU; see paged.h.

#include "torch_headers.h"

#include "paged.h"

namespace optc {
namespace {

Tensor paged_tree_attention_(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& k_pool, Tensor& v_pool,
                             const Tensor& slot_mapping, const Tensor& block_tables, const Tensor& context_lens,
                             const Tensor& cu_seqlens, const Tensor& tree, double scale, int64_t window,
                             double softcap) {
  TORCH_CHECK(tree.scalar_type() == at::kLong && tree.numel() == q.size(0), "tree must be int64, one for each token");
  const auto bits = tree.contiguous();
  return attend_paged(q, k, v, k_pool, v_pool, slot_mapping, block_tables, context_lens, cu_seqlens,
                      bits.const_data_ptr<int64_t>(), scale, window, softcap);
}

}  // namespace
}  // namespace optc

// OPTC_SCHEMA is the schema of the op in Python, passed in when this is compiled. A process that also has the dialect
// in Python has it already: a second definition would abort.
TORCH_LIBRARY_FRAGMENT(optc, library) {
  if (!c10::Dispatcher::singleton().findSchema({"optc::paged_tree_attention_", ""})) {
    library.def(OPTC_SCHEMA);
  }
}

TORCH_LIBRARY_IMPL(optc, CPU, library) { library.impl("paged_tree_attention_", &optc::paged_tree_attention_); }
