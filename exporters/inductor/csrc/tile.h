// Arithmetic on one tile: rows of queries against up to kTileKeys keys. Plain loops over GCC vector types;
// on x86 each function is compiled twice, and the loader picks the AVX2 one where the machine has it.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define OPTC_CLONES __attribute__((target_clones("arch=x86-64-v3", "default"), noinline))
#else
#define OPTC_CLONES
#endif
#define OPTC_INLINE static inline __attribute__((always_inline))

namespace optc {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kMaxRows = 32;
constexpr float kLowest = -FLT_MAX / 2;  // the maximum over no key: a masked score stays far below it

constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Everything goes through memory and references: passing vectors by value depends on the instruction set.
OPTC_INLINE void load(const float* from, Floats& value) { std::memcpy(&value, from, sizeof value); }
OPTC_INLINE void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }
OPTC_INLINE float total(const Floats& value) {
  float sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// sums[i] = the sum of values[i], for eight vectors at once.
OPTC_INLINE void totals(const Floats (&values)[8], Floats& sums) {
  Floats pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const Floats &a = values[2 * i], &b = values[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats &a = pairs[2 * i], &b = pairs[2 * i + 1];
    quads[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  sums = __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(quads[0], quads[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// value = e^value, for any float up to 88; relative error below 2e-7. Range reduction by ln 2 in two parts and a
// polynomial of degree 6 (Cephes, expf); below -87 the result is 0.
OPTC_INLINE void exponential(Floats& value) {
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
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  value = underflow ? Floats{} : p * power;
}

// scores[r][j] = queries[r] . keys[j] for eight pairs: Rows rows and 8 / Rows keys.
template <int Rows>
OPTC_INLINE void dots(const float* queries, const float* const* keys, int64_t width, float* scores) {
  constexpr int Keys = 8 / Rows;
  Floats products[8] = {}, sums;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    Floats k[Keys], q;
    for (int j = 0; j < Keys; ++j) load(keys[j] + d, k[j]);
    for (int r = 0; r < Rows; ++r) {
      load(queries + r * width + d, q);
      for (int j = 0; j < Keys; ++j) products[r * Keys + j] += q * k[j];
    }
  }
  totals(products, sums);
  for (int r = 0; r < Rows; ++r) {
    for (int j = 0; j < Keys; ++j) {
      float sum = sums[r * Keys + j];
      for (int64_t i = d; i < width; ++i) sum += queries[r * width + i] * keys[j][i];
      scores[r * kTileKeys + j] = sum;
    }
  }
}

// queries [rows][width], keys: kTileKeys pointers to [width] -> scores [rows][kTileKeys]. Scores are made for
// `count` keys, rounded up to 8: the pointers beyond `count` must be readable.
OPTC_CLONES inline void scores_of(const float* queries, int64_t rows, const float* const* keys, int64_t count,
                                  int64_t width, float* scores) {
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const float* query = queries + r * width;
    for (int64_t j = 0; j < count; j += 4) dots<2>(query, keys + j, width, scores + r * kTileKeys + j);
  }
  for (int64_t j = 0; r < rows && j < count; j += 8) {
    dots<1>(queries + r * width, keys + j, width, scores + r * kTileKeys + j);
  }
}

// scores = softcap * tanh(scores / softcap), tanh(x) = 1 - 2 / (e^2x + 1).
OPTC_CLONES inline void cap(float* scores, int64_t rows, float softcap) {
  for (int64_t i = 0; i < rows * kTileKeys; i += kLanes) {
    Floats x;
    load(scores + i, x);
    x = x * (2.0f / softcap);
    x = x > 80.0f ? Floats{} + 80.0f : x;  // tanh is 1 long before e^x overflows
    exponential(x);
    store(scores + i, softcap - (2.0f * softcap) / (x + 1.0f));
  }
}

// One step of the online softmax: scores become weights relative to the new maximum `top`; `sum` and `out`
// [rows][width], which were relative to the old one, follow.
OPTC_CLONES inline void soften(float* scores, int64_t rows, float* top, float* sum, float* out, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * kTileKeys;
    Floats x, highest = Floats{} + top[r], added = {};
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      load(row + j, x);
      highest = x > highest ? x : highest;
    }
    float peak = highest[0];
    for (int64_t i = 1; i < kLanes; ++i) peak = std::max(peak, highest[i]);
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      load(row + j, x);
      x = x - peak;
      exponential(x);
      added += x;
      store(row + j, x);
    }
    Floats factor = Floats{} + (top[r] - peak);
    exponential(factor);
    top[r] = peak;
    sum[r] = sum[r] * factor[0] + total(added);
    if (factor[0] == 1.0f) continue;
    for (int64_t d = 0; d < width; ++d) out[r * width + d] *= factor[0];
  }
}

// out[r] += sum over j of weights[r][j] * values[j], for Rows rows and Parts * kLanes columns.
template <int Rows, int Parts>
OPTC_INLINE void blend(const float* weights, const float* const* values, int64_t count, int64_t offset,
                       int64_t width, float* out) {
  Floats sums[Rows][Parts], v[Parts];
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < Parts; ++i) load(out + r * width + offset + i * kLanes, sums[r][i]);
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int i = 0; i < Parts; ++i) load(values[j] + offset + i * kLanes, v[i]);
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < Parts; ++i) sums[r][i] += weights[r * kTileKeys + j] * v[i];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < Parts; ++i) store(out + r * width + offset + i * kLanes, sums[r][i]);
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

// weights [rows][kTileKeys], values: `count` pointers to [width] -> added to out [rows][width].
OPTC_CLONES inline void accumulate(const float* weights, int64_t rows, const float* const* values, int64_t count,
                                   int64_t width, float* out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    blend_row<4, 2>(weights + r * kTileKeys, values, count, width, out + r * width);
  }
  for (; r < rows; ++r) blend_row<1, 8>(weights + r * kTileKeys, values, count, width, out + r * width);
}

// Numbers of a pool of 16 bits as floats.
OPTC_CLONES inline void widen(const c10::BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].x) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}
OPTC_CLONES inline void widen(const c10::Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    _Float16 value;
    std::memcpy(&value, from + i, sizeof value);
    to[i] = static_cast<float>(value);
  }
}

}  // namespace optc
