// The functions of nbits_matrix.h for AMX: products of 16 x 64 by 64 x 16 codes of 8 bits (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 1, chapter 18).
//
// Unpacked quads of a tile of the weight, 64 bytes for each four neighbours along K, are a matrix of the unit as they
// are. Activations lie in units of 16 rows and as many columns as one product takes, so that each is a kilobyte of
// neighbours. Four tiles of the weight at a time: a part of a segment of theirs is unpacked, stays in the first cache, and
// meets all rows; after each segment the sums, kept as integers, are scaled and added to totals.

#include "nbits_matrix.h"

#include <cstdlib>

#include "nbits_lanes.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace optc {
namespace {

constexpr int64_t kUnit = 16;       // rows of a matrix of the unit
constexpr int64_t kUnitBytes = 64;  // of a row
constexpr int kTiles = 4;           // of the weight, at a time
constexpr int64_t kRows = 128;      // of activations, at a time: their sums and totals take 64 kilobytes
constexpr int64_t kPart = 256;      // columns of a segment, at a time: 16 kilobytes of unpacked codes
constexpr int64_t kAcross = kTiles * kTileRows;

bool ready() {
#if defined(__linux__)
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-tile") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

int64_t segment_bytes(const Weight& w) { return w.blocks * block_columns(w.bits); }

// Bytes along K of one product, which a segment is a multiple of; 0 where it is none of much.
int64_t step_bytes(const Weight& w) {
  for (int64_t step = kUnitBytes; step >= 16; step /= 2) {
    if (segment_bytes(w) % step == 0) return step;
  }
  return 0;
}

int64_t room(const Weight& w, int64_t rows) {
  return step_bytes(w) == 0 ? 0 : (rows + kUnit - 1) / kUnit * kUnit * w.padded_columns();
}

// Where the codes of a unit of rows begin, of which `column` is a multiple of a step.
OPTC_INLINE int64_t unit_place(const Weight& w, int64_t row, int64_t column) {
  return row / kUnit * kUnit * w.padded_columns() + column * kUnit;
}

void place(const Weight& w, int64_t row, const int8_t* codes, int8_t* places) {
  const int64_t width = w.padded_columns(), step = step_bytes(w), at = row % kUnit * step;
  for (int64_t column = 0; column < width; column += step) {
    __builtin_memcpy(places + unit_place(w, row, column) + at, codes + column, step);
  }
}

// Matrices of the unit: sums 0 to 3, codes of activations 4, of the weight 5 to 7 in turn.
void shape(int64_t step) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int matrix = 0; matrix < 8; ++matrix) {
    shapes.bytes[matrix] = static_cast<uint16_t>(matrix == 4 ? step : kUnitBytes);
    shapes.rows[matrix] = static_cast<uint8_t>(matrix < 5 ? kUnit : step / 4);
  }
  _tile_loadconfig(&shapes);
}

// Blocks [first, last) of a tile, a byte for each code: [columns / 4][64].
template <int Bits>
void unpack(const Weight& w, int64_t tile, int64_t first, int64_t last, uint8_t* to) {
  using C = Codes<Bits>;
  const uint8_t* codes = w.codes + tile * w.tile_bytes() + first * C::kBytes;
  for (int64_t block = first; block < last; ++block, codes += C::kBytes) {
    OPTC_UNROLL for (int step = 0; step < C::kSteps; ++step) {
      Words quads[C::kQuads];
      C::unpack(codes, step, quads);
      OPTC_UNROLL for (int q = 0; q < C::kQuads; ++q, to += kUnitBytes) store(to, quads[q]);
    }
  }
}

void unpack_part(const Weight& w, int64_t tile, int64_t column, int64_t columns, uint8_t* to) {
  const int64_t unit = block_columns(w.bits), first = column / unit, last = (column + columns) / unit;
  switch (w.bits) {
    case 2: return unpack<2>(w, tile, first, last, to);
    case 3: return unpack<3>(w, tile, first, last, to);
    case 4: return unpack<4>(w, tile, first, last, to);
    default: return unpack<8>(w, tile, first, last, to);
  }
}

