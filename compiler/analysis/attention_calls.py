"""The operators that attention is found by in a graph that spells it out."""

from __future__ import annotations

import torch

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
