"""The `optc::` dialect. Importing this package registers every op."""

from optc.compiler.ops import attention, paged, quantization, rotary

__all__ = ["attention", "paged", "quantization", "rotary"]
