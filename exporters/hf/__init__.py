"""Model folders in the form of Hugging Face, quantized or not: what transformers, vLLM and TensorRT-LLM load."""

from optc.exporters.hf.export import export_hf
from optc.exporters.hf.trtllm import export_trtllm
from optc.exporters.options.hf import FolderOptions, ServeOptions

__all__ = ["FolderOptions", "ServeOptions", "export_hf", "export_trtllm"]
