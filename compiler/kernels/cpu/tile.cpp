// The functions of tile.h as plain loops over vector types of the compiler. This file is compiled once for every
// instruction set, with OPTC_TILE naming the table; it must not define anything that the linker could share
// between them, so everything is in an unnamed namespace and nothing of the standard library is instantiated.

#include "tile.h"

#include <cstring>

#define OPTC_INLINE inline __attribute__((always_inline))
#define OPTC_UNROLL _Pragma("GCC unroll 8")  // arrays of accumulators become registers only when unrolled

namespace optc {
namespace {

constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

OPTC_INLINE Floats load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
OPTC_INLINE void store(float* to, Floats value) { *reinterpret_cast<Unaligned*>(to) = value; }
OPTC_INLINE float total(Floats value) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// The sum of each of eight vectors.
OPTC_INLINE Floats totals(const Floats (&values)[8]) {
  Floats pairs[4], quads[2];
  OPTC_UNROLL for (int i = 0; i < 4; ++i) {
    const Floats &a = values[2 * i], &b = values[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  OPTC_UNROLL for (int i = 0; i < 2; ++i) {
    const Floats &a = pairs[2 * i], &b = pairs[2 * i + 1];
    quads[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// e^value for any float up to 88; relative error below 2e-7. Range reduction by ln 2 in two parts and a
// polynomial (Cephes, expf); below -87 the result is 0.
OPTC_INLINE Floats exponential(Floats value) {
  const Floats low = Floats{} - 87.0f;
  const Ints underflow = value < low;
  Floats x = underflow ? low : value;
  const Floats shifter = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * 1.44269504f + shifter) - shifter;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = x * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  const Floats power = reinterpret_cast<Floats>((__builtin_convertvector(n, Ints) + 127) << 23);
  return underflow ? Floats{} : p * power;
}

// scores[r][j] = queries[r] . keys[j] for eight pairs: Rows rows and 8 / Rows keys.
template <int Rows>
OPTC_INLINE void dots(const float* queries, const float* const* keys, int64_t width, float* scores) {
  constexpr int Keys = 8 / Rows;
  Floats products[8] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Floats k[Keys];
    OPTC_UNROLL for (int j = 0; j < Keys; ++j) k[j] = load(keys[j] + d);
    OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
      const Floats q = load(queries + r * width + d);
      OPTC_UNROLL for (int j = 0; j < Keys; ++j) products[r * Keys + j] += q * k[j];
    }
  }
  const Floats sums = totals(products);
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Keys; ++j) {
      float sum = sums[r * Keys + j];
      for (int64_t i = d; i < width; ++i) sum += queries[r * width + i] * keys[j][i];
      scores[r * kTileKeys + j] = sum;
    }
  }
}

void scores_of(const float* queries, int64_t rows, const float* const* keys, int64_t count, int64_t width,
               float* scores) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const float* query = queries + r * width;
    for (int64_t j = 0; j < count; j += 4) dots<2>(query, keys + j, width, scores + r * kTileKeys + j);
  }
  for (int64_t j = 0; r < rows && j < count; j += 8) {
    dots<1>(queries + r * width, keys + j, width, scores + r * kTileKeys + j);
  }
}

// tanh x = 1 - 2 / (e^2x + 1); near 0, where that cancels, a polynomial (Cephes, tanhf).
OPTC_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats capped = x > 20.0f ? Floats{} + 20.0f : x;  // tanh is 1 long before e^x overflows
  const Floats far = 1.0f - 2.0f / (exponential(capped * 2.0f) + 1.0f);
  const Floats square = x * x;
  Floats p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return square < 0.390625f ? x + x * square * p : far;
}

void cap(float* scores, int64_t rows, float softcap) {
  for (int64_t i = 0; i < rows * kTileKeys; i += kLanes) {
    store(scores + i, softcap * hyperbolic_tangent(load(scores + i) / softcap));
  }
}

void soften(float* scores, int64_t rows, float* top, float* sum, float* out, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kTileKeys;
    Floats highest = Floats{} + top[r], added = {};
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      const Floats x = load(row + j);
      highest = x > highest ? x : highest;
    }
    float peak = highest[0];
    for (int64_t i = 1; i < kLanes; ++i) peak = highest[i] > peak ? highest[i] : peak;
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      const Floats weight = exponential(load(row + j) - peak);
      added += weight;
      store(row + j, weight);
    }
    const float factor = exponential(Floats{} + (top[r] - peak))[0];
    top[r] = peak;
    sum[r] = sum[r] * factor + total(added);
    if (factor == 1.0f) continue;
    for (int64_t d = 0; d < width; ++d) out[r * width + d] *= factor;
  }
}

// out[r] += sum over j of weights[r][j] * values[j], for Rows rows and Parts * kLanes columns.
template <int Rows, int Parts>
OPTC_INLINE void blend(const float* weights, const float* const* values, int64_t count, int64_t offset,
                       int64_t width, float* out) {
  Floats sums[Rows * Parts];
  OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
    OPTC_UNROLL for (int i = 0; i < Parts; ++i) sums[r * Parts + i] = load(out + r * width + offset + i * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values[j] + offset;
    OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
      const float weight = weights[r * kTileKeys + j];
      OPTC_UNROLL for (int i = 0; i < Parts; ++i) sums[r * Parts + i] += weight * load(value + i * kLanes);
    }
  }
  OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
    OPTC_UNROLL for (int i = 0; i < Parts; ++i) store(out + r * width + offset + i * kLanes, sums[r * Parts + i]);
  }
}

template <int Rows, int Parts>
OPTC_INLINE void blend_row(const float* weights, const float* const* values, int64_t count, int64_t width,
                           float* out) {
  int64_t d = 0;
  for (; d + Parts * kLanes <= width; d += Parts * kLanes) {
    blend<Rows, Parts>(weights, values, count, d, width, out);
  }
  for (; d + kLanes <= width; d += kLanes) blend<Rows, 1>(weights, values, count, d, width, out);
  for (; d < width; ++d) {
    for (int r = 0; r < Rows; ++r) {
      for (int64_t j = 0; j < count; ++j) out[r * width + d] += weights[r * kTileKeys + j] * values[j][d];
    }
  }
}

void accumulate(const float* weights, int64_t rows, const float* const* values, int64_t count, int64_t width,
                float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    blend_row<4, 2>(weights + r * kTileKeys, values, count, width, out + r * width);
  }
  for (; r < rows; ++r) blend_row<1, 8>(weights + r * kTileKeys, values, count, width, out + r * width);
}

void widen_bfloat16(const c10::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}
void widen_half(const c10::Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    _Float16 value;
    std::memcpy(&value, from + i, sizeof value);
    to[i] = static_cast<float>(value);
  }
}

}  // namespace

const Tile OPTC_TILE = {scores_of, cap, soften, accumulate, widen_bfloat16, widen_half};

}  // namespace optc
