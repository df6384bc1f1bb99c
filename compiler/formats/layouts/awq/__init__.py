"""AWQ folders, AutoAWQ's GEMM layout: 4-bit codes with zero points, in an interleaved order.

Source: github.com/casper-hansen/AutoAWQ (`awq/modules/linear/gemm.py`, `awq/utils/packing_utils.py`). Of a linear M
with weight [N, K]: M.qweight int32 [K, N / 8], M.qzeros int32 [K / g, N / 8], M.scales float16 [K / g, N]. Nibble i of
a word, the lowest first, belongs to column 8 * word + ORDER[i]. value = (code - zero) * scale.
"""

from __future__ import annotations

METHOD = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