// sums [16][4][16] of 16 rows and four tiles, from 0 or from what is there. `codes`: the tiles' unpacked parts.
void multiply(const int8_t* x, const uint8_t* codes, int64_t columns, int64_t step, bool more, int32_t* sums) {
  constexpr int64_t kStride = kAcross * sizeof(int32_t);
  if (more) {
    _tile_loadd(0, sums, kStride);
    _tile_loadd(1, sums + kTileRows, kStride);
    _tile_loadd(2, sums + 2 * kTileRows, kStride);
    _tile_loadd(3, sums + 3 * kTileRows, kStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t size = columns * kTileRows;
  for (int64_t column = 0; column < columns; column += step) {
    const uint8_t* at = codes + column * kTileRows;
    _tile_loadd(4, x + column * kUnit, step);
    _tile_loadd(5, at, kUnitBytes);
    _tile_dpbsud(0, 4, 5);
    _tile_loadd(6, at + size, kUnitBytes);
    _tile_dpbsud(1, 4, 6);
    _tile_loadd(7, at + 2 * size, kUnitBytes);
    _tile_dpbsud(2, 4, 7);
    _tile_loadd(5, at + 3 * size, kUnitBytes);
    _tile_dpbsud(3, 4, 5);
  }
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kTileRows, kStride);
  _tile_stored(2, sums + 2 * kTileRows, kStride);
  _tile_stored(3, sums + 3 * kTileRows, kStride);
}

// Sums of a segment, scaled and added to the totals of `rows` rows from `row` on.
template <bool Zeros>
void add_scaled(const Weight& w, const Activations& x, int64_t tile, int64_t tiles, int64_t row, int64_t rows,
                int64_t segment, const int32_t* sums, float* totals) {
  Floats scale[kTiles] = {};
  Ints zero[kTiles] = {};
  for (int t = 0; t < tiles; ++t) {
    const int64_t at = segment / w.group * w.padded_rows + (tile + t) * kTileRows;
    scale[t] = numbers(w.scale, at);
    zero[t] = zeros(w, at);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * w.segments + segment;
    const int32_t codes = x.totals[at], middle = codes * (1 << (w.bits - 1));
    OPTC_UNROLL for (int t = 0; t < kTiles; ++t) {
      const int64_t spot = (r * kTiles + t) * kTileRows;
      const Ints offset = Zeros ? zero[t] * codes : Ints{} + middle;
      const Floats exact = __builtin_convertvector(load<Ints>(sums + spot) - offset, Floats);
      store(totals + spot, load<Floats>(totals + spot) + exact * (scale[t] * x.scales[at]));
    }
  }
}

void write(const Weight& w, int64_t tile, int64_t tiles, int64_t row, int64_t rows, const Output& out, float* totals) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int t = 0; t < tiles; ++t) {
      const int64_t first = (tile + t) * kTileRows;
      float* values = totals + (r * kTiles + t) * kTileRows;
      if (out.bias != nullptr) store(values, load<Floats>(values) + load<Floats>(out.bias + first));
      const int64_t count = w.rows - first < kTileRows ? w.rows - first : kTileRows;
      put(out.data, out.type, (row + r) * w.rows + first, values, count);
    }
  }
}

struct alignas(64) Scratch {
  int32_t sums[kRows * kAcross];
  float totals[kRows * kAcross];
  uint8_t codes[kAcross * kPart];
};

// Up to `kRows` rows, a multiple of 16 from `row` on, times up to four tiles.
void multiply_rows(const Weight& w, const Activations& x, int64_t tile, int64_t tiles, int64_t row, int64_t rows,
                   const Output& out, Scratch& scratch) {
  const int64_t size = segment_bytes(w), step = step_bytes(w);
  __builtin_memset(scratch.totals, 0, rows * kAcross * sizeof(float));
  for (int64_t s = 0; s < w.segments; ++s) {
    for (int64_t column = 0; column < size; column += kPart) {
      const int64_t columns = size - column < kPart ? size - column : kPart, from = s * size + column;
      for (int t = 0; t < tiles; ++t) {
        unpack_part(w, tile + t, from, columns, scratch.codes + t * columns * kTileRows);
      }
      for (int64_t r = 0; r < rows; r += kUnit) {
        multiply(x.codes + unit_place(w, row + r, from), scratch.codes, columns, step, column > 0,
                 scratch.sums + r * kAcross);
      }
    }
    (w.zero != nullptr ? add_scaled<true> : add_scaled<false>)(w, x, tile, tiles, row, rows, s, scratch.sums,
                                                               scratch.totals);
  }
  write(w, tile, tiles, row, rows, out, scratch.totals);
}

void product(const Weight& w, const Activations& x, int64_t first, int64_t last, int64_t begin, int64_t end,
             const Output& out) {
  static thread_local Scratch scratch = {};  // codes of tiles beyond the last are multiplied too, and not written
  shape(step_bytes(w));
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = end - row < kRows ? end - row : kRows;
    for (int64_t tile = first; tile < last; tile += kTiles) {
      multiply_rows(w, x, tile, last - tile < kTiles ? last - tile : kTiles, row, rows, out, scratch);
    }
  }
  _tile_release();
}

}  // namespace

const NbitsMatrix OPTC_NBITS_MATRIX = {ready, room, place, product};

}  // namespace optc
