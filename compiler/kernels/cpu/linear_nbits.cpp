// optc::linear_nbits on the CPU: x times a weight whose codes of 2 to 8 bits stay packed until they are multiplied.
//
// A few rows of activations: tiles of the weight are spread over threads, each code is read once for up to four
// rows. Many rows of activations that are not rounded: a panel of the weight at a time is dequantized, and torch
// multiplies.

#include "torch_headers.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "nbits.h"
#include "nbits_matrix.h"

namespace optc {
namespace {

using at::Tensor;

constexpr int64_t kPanelRows = 512;   // rows of the weight that are dequantized at a time
constexpr int64_t kManyRows = 24;     // of activations, from which on that pays
constexpr int64_t kRowsAtATime = 64;  // of activations, which stay in the cache for all tiles
constexpr int64_t kTilesAtATime = 4;
constexpr int64_t kMatrixRows = 8;    // of activations, from which on matrix units pay

const Nbits& kernels() {
#ifdef OPTC_HAS_AVX2
  static const Nbits& chosen = [] () -> const Nbits& {
    const auto capability = at::get_cpu_capability();
    if (capability == "DEFAULT") return nbits_baseline;
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    return capability.rfind("AVX512", 0) == 0 && vnni ? nbits_avx512 : nbits_avx2;
  }();
  return chosen;
#else
  return nbits_baseline;
#endif
}

// The matrix units' product where there are such units and the product is for them, or nullptr.
const NbitsMatrix* matrix(const Weight& weight, int64_t rows) {
#ifdef OPTC_HAS_AVX2
  const bool fits = rows >= kMatrixRows && &kernels() == &nbits_avx512 && nbits_matrix_amx.room(weight, rows) > 0;
  return fits && nbits_matrix_amx.ready() ? &nbits_matrix_amx : nullptr;
#else
  return nullptr;
#endif
}

bool is_number(const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Sizes, checked: a wrong one would read foreign memory.
Weight describe(const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
                const std::optional<Tensor>& table, int64_t bits, int64_t group_size, int64_t activation_group,
                int64_t columns, int64_t rows) {
  TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, not ", bits);
  TORCH_CHECK(columns > 0 && rows > 0, "a weight of ", rows, " x ", columns);
  TORCH_CHECK(group_size >= 0 && activation_group >= -1, "negative groups");
  const int64_t group = group_size > 0 ? group_size : columns;
  const int64_t segment = activation_group > 0 ? std::min(activation_group, group) : group;
  TORCH_CHECK(columns % group == 0 && group % segment == 0 && (activation_group <= 0 || segment == activation_group),
              "groups of ", group_size, " and ", activation_group, " do not divide ", columns);
  TORCH_CHECK(segment <= 65536 || activation_group < 0, "sums of more than 65536 products may overflow");
  Weight weight{};
  weight.bits = bits;
  weight.rows = rows;
  weight.columns = columns;
  weight.segment = segment;
  weight.segments = columns / segment;
  weight.blocks = up(segment, block_columns(bits)) / block_columns(bits);
  weight.group = group / segment;
  weight.padded_rows = up(rows, kTileRows);
  const int64_t groups = columns / group;
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.dim() == 2 &&
                  packed.size(0) == weight.padded_rows / kTileRows && packed.size(1) == weight.tile_bytes(),
              "packed must be uint8 [", weight.padded_rows / kTileRows, ", ", weight.tile_bytes(), "]");
  TORCH_CHECK(is_number(scale) && scale.is_contiguous() && scale.dim() == 2 && scale.size(0) == groups &&
                  scale.size(1) == weight.padded_rows,
              "scale must be floating-point [", groups, ", ", weight.padded_rows, "]");
  weight.codes = packed.const_data_ptr<uint8_t>();
  weight.scale = {scale.const_data_ptr(), scale.scalar_type()};
  if (zero.has_value()) {
    TORCH_CHECK(zero->scalar_type() == at::kByte && zero->is_contiguous() && zero->sizes() == scale.sizes(),
                "zero must be uint8 of the shape of scale");
    weight.zero = zero->const_data_ptr<uint8_t>();
  }
  if (table.has_value()) {
    TORCH_CHECK(bits < 8 && !zero.has_value() && activation_group < 0,
                "a table takes up to 4 bits, no zero point and activations as they are");
    TORCH_CHECK(table->scalar_type() == at::kFloat && table->is_contiguous() && table->numel() == 16,
                "table must be float32 [16]");
    weight.table = table->const_data_ptr<float>();
  }
  return weight;
}

struct alignas(64) Line {
  int8_t codes[64];
};

// Activations as the kernel reads them.
struct Prepared {
  std::vector<float> values, sums, scales;
  std::vector<Line> lines;  // of codes
  std::vector<int32_t> totals;

