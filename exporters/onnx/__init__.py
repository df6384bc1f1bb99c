"""ExportedProgram -> ONNX, by a walker of our own into onnx-ir."""

from optc.exporters.onnx.encoder_decoder import export_encoder_decoder
from optc.exporters.onnx.export import export_onnx, export_onnx_cuda
from optc.exporters.onnx.table import LEGAL

__all__ = ["LEGAL", "export_encoder_decoder", "export_onnx", "export_onnx_cuda"]
