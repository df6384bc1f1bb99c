// Products of a few rows of activations with a weight in float, which read the weight once.
#pragma once

#include <cstdint>

namespace optc {

constexpr int64_t kFewRows = 20;

// The function of few.cpp, compiled for one instruction set.
struct Few {
  // out[r * count + n] = x[r] . weight[n] + bias[n] for `rows` <= kFewRows rows of x [rows][columns] and rows
  // [first, last) of weight [count][columns]. Each number is summed in the same order, however many rows there are.
  // bias is nullptr where there is none.
  void (*multiply)(const float* x, int64_t rows, int64_t columns, const float* weight, int64_t first, int64_t last,
                   int64_t count, const float* bias, float* out);
};

extern const Few few_baseline;
extern const Few few_avx2;  // only on x86

}  // namespace optc
