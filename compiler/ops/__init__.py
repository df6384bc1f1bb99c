"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops.dialect import attention, attention_codes, nvfp4, paged, quantization, rotary, rotation
from optc.compiler.ops.packed import cache_writes as packed_cache
from optc.compiler.ops.packed import onnxruntime as packed
from optc.compiler.ops.packed import onnxruntime_products as packed_products
from optc.compiler.ops.packed import xnnpack as packed_xnnpack

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
