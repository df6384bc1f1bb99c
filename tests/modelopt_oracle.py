"""What nvidia-modelopt itself makes of the tiny models: folders, fake-quantized weights and logits."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import make_model
from modelopt_folders import CONTEXT
from torch import Tensor

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "W4A16_AWQ": "INT4_AWQ_CFG",
    "W8A16": "INT8_WEIGHT_ONLY_CFG",
    "FP8": "FP8_DEFAULT_CFG",
    "NVFP4": "NVFP4_DEFAULT_CFG",
}


@dataclass(frozen=True)
class Theirs:
    """ModelOpt's export of a model.

    Attributes:
        folder: what `export_hf_checkpoint` wrote.
        weights: module -> weight [N, K] after its weight quantizer, of the model that was written; empty for NVFP4,
            whose quantizers run on GPUs alone.
        logits: of the same model on `IDS`, its quantizers at work; None for NVFP4.
    """

    folder: Path
    weights: dict[str, Tensor]
    logits: Tensor | None


@functools.cache
def theirs(family: str, algorithm: str) -> Theirs:
    """ModelOpt on a tiny family in fp32, calibrated on `CONTEXT`'s tokens."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    assert CONTEXT.calibration is not None
    tokens = CONTEXT.calibration.tokens
    model = make_model(family)
    model.config.architectures = [type(model).__name__]  # the export looks there
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = mtq.quantize(model, _settings(mtq, algorithm), lambda item: item(tokens))
        requantize_resmooth_fused_llm_layers(model)  # what the export does first, and it changes numbers
        runs = algorithm != "NVFP4"
        logits = model(IDS).logits if runs else None
        weights = {
            name: module.weight_quantizer(module.weight).clone()
            for name, module in model.named_modules()
            if runs and hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
        }
        export_hf_checkpoint(model, export_dir=folder)
    return Theirs(folder, weights, logits)


def _settings(mtq: Any, algorithm: str) -> Any:
    settings = copy.deepcopy(getattr(mtq, CONFIGS[algorithm]))
    if algorithm == "W4A16_AWQ":
        for item in settings["quant_cfg"]:
            blocks = (item.get("cfg") or {}).get("block_sizes") if isinstance(item, dict) else None
            if blocks:
                blocks[-1] = 64
        settings["algorithm"] = {"method": "awq_lite", "alpha_step": 0.5}  # 3 candidates, for time
    if algorithm == "FP8":
        settings["quant_cfg"] = settings["quant_cfg"] + copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    return settings
