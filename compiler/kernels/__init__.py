"""Implementations of ops of the dialect, one folder per device. Importing this package registers every kernel."""

from optc.compiler.kernels.cpu import linear_nbits, paged_attention

__all__ = ["linear_nbits", "paged_attention"]
