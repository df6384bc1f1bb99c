"""From a model folder or an nn.Module to a Program."""

from optc.compiler.capture.encoder_decoder import capture_encoder_decoder
from optc.compiler.capture.module import capture_module
from optc.compiler.capture.pretrained import capture_model, capture_pretrained, capture_pretrained_pair

__all__ = [
    "capture_encoder_decoder",
    "capture_model",
    "capture_module",
    "capture_pretrained",
    "capture_pretrained_pair",
]
