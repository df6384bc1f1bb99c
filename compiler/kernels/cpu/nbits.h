// Products of activations with weights of 2, 3, 4 or 8 bits, on tiles of 16 rows of the weight.
//
// Layout of the codes. A tile holds kTileRows rows. K is cut into segments that share every scale; a segment is
// filled up with zeros to whole blocks. Four neighbours along K of all rows of a tile are a quad: 64 bytes, row by
// row. A block packs the quads of block_columns(bits) neighbours into as few bytes:
//
//     8 bits   1 quad    as it is
//     4 bits   2 quads   quad i in the bits 4i of each byte
//     2 bits   4 quads   quad i in the bits 2i
//     3 bits   8 quads   the low two bits of quads 0-3 and of quads 4-7 as above, then the high bit of quad i in bit i
//
// A 32-bit lane then holds the four codes of one row, which is what integer dot products of four bytes take. Scales
// and zero points are [group][row]: those of a tile are neighbours.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace optc {

constexpr int64_t kTileRows = 16;
constexpr int64_t block_columns(int64_t bits) { return bits == 3 ? 32 : 32 / bits; }
constexpr int64_t block_bytes(int64_t bits) { return kTileRows * block_columns(bits) * bits / 8; }

// Stored numbers: float, bfloat16 or half.
struct Numbers {
  const void* data;
  c10::ScalarType type;
};

struct Weight {
  int64_t bits, rows, columns;        // N and K
  int64_t segment, segments, blocks;  // columns of a segment, segments of a row, blocks of a segment
  int64_t group;                      // segments that share a scale
  int64_t padded_rows;                // rows rounded up to whole tiles
  const uint8_t* codes;
  Numbers scale;
  const uint8_t* zero;  // nullptr: 2^(bits - 1); unused with a table
  const float* table;   // 16 values of the codes, or nullptr: the codes themselves
  int64_t padded_columns() const { return segments * blocks * block_columns(bits); }
  int64_t tile_bytes() const { return segments * blocks * block_bytes(bits); }
};

// Rows of activations with each segment filled up with zeros, as floats or rounded to int8.
struct Activations {
  const float* values;   // [rows][padded_columns]; nullptr when rounded
  const float* sums;     // [rows][segments]
  const int8_t* codes;   // [rows][padded_columns]
  const int32_t* totals; // sums of codes, [rows][segments]
  const float* scales;   // [rows][segments]
};

struct Output {
  void* data;  // [rows][weight.rows]
  c10::ScalarType type;
  const float* bias;  // [padded_rows] or nullptr
};

// The functions of nbits.cpp, compiled for one instruction set.
struct Nbits {
  // K numbers -> floats, each segment filled up, and the sum of each segment.
  void (*widen)(const Numbers& from, const Weight& weight, float* values, float* sums);
  // K floats as made by `widen` -> codes = round(value / scale), scale = max|value| / 127 of each segment, or of all
  // when `whole`, and the sum of the codes of each segment.
  void (*round)(const float* values, const Weight& weight, bool whole, int8_t* codes, float* scales,
                int32_t* totals);
  // out[row][n] for tiles [first, last) and rows [begin, end).
  void (*product)(const Weight& weight, const Activations& x, int64_t first, int64_t last, int64_t begin,
                  int64_t end, const Output& out);
  // Tile -> [columns][stride] numbers of `type`, transposed: values[k * stride + row].
  void (*dequantize)(const Weight& weight, int64_t tile, void* values, c10::ScalarType type, int64_t stride);
};

extern const Nbits nbits_baseline;
extern const Nbits nbits_avx2;    // only on x86
extern const Nbits nbits_avx512;  // with VNNI; only on x86

}  // namespace optc
