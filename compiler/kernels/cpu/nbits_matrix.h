// Products of rounded activations with packed codes on the matrix units of x86 (AMX), for many rows of activations.
#pragma once

#include "nbits.h"

namespace optc {

struct NbitsMatrix {
  // Whether this processor has the units and the system lets this process use them. Asks once.
  bool (*ready)();
  // Bytes of codes of so many rows of activations in the order that `product` reads; 0 where it does not take the
  // weight, since a segment does not fill whole rows of the unit.
  int64_t (*room)(const Weight& weight, int64_t rows);
  // The codes of one row, [padded_columns], to their places.
  void (*place)(const Weight& weight, int64_t row, const int8_t* codes, int8_t* places);
  // As Nbits::product, with the same sums and the same roundings, for codes in that order.
  void (*product)(const Weight& weight, const Activations& x, int64_t first, int64_t last, int64_t begin, int64_t end,
                  const Output& out);
};

extern const NbitsMatrix nbits_matrix_amx;  // only on x86

}  // namespace optc
