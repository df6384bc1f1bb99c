"""Linears: GEMV for one token, products on the tensor cores for a few, cuBLAS for many."""
