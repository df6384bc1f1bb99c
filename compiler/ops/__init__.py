"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops import (
    attention,
    attention_codes,
    packed,
    packed_cache,
    packed_products,
    paged,
    quantization,
    rotary,
)

__all__ = [
    "attention",
    "attention_codes",
    "packed",
    "packed_cache",
    "packed_cpu",
    "packed_products",
    "paged",
    "quantization",
    "rotary",
]
