"""From a model folder or an nn.Module to a Program."""

from optc.compiler.capture.module import capture_module
from optc.compiler.capture.pretrained import capture_model, capture_pretrained

__all__ = ["capture_model", "capture_module", "capture_pretrained"]
