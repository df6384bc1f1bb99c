"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops import (
    attention,
    attention_codes,
    nvfp4,
    packed,
    packed_cache,
    packed_products,
    packed_xnnpack,
    paged,
    quantization,
    rotary,
    rotation,
)

__all__ = [
    "attention",
    "attention_codes",
    "nvfp4",
    "packed",
    "packed_cache",
    "packed_cpu",
    "packed_products",
    "packed_xnnpack",
    "paged",
    "quantization",
    "rotary",
    "rotation",
]
