// The functions of nbits.h. This file is compiled once for every instruction set, with OPTC_NBITS naming the table;
// it must not define anything that the linker could share between them, so everything is in an unnamed namespace
// and nothing of the standard library is instantiated.
//
// A row of a tile is a lane, so that sums need no reduction across lanes. Rounding activations to int8 in groups,
// so that products are of integers, is that of llama.cpp's Q8 blocks and of ONNX Runtime's accuracy_level 4.

#include <type_traits>

#include "nbits_lanes.h"

namespace optc {
namespace {

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
#define OPTC_PAIRS  // dot products of two are the widest that an instruction makes; see add_paired
#endif

// sums + the dot product of four unsigned codes with four signed ones, in each lane.
template <int Bits>
OPTC_INLINE Ints dot(Ints sums, Words codes, int32_t x) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                    reinterpret_cast<__m512i>(codes), _mm512_set1_epi32(x)));
#elif defined(__AVX2__)
  const __m256i four = _mm256_set1_epi32(x), c = reinterpret_cast<__m256i>(codes);
  __m256i products;
  if constexpr (Bits < 8) {  // pairs of products fit 16 bits
    products = _mm256_madd_epi16(_mm256_maddubs_epi16(c, four), _mm256_set1_epi16(1));
  } else {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd = _mm256_srai_epi16(four, 8);
    products = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(c, low), even),
                                _mm256_madd_epi16(_mm256_srli_epi16(c, 8), odd));
  }
  return sums + reinterpret_cast<Ints>(products);
#else
  OPTC_UNROLL for (int j = 0; j < 4; ++j) {
    const int32_t value = static_cast<int8_t>(static_cast<uint32_t>(x) >> (8 * j));
    sums += reinterpret_cast<Ints>((codes >> (8 * j)) & 0xffu) * value;
  }
  return sums;
#endif
}

#if defined(__AVX512VNNI__)
constexpr bool kLooksUp = true;  // a lookup is no slower than a conversion
#else
constexpr bool kLooksUp = false;
#endif
alignas(64) constexpr float kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The values of code j of each lane.
template <bool Lookup>
OPTC_INLINE Floats value(Words codes, int j, const float* table) {
  const Words index = codes >> (8 * j);
  if constexpr (!Lookup) return __builtin_convertvector(reinterpret_cast<Ints>(index & 0xffu), Floats);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Floats>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), _mm512_loadu_ps(table)));
#elif defined(__AVX2__)
  const __m256i place = reinterpret_cast<__m256i>(index);
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), place);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), place);
  return reinterpret_cast<Floats>(
      _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(place, 28))));
#else
  Floats found = {};
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i] & 15];
  return found;
#endif
}

// -- activations -------------------------------------------------------------------------------------------------

void widen(const Numbers& from, const Weight& w, float* values, float* sums) {
  const int64_t stride = w.blocks * block_columns(w.bits);
  for (int64_t s = 0; s < w.segments; ++s) {
    float* to = values + s * stride;
    const int64_t start = s * w.segment;
    Floats sum = {};
    int64_t i = 0;
    for (; i + kLanes <= w.segment; i += kLanes) {
      const Floats part = numbers(from, start + i);
      store(to + i, part);
      sum += part;
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    for (; i < w.segment; ++i) total += to[i] = number(from, start + i);
    for (; i < stride; ++i) to[i] = 0;
    sums[s] = total;
  }
}

// The largest magnitude; NaN when there is one (as integers, magnitudes are ordered and NaN is above all).
OPTC_INLINE float largest(const float* values, int64_t count) {
  Ints top = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Ints bits = load<Ints>(values + i) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  int32_t most = 0;
  for (int lane = 0; lane < kLanes; ++lane) most = top[lane] > most ? top[lane] : most;
  for (; i < count; ++i) {
    const int32_t bits = load<int32_t>(values + i) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return load<float>(&most);
}

OPTC_INLINE float scale_of(float magnitude) {
  const float scale = magnitude / 127.0f, smallest = 1.17549435e-38f;
  return scale < smallest ? smallest : scale;
}

// codes[i] = round(values[i] / scale), ties to even; count is a multiple of 4.
OPTC_INLINE int32_t round_values(const float* values, int64_t count, float scale, int8_t* codes) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Ints sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats ratio = load<Floats>(values + i) / scale;
    const Ints code = __builtin_convertvector((ratio + kShift) - kShift, Ints);
    typedef int8_t Signed __attribute__((vector_size(kLanes)));
    store(codes + i, __builtin_convertvector(code, Signed));
    sum += code;
  }
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; i < count; ++i) {
    codes[i] = static_cast<int8_t>((values[i] / scale + kShift) - kShift);
    total += codes[i];
  }
  return total;
}

