"""Models of torchvision and timm with random weights, on one picture.

The wheels of torchvision on the package index are built for CUDA. Beside a torch for the CPU their compiled library does
not load, and `import torchvision` fails where it describes two of that library's operators, which no model here calls.
`torchvision_models` gives these their schemas first; `LIBRARIES` says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor, nn

SIZE = 224
MODELS = {
    "mobilenet-v3": ("torchvision", "mobilenet_v3_large"),
    "convnext-tiny": ("torchvision", "convnext_tiny"),
    "swin-t": ("torchvision", "swin_t"),
    "mixer-s": ("timm", "mixer_s16_224"),
    "regnet-y": ("timm", "regnety_008"),
    "deit-s": ("timm", "deit_small_patch16_224"),
}
"""Library and its name of each."""
LIBRARIES: dict[str, str] = {}
"""Versions of what was imported, and how."""
_SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")


@functools.cache
def torchvision_models() -> ModuleType:
    """`torchvision.models`, with or without the compiled operators of its wheel."""
    try:
        torchvision = importlib.import_module("torchvision")
        how = ""
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in ("nms", "qnms"):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision = importlib.import_module("torchvision")
        how = ", without its compiled operators (schemas of nms and qnms alone)"
    LIBRARIES["torchvision"] = f"{torchvision.__version__}{how}"
    found: ModuleType = torchvision.models
    return found


def ready_torchvision() -> None:
    """Import torchvision where it is found, before transformers does, which fails at what `torchvision_models` mends."""
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_models()


def picture_model(name: str) -> tuple[nn.Module, Tensor]:
    """A model of `MODELS` in eval mode, and a picture [1, 3, 224, 224] of noise.

    Heads that a library begins with zeros are drawn, since every answer would be the same.
    """
    library, called = MODELS[name]
    vision = torchvision_models()  # timm imports it too
    if library == "timm":
        timm = importlib.import_module("timm")
        LIBRARIES["timm"] = timm.__version__
        model = timm.create_model(called)
    else:
        model = getattr(vision, called)()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and not weight.any():
                weight.normal_(std=0.02)
    return model.eval(), torch.randn(1, 3, SIZE, SIZE)
