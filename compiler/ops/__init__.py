"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops import (
    attention,
    attention_codes,
    nvfp4,
    packed,
    packed_products,
    paged,
    quantization,
    rotary,
    rotation,
    packed,
    packed_products,
    packed_xnnpack,
    paged,
    quantization,
    rotary,
)

__all__ = [
    "attention",
    "attention_codes",
    "nvfp4",
    "packed",
    "packed_cpu",
    "packed_products",
    "packed_xnnpack",
    "paged",
    "quantization",
    "rotary",
    "rotation",
]