void round_row(const float* values, const Weight& w, bool whole, int8_t* codes, float* scales, int32_t* totals) {
  const int64_t stride = w.blocks * block_columns(w.bits);
  const float common = whole ? scale_of(largest(values, w.segments * stride)) : 0;
  for (int64_t s = 0; s < w.segments; ++s) {
    const float* from = values + s * stride;
    scales[s] = whole ? common : scale_of(largest(from, stride));
    totals[s] = round_values(from, stride, scales[s], codes + s * stride);
  }
}

// -- products ----------------------------------------------------------------------------------------------------

enum Mode { kRounded, kConverted, kLookedUp };

template <class Vector, int Rows, int Tiles>
struct Grid {
  Vector at[Rows][Tiles][kParts];
};

// Add the products of a step of one block of one tile to the sums of `Rows` rows.
template <int Bits, Mode M, int Rows, int Tiles, class Vector, class Number>
OPTC_INLINE void add_step(const uint8_t* block, int step, int t, const Number* const (&x)[Rows], int64_t column,
                          const float* table, Grid<Vector, Rows, Tiles>& sums) {
  using C = Codes<Bits>;
  OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
    Words quads[C::kQuads];
    C::unpack(block + p * kLanes * 4, step, quads);
    OPTC_UNROLL for (int q = 0; q < C::kQuads; ++q) {
      if constexpr (M == kRounded) {
        OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
          const int32_t four = load<int32_t>(x[r] + column + 4 * q);
          sums.at[r][t][p] = dot<Bits>(sums.at[r][t][p], quads[q], four);
        }
      } else {
        OPTC_UNROLL for (int j = 0; j < 4; ++j) {
          const Floats weight = value<M == kLookedUp>(quads[q], j, table);
          OPTC_UNROLL for (int r = 0; r < Rows; ++r) sums.at[r][t][p] += weight * x[r][column + 4 * q + j];
        }
      }
    }
  }
}

#if defined(OPTC_PAIRS)
// Blocks of codes below 8 bits whose products 16 bits hold, added in pairs: (2^Bits - 1) * 127 * 2 each.
template <int Bits>
constexpr int64_t kPairedBlocks = 32767 / (((1 << Bits) - 1) * 254) / (block_columns(Bits) / 4);

// Add the products of up to so many blocks of one tile to the sums of `Rows` rows: one instruction less for each product.
template <int Bits, int Rows, int Tiles>
OPTC_INLINE void add_paired(const uint8_t* block, int64_t blocks, int t, const int8_t* const (&x)[Rows], int64_t column,
                            Grid<Ints, Rows, Tiles>& sums) {
  using C = Codes<Bits>;
  __m256i pairs[Rows][kParts] = {};
  for (int64_t b = 0; b < blocks; ++b, block += C::kBytes) {
    OPTC_ROLL for (int step = 0; step < C::kSteps; ++step, column += 4 * C::kQuads) {
      Words quads[kParts][C::kQuads];
      OPTC_UNROLL for (int p = 0; p < kParts; ++p) C::unpack(block + p * kLanes * 4, step, quads[p]);
      OPTC_UNROLL for (int q = 0; q < C::kQuads; ++q) {
        OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
          const __m256i four = _mm256_set1_epi32(load<int32_t>(x[r] + column + 4 * q));
          OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
            const __m256i products = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(quads[p][q]), four);
            pairs[r][p] = _mm256_add_epi16(pairs[r][p], products);
          }
        }
      }
    }
  }
  OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
    OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
      sums.at[r][t][p] += reinterpret_cast<Ints>(_mm256_madd_epi16(pairs[r][p], _mm256_set1_epi16(1)));
    }
  }
}
#endif