  Prepared(const Tensor& x, const Weight& weight, bool rounded, bool whole, const NbitsMatrix* units) {
    const int64_t rows = x.size(0), width = weight.padded_columns(), segments = weight.segments;
    values.resize((rounded ? 0 : rows) * width);
    sums.resize(rows * segments);
    if (rounded) {
      const int64_t room = units != nullptr ? units->room(weight, rows) : rows * width;
      lines.resize(up(room, sizeof(Line)) / sizeof(Line));
      scales.resize(rows * segments);
      totals.resize(rows * segments);
    }
    const auto* data = static_cast<const char*>(x.const_data_ptr());
    const int64_t step = x.size(1) * static_cast<int64_t>(x.element_size());
    const auto prepare = [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(rounded ? width : 0);
      std::vector<int8_t> neighbours(units != nullptr ? width : 0);
      for (int64_t r = begin; r < end; ++r) {
        float* row = rounded ? scratch.data() : values.data() + r * width;
        kernels().widen({data + r * step, x.scalar_type()}, weight, row, sums.data() + r * segments);
        if (!rounded) continue;
        int8_t* place = units != nullptr ? neighbours.data() : codes() + r * width;
        kernels().round(row, weight, whole, place, scales.data() + r * segments, totals.data() + r * segments);
        if (units != nullptr) units->place(weight, r, place, codes());
      }
    };
    if (rows < 8) prepare(0, rows);
    else at::parallel_for(0, rows, 4, prepare);
  }

  int8_t* codes() { return lines.data()->codes; }

  Activations view() const {
    const bool rounded = !lines.empty();
    return {rounded ? nullptr : values.data(), sums.data(), rounded ? lines.data()->codes : nullptr, totals.data(),
            scales.data()};
  }
};

void multiply(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias, int64_t activation_group,
              Tensor& out) {
  const auto* units = activation_group >= 0 ? matrix(weight, x.size(0)) : nullptr;
  const Prepared prepared(x, weight, activation_group >= 0, activation_group == 0, units);
  const Activations view = prepared.view();
  std::vector<float> wide;
  if (bias.has_value()) {
    const auto floats = bias->to(at::kFloat).contiguous();
    wide.assign(weight.padded_rows, 0.0f);
    std::memcpy(wide.data(), floats.const_data_ptr<float>(), weight.rows * sizeof(float));
  }
  const Output to{out.mutable_data_ptr(), out.scalar_type(), wide.empty() ? nullptr : wide.data()};
  const int64_t tiles = weight.padded_rows / kTileRows, chunks = (tiles + kTilesAtATime - 1) / kTilesAtATime;
  const auto product = units != nullptr ? units->product : kernels().product;
  const int64_t step = units != nullptr ? x.size(0) : kRowsAtATime;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < x.size(0); row += step) {
      product(weight, view, begin * kTilesAtATime, std::min(end * kTilesAtATime, tiles), row,
              std::min(row + step, x.size(0)), to);
    }
  });
}

void multiply_panels(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias, Tensor& out) {
  const auto panel = at::empty({weight.columns, std::min(kPanelRows, weight.padded_rows)}, x.options());
  const auto shift = bias.has_value() ? bias->to(x.scalar_type()) : Tensor();
  for (int64_t start = 0; start < weight.rows; start += kPanelRows) {
    const int64_t count = std::min(kPanelRows, weight.rows - start), first = start / kTileRows;
    at::parallel_for(0, (count + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        auto* place = static_cast<char*>(panel.mutable_data_ptr()) + tile * kTileRows * panel.element_size();
        kernels().dequantize(weight, first + tile, place, panel.scalar_type(), panel.size(1));
      }
    });
    auto target = out.narrow(1, start, count);
    const auto factor = panel.narrow(1, 0, count);
    if (shift.defined()) at::addmm_out(target, shift.narrow(0, start, count), x, factor);
    else at::mm_out(target, x, factor);
  }
}

Tensor linear_nbits(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero,
                    const std::optional<Tensor>& bias, const std::optional<Tensor>& table, int64_t bits,
                    int64_t group_size, int64_t activation_group, int64_t K, int64_t N) {
  const Weight weight = describe(packed, scale, zero, table, bits, group_size, activation_group, K, N);
  TORCH_CHECK(is_number(x), "optc::linear_nbits has no kernel for ", x.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == K, "x must end in ", K, " columns");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->numel() == N && is_number(*bias)),
              "bias must be floating-point [", N, "]");
  const auto rows = x.contiguous().view({-1, K});
  auto shape = x.sizes().vec();
  shape.back() = N;
  auto out = at::empty(shape, x.options().memory_format(at::MemoryFormat::Contiguous));
  auto flat = out.view({-1, N});
  if (flat.size(0) == 0) return out;
  if (activation_group < 0 && flat.size(0) >= kManyRows) multiply_panels(rows, weight, bias, flat);
  else multiply(rows, weight, bias, activation_group, flat);
  return out;
}

}  // namespace
}  // namespace optc

// OPTC_SCHEMA is the schema of the op in Python, passed in when this is compiled. A process that also has the dialect
// in Python has it already: a second definition would abort.
TORCH_LIBRARY_FRAGMENT(optc, library) {
  if (!c10::Dispatcher::singleton().findSchema({"optc::linear_nbits", ""})) {
    library.def(OPTC_SCHEMA);
  }
}

TORCH_LIBRARY_IMPL(optc, CPU, library) { library.impl("linear_nbits", &optc::linear_nbits); }
