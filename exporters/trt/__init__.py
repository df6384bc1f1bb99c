"""A TensorRT plan: one graph of standard ONNX operators, built by TensorRT for RTX or by standard TensorRT."""

from optc.exporters.options.trt import TrtOptions
from optc.exporters.trt.builders import Choice, choose
from optc.exporters.trt.export import export_trt
from optc.exporters.trt.table import LEGAL

__all__ = ["LEGAL", "Choice", "TrtOptions", "choose", "export_trt"]
