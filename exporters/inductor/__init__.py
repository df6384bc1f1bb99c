"""Program -> AOTInductor package with its weights beside it, a C++ op library when needed, and a runner."""

from optc.exporters.inductor.export import export_encoder_decoder, export_inductor
from optc.exporters.inductor.legal import LEGAL

__all__ = ["LEGAL", "export_encoder_decoder", "export_inductor"]
