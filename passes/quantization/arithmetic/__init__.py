"""The arithmetic under the quantization passes."""
