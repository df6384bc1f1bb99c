"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops import attention, packed, paged, quantization, rotary

__all__ = ["attention", "packed", "paged", "quantization", "rotary"]
