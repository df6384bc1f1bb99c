// Arithmetic on one tile: rows of queries against up to kTileKeys keys, in float.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cfloat>
#include <cstdint>

namespace optc {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kMaxRows = 32;
constexpr float kLowest = -FLT_MAX / 2;  // the maximum over no key: a masked score, -FLT_MAX, stays far below it

// The functions of tile.cpp, compiled for one instruction set.
struct Tile {
  // queries [rows][width], keys: pointers to [width] -> scores [rows][kTileKeys]. Scores are made for `count`
  // keys rounded up to 8: pointers up to there must be readable.
  void (*scores)(const float* queries, int64_t rows, const float* const* keys, int64_t count, int64_t width,
                 float* scores);
  // scores = softcap * tanh(scores / softcap)
  void (*cap)(float* scores, int64_t rows, float softcap);
  // One step of the online softmax: scores become weights relative to the new maximum `top`; `sum` and `out`
  // [rows][width], which were relative to the old one, follow.
  void (*soften)(float* scores, int64_t rows, float* top, float* sum, float* out, int64_t width);
  // weights [rows][kTileKeys], values: `count` pointers to [width] -> added to out [rows][width].
  void (*accumulate)(const float* weights, int64_t rows, const float* const* values, int64_t count, int64_t width,
                     float* out);
  void (*widen_bfloat16)(const c10::BFloat16* from, int64_t count, float* to);
  void (*widen_half)(const c10::Half* from, int64_t count, float* to);
};

extern const Tile tile_baseline;
extern const Tile tile_avx2;  // only where tile.cpp was compiled a second time (x86)

}  // namespace optc