// Rows [row, row + Rows) times tiles [tile, tile + Tiles).
template <int Bits, Mode M, int Rows, int Tiles>
void multiply(const Weight& w, const Activations& in, int64_t tile, int64_t row, const Output& out) {
  constexpr bool kInt = M == kRounded;
  using Vector = std::conditional_t<kInt, Ints, Floats>;
  using Number = std::conditional_t<kInt, int8_t, float>;
  using C = Codes<Bits>;
  const float* table = w.table == nullptr ? kCodes : w.table;
  const int64_t width = w.padded_columns(), stride = w.tile_bytes();
  const uint8_t* codes = w.codes + tile * stride;
  const Number* x[Rows];
  OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
    if constexpr (kInt) x[r] = in.codes + (row + r) * width;
    else x[r] = in.values + (row + r) * width;
  }
  Grid<Floats, Rows, Tiles> totals = {};
  int64_t column = 0;
  for (int64_t s = 0; s < w.segments; ++s) {
    Grid<Vector, Rows, Tiles> sums = {};
    int64_t b = 0;
#if defined(OPTC_PAIRS)
    if constexpr (kInt && Bits < 8) {
      while (b < w.blocks) {
        const int64_t left = w.blocks - b, blocks = left < kPairedBlocks<Bits> ? left : kPairedBlocks<Bits>;
        OPTC_UNROLL for (int t = 0; t < Tiles; ++t) {
          add_paired<Bits, Rows, Tiles>(codes + t * stride, blocks, t, x, column, sums);
        }
        b += blocks;
        codes += blocks * C::kBytes;
        column += blocks * C::kColumns;
      }
    }
#endif
    for (; b < w.blocks; ++b, codes += C::kBytes) {
      OPTC_ROLL for (int step = 0; step < C::kSteps; ++step, column += 4 * C::kQuads) {
        OPTC_UNROLL for (int t = 0; t < Tiles; ++t) {
          add_step<Bits, M, Rows, Tiles>(codes + t * stride, step, t, x, column, table, sums);
        }
      }
    }
    OPTC_UNROLL for (int t = 0; t < Tiles; ++t) {
      OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
        const int64_t place = s / w.group * w.padded_rows + (tile + t) * kTileRows + p * kLanes;
        const Floats scale = numbers(w.scale, place);
        const Ints zero = zeros(w, place);
        OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
          const int64_t at = (row + r) * w.segments + s;
          if constexpr (kInt) {
            const Ints exact = sums.at[r][t][p] - zero * in.totals[at];
            totals.at[r][t][p] += __builtin_convertvector(exact, Floats) * (scale * in.scales[at]);
          } else {
            const Floats offset = __builtin_convertvector(zero, Floats) * in.sums[at];
            totals.at[r][t][p] += (sums.at[r][t][p] - offset) * scale;
          }
        }
      }
    }
  }
  OPTC_UNROLL for (int r = 0; r < Rows; ++r) {
    OPTC_UNROLL for (int t = 0; t < Tiles; ++t) {
      const int64_t first = (tile + t) * kTileRows;
      float values[kTileRows];
      OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
        Floats total = totals.at[r][t][p];
        if (out.bias != nullptr) total += load<Floats>(out.bias + first + p * kLanes);
        store(values + p * kLanes, total);
      }
      const int64_t count = w.rows - first < kTileRows ? w.rows - first : kTileRows;
      put(out.data, out.type, (row + r) * w.rows + first, values, count);
    }
  }
}

// Rows [row, row + Rows) times tiles [first, last).
template <int Bits, Mode M, int Rows, int Tiles>
OPTC_INLINE void rows_of(const Weight& w, const Activations& x, int64_t first, int64_t last, int64_t row,
                         const Output& out) {
  int64_t tile = first;
  for (; tile + Tiles <= last; tile += Tiles) multiply<Bits, M, Rows, Tiles>(w, x, tile, row, out);
  if constexpr (Tiles > 1) {
    for (; tile < last; ++tile) multiply<Bits, M, Rows, 1>(w, x, tile, row, out);
  }
}

