"""Layouts in which model folders keep quantized weights: what config.json says, and from files to canonical codes."""

from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme

__all__ = ["QuantizedWeight", "Scheme"]
