"""Arithmetic and bookkeeping shared by the quantization passes."""
