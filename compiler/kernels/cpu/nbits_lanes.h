// Vectors of one number per row of a tile, and what is read from memory into them. Each file that includes this is
// compiled for one instruction set, so everything is in an unnamed namespace and nothing of the standard library is
// instantiated: the linker must not share code between instruction sets.
#pragma once

#include "nbits.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OPTC_INLINE inline __attribute__((always_inline))
#if defined(__AVX2__)
#define OPTC_UNROLL _Pragma("GCC unroll 16")  // arrays of accumulators become registers only when unrolled
#else
#define OPTC_UNROLL _Pragma("GCC unroll 1")  // too few registers: it would only make the code long
#endif

#define OPTC_ROLL _Pragma("GCC unroll 1")

namespace optc {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
constexpr int kWide = 4;  // tiles beside each other where rows are many: registers allow it
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kWide = 1;
#else
constexpr int kLanes = 4;
constexpr int kWide = 1;
#endif
constexpr int kParts = kTileRows / kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <class Vector>
OPTC_INLINE Vector load(const void* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class Vector>
OPTC_INLINE void store(void* to, Vector value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// -- numbers in memory -------------------------------------------------------------------------------------------

OPTC_INLINE Floats widen_half(const void* from) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  Floats value = {};
  for (int i = 0; i < kLanes; ++i) {
    _Float16 half;
    __builtin_memcpy(&half, static_cast<const char*>(from) + 2 * i, 2);
    value[i] = static_cast<float>(half);
  }
  return value;
#endif
}

// Numbers [at, at + kLanes) as floats.
OPTC_INLINE Floats numbers(const Numbers& from, int64_t at) {
  const char* data = static_cast<const char*>(from.data);
  if (from.type == c10::ScalarType::Float) return load<Floats>(data + 4 * at);
  if (from.type == c10::ScalarType::Half) return widen_half(data + 2 * at);
  return reinterpret_cast<Floats>(__builtin_convertvector(load<Shorts>(data + 2 * at), Words) << 16);
}

OPTC_INLINE float number(const Numbers& from, int64_t at) {
  const char* data = static_cast<const char*>(from.data);
  if (from.type == c10::ScalarType::Float) return load<float>(data + 4 * at);
  if (from.type == c10::ScalarType::Half) return static_cast<float>(load<_Float16>(data + 2 * at));
  const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(data + 2 * at)) << 16;
  return load<float>(&bits);
}

// The nearest bfloat16, ties to even; NaN stays NaN.
OPTC_INLINE uint16_t bfloat16(float value) {
  const uint32_t bits = load<uint32_t>(&value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

OPTC_INLINE void put(void* to, c10::ScalarType type, int64_t at, const float* values, int64_t count) {
  char* data = static_cast<char*>(to);
  if (type == c10::ScalarType::Float && count == kTileRows) {
    __builtin_memcpy(data + 4 * at, values, 4 * kTileRows);
  } else if (type == c10::ScalarType::Float) {
    for (int64_t i = 0; i < count; ++i) store<float>(data + 4 * (at + i), values[i]);
  } else if (type == c10::ScalarType::Half) {
    for (int64_t i = 0; i < count; ++i) store<_Float16>(data + 2 * (at + i), static_cast<_Float16>(values[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) store<uint16_t>(data + 2 * (at + i), bfloat16(values[i]));
  }
}

// -- codes -------------------------------------------------------------------------------------------------------

template <int Bits>
struct Codes {
  static constexpr int kColumns = block_columns(Bits);
  static constexpr int kBytes = block_bytes(Bits);
  static constexpr int kSteps = Bits == 3 ? 2 : 1;  // halves of a block, unpacked one by one
  static constexpr int kQuads = kColumns / 4 / kSteps;

  // The quads of a step, for one part of the rows: four codes in each lane, a byte each.
  static OPTC_INLINE void unpack(const uint8_t* block, int step, Words (&quads)[kQuads]) {
    const Words packed = load<Words>(block + 64 * step);
    if constexpr (Bits == 8) {
      quads[0] = packed;
    } else {
      constexpr int kWidth = Bits == 3 ? 2 : Bits;
      constexpr uint32_t kMask = 0x01010101u * ((1 << kWidth) - 1);
      OPTC_UNROLL for (int i = 0; i < kQuads; ++i) quads[i] = (packed >> (kWidth * i)) & kMask;
    }
    if constexpr (Bits == 3) {
      const Words high = load<Words>(block + 128) >> (4 * step);
      OPTC_UNROLL for (int i = 0; i < kQuads; ++i) quads[i] |= ((high >> i) & 0x01010101u) << 2;
    }
  }
};

// Zero points of a part of a tile, 0 with a table.
OPTC_INLINE Ints zeros(const Weight& w, int64_t at) {
  if (w.table != nullptr) return Ints{};
  if (w.zero == nullptr) return Ints{} + (1 << (w.bits - 1));
  return __builtin_convertvector(load<Bytes>(w.zero + at), Ints);
}

}  // namespace
}  // namespace optc
