// The function of few.h as plain loops over vector types of the compiler. This file is compiled once for every instruction
// set, with OPTC_FEW naming the table; it must not define anything that the linker could share between them, so everything
// is in an unnamed namespace and nothing of the standard library is instantiated.

#include "few.h"

#define OPTC_INLINE inline __attribute__((always_inline))
#define OPTC_UNROLL _Pragma("GCC unroll 8")  // arrays of accumulators become registers only when unrolled

namespace optc {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kAtATime = 8;         // rows of activations whose sums fit registers
constexpr int64_t kWeightsAtATime = 8;  // rows of the weight that stay in the first cache for all rows of activations
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

OPTC_INLINE Floats load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

// All `Rows` rows of x with `Weights` rows of the weight.
template <int Rows, int Weights>
OPTC_INLINE void dots(const float* x, int64_t columns, const float* weight, int64_t count, const float* bias,
                      float* out) {
  Floats sums[Rows][Weights] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    Floats w[Weights];
    OPTC_UNROLL for (int n = 0; n < Weights; ++n) {
      w[n] = load(weight + n * columns + i);
      __builtin_prefetch(weight + (n + Weights) * columns + i);  // what comes next
    }
    OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
      const Floats value = load(x + r * columns + i);
      OPTC_UNROLL for (int n = 0; n < Weights; ++n) sums[r][n] += value * w[n];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int n = 0; n < Weights; ++n) {
      float sum = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[r][n][lane];
      for (int64_t k = i; k < columns; ++k) sum += x[r * columns + k] * weight[n * columns + k];
      out[r * count + n] = bias == nullptr ? sum : sum + bias[n];
    }
  }
}

// As many sums at a time as hide how long one takes, and as registers hold.
template <int Rows>
void rows_of(const float* x, int64_t columns, const float* weight, int64_t first, int64_t last, int64_t count,
             const float* bias, float* out) {
  constexpr int kWeights = Rows == 1 ? 8 : Rows <= 3 ? 4 : Rows <= 6 ? 2 : 1;
  const auto at = [&](int64_t n) { return bias == nullptr ? nullptr : bias + n; };
  int64_t n = first;
  for (; n + kWeights <= last; n += kWeights) {
    dots<Rows, kWeights>(x, columns, weight + n * columns, count, at(n), out + n);
  }
  for (; n < last; ++n) dots<Rows, 1>(x, columns, weight + n * columns, count, at(n), out + n);
}

void some_rows(const float* x, int64_t rows, int64_t columns, const float* weight, int64_t first, int64_t last,
               int64_t count, const float* bias, float* out) {
  switch (rows) {
    case 1: return rows_of<1>(x, columns, weight, first, last, count, bias, out);
    case 2: return rows_of<2>(x, columns, weight, first, last, count, bias, out);
    case 3: return rows_of<3>(x, columns, weight, first, last, count, bias, out);
    case 4: return rows_of<4>(x, columns, weight, first, last, count, bias, out);
    case 5: return rows_of<5>(x, columns, weight, first, last, count, bias, out);
    case 6: return rows_of<6>(x, columns, weight, first, last, count, bias, out);
    case 7: return rows_of<7>(x, columns, weight, first, last, count, bias, out);
    default: return rows_of<8>(x, columns, weight, first, last, count, bias, out);
  }
}

void multiply(const float* x, int64_t rows, int64_t columns, const float* weight, int64_t first, int64_t last,
              int64_t count, const float* bias, float* out) {
  const int64_t parts = (rows + kAtATime - 1) / kAtATime, size = (rows + parts - 1) / parts;
  const int64_t step = parts == 1 ? last - first : kWeightsAtATime;
  for (int64_t n = first; n < last; n += step) {
    const int64_t end = n + step < last ? n + step : last;
    for (int64_t row = 0; row < rows; row += size) {
      const int64_t some = row + size < rows ? size : rows - row;
      some_rows(x + row * columns, some, columns, weight, n, end, count, bias, out + row * count);
    }
  }
}

}  // namespace

const Few OPTC_FEW = {multiply};

}  // namespace optc
