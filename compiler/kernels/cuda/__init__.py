"""Triton kernels for CUDA. Modules that import triton are imported by the first launch, never by registration."""
