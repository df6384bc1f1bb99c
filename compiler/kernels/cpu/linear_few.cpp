// optc::linear_few on the CPU: a linear in float32 whose weight is read once for up to kFewRows rows of activations, where
// BLAS reads it once for each of them, or packs it. More rows are left to BLAS.

#include "torch_headers.h"

#include <algorithm>
#include <optional>

#include "few.h"

namespace optc {
namespace {

using at::Tensor;

constexpr int64_t kLeastWork = 1 << 17;  // products that are worth a thread

const Few& kernels() {
#ifdef OPTC_HAS_AVX2
  static const bool wide = at::get_cpu_capability() != "DEFAULT";
  return wide ? few_avx2 : few_baseline;
#else
  return few_baseline;
#endif
}

Tensor linear_few(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat, "optc::linear_few takes float32");
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "x must end in ", weight.size(-1),
              " columns");
  const int64_t count = weight.size(0), columns = weight.size(1);
  TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == at::kFloat && bias->dim() == 1 && bias->numel() == count),
              "bias must be float32 [", count, "]");
  const auto rows = x.contiguous().view({-1, columns});
  auto shape = x.sizes().vec();
  shape.back() = count;
  if (rows.size(0) > kFewRows) {
    const auto turned = weight.t();
    return (bias.has_value() ? at::addmm(*bias, rows, turned) : at::mm(rows, turned)).view(shape);
  }
  auto out = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (rows.size(0) == 0 || count == 0) return out;
  const auto whole = weight.contiguous();
  const auto shift = bias.has_value() ? bias->contiguous() : Tensor();
  const float *from = rows.const_data_ptr<float>(), *by = whole.const_data_ptr<float>();
  const float* more = shift.defined() ? shift.const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(8, kLeastWork / std::max<int64_t>(1, rows.size(0) * columns));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    kernels().multiply(from, rows.size(0), columns, by, begin, end, count, more, to);
  });
  return out;
}

}  // namespace
}  // namespace optc

// OPTC_SCHEMA is the schema of the op in Python, passed in when this is compiled. A process that also has the dialect
// in Python has it already: a second definition would abort.
TORCH_LIBRARY_FRAGMENT(optc, library) {
  if (!c10::Dispatcher::singleton().findSchema({"optc::linear_few", ""})) {
    library.def(OPTC_SCHEMA);
  }
}

TORCH_LIBRARY_IMPL(optc, CPU, library) { library.impl("linear_few", &optc::linear_few); }