// Rows in groups of nearly the same size, of up to as many as have their sums in registers. A few tiles stay in the cache
// for all groups: codes come from memory once.
template <int Bits, Mode M>
void product_of(const Weight& w, const Activations& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                const Output& out) {
  constexpr int kFew = M == kRounded ? kWide : (kWide + 1) / 2;
  const int64_t rows = end - begin, groups = (rows + 3) / 4;
  if (rows == 1) return rows_of<Bits, M, 1, 4>(w, x, first, last, begin, out);
  for (int64_t tile = first; tile < last; tile += kWide) {
    const int64_t stop = tile + kWide < last ? tile + kWide : last;
    for (int64_t group = 0, row = begin; group < groups; ++group) {
      const int64_t size = (end - row) / (groups - group);
      switch (size) {
        case 1: rows_of<Bits, M, 1, kFew>(w, x, tile, stop, row, out); break;
        case 2: rows_of<Bits, M, 2, kFew>(w, x, tile, stop, row, out); break;
        case 3: rows_of<Bits, M, 3, kFew>(w, x, tile, stop, row, out); break;
        default: rows_of<Bits, M, 4, kFew>(w, x, tile, stop, row, out);
      }
      row += size;
    }
  }
}

template <int Bits>
void product_in(const Weight& w, const Activations& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                const Output& out) {
  if (x.codes != nullptr) return product_of<Bits, kRounded>(w, x, first, last, begin, end, out);
  if constexpr (Bits <= 4) {
    if (kLooksUp || w.table != nullptr) return product_of<Bits, kLookedUp>(w, x, first, last, begin, end, out);
  }
  product_of<Bits, kConverted>(w, x, first, last, begin, end, out);
}

void product(const Weight& w, const Activations& x, int64_t first, int64_t last, int64_t begin, int64_t end,
             const Output& out) {
  if (first >= last) return;
  switch (w.bits) {
    case 2: return product_in<2>(w, x, first, last, begin, end, out);
    case 3: return product_in<3>(w, x, first, last, begin, end, out);
    case 4: return product_in<4>(w, x, first, last, begin, end, out);
    default: return product_in<8>(w, x, first, last, begin, end, out);
  }
}

// -- dequantization ----------------------------------------------------------------------------------------------

template <int Bits, bool Lookup>
void dequantize_in(const Weight& w, int64_t tile, void* to, c10::ScalarType type, int64_t stride) {
  using C = Codes<Bits>;
  const uint8_t* codes = w.codes + tile * w.tile_bytes();
  for (int64_t s = 0; s < w.segments; ++s) {
    const int64_t place = s / w.group * w.padded_rows + tile * kTileRows;
    for (int64_t b = 0; b < w.blocks; ++b, codes += C::kBytes) {
      OPTC_UNROLL for (int p = 0; p < kParts; ++p) {
        const Floats scale = numbers(w.scale, place + p * kLanes);
        const Floats zero = __builtin_convertvector(zeros(w, place + p * kLanes), Floats);
        OPTC_ROLL for (int step = 0; step < C::kSteps; ++step) {
          Words quads[C::kQuads];
          C::unpack(codes + p * kLanes * 4, step, quads);
          OPTC_ROLL for (int i = 0; i < 4 * C::kQuads; ++i) {
            const int64_t column = b * C::kColumns + step * 4 * C::kQuads + i;
            if (column >= w.segment) break;
            float values[kLanes];
            store(values, (value<Lookup>(quads[i / 4], i % 4, w.table) - zero) * scale);
            put(to, type, (s * w.segment + column) * stride + p * kLanes, values, kLanes);
          }
        }
      }
    }
  }
}

void dequantize(const Weight& w, int64_t tile, void* to, c10::ScalarType type, int64_t stride) {
  const bool lookup = w.table != nullptr;
  switch (w.bits) {
    case 2: return (lookup ? dequantize_in<2, true> : dequantize_in<2, false>)(w, tile, to, type, stride);
    case 3: return (lookup ? dequantize_in<3, true> : dequantize_in<3, false>)(w, tile, to, type, stride);
    case 4: return (lookup ? dequantize_in<4, true> : dequantize_in<4, false>)(w, tile, to, type, stride);
    default: return dequantize_in<8, false>(w, tile, to, type, stride);
  }
}

}  // namespace

const Nbits OPTC_NBITS = {widen, round_row, product, dequantize};

}  // namespace optc
