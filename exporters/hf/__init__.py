"""Model folders in the form of Hugging Face, quantized or not: what transformers, vLLM and SGLang load."""

from optc.exporters.hf.export import export_hf
from optc.exporters.hf.layouts import LAYOUTS

__all__ = ["LAYOUTS", "export_hf"]
