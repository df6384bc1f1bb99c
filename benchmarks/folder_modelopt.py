"""Perplexity of a quantized model folder under nvidia-modelopt: a column beside `folder_peers.py`'s.

ModelOpt has no loader of its own for folders of others; it quantizes what transformers has loaded. Its modules do not go
around compressed-tensors' quantized linears (measured with 0.47 and 0.20: they call each other without end), so the folder
is loaded with its weights made dense by the library, of scales in float32, and what the folder's config says of inputs,
keys and values is done by ModelOpt's quantizers, with the folder's scales where these are calibrated. It computes in
float32. (Transformers, asked to dequantize, makes weights in the type of the stored scales: of bfloat16 it moved a
perplexity of 3281.95 to 3285.42.)
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from folder_peers import ERRORS, dense_model, loaded, perplexity_of, settings_of, tensors_of
from modelopt_peer import BACKEND, PackedFp4

_E4M3, _E2M1 = 448.0, 6.0


def by_modelopt(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """Perplexity, or what the libraries say."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import register_quant_backend

    register_quant_backend(BACKEND, PackedFp4())
    settings = settings_of(folder) or {}
    try:
        compressed = settings.get("quant_method") == "compressed-tensors"
        model = dense_model(folder, scales=torch.float32) if compressed else loaded(folder, dense=True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = mtq.quantize(model, {"quant_cfg": _rules(settings), "algorithm": None})
            _calibrated(model, folder)
            return {"perplexity": perplexity_of(model, rows)}
    except (*ERRORS, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _rules(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """ModelOpt's rules, the later ones first: nothing but the inputs of the scheme's linears, and keys and values."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    groups = list(settings.get("config_groups", {}).values())
    if size := settings.get("weight_block_size"):
        inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": size[-1]}
        groups.append({"targets": ["Linear"], "input_activations": inputs})
    for group in groups:
        if inputs := group.get("input_activations"):
            for target in group["targets"]:
                name = "" if target == "Linear" else target
                rules.append({"quantizer_name": f"*{name}*input_quantizer", "cfg": _attributes(inputs)})
    if kept := settings.get("kv_cache_scheme"):
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": _number(kept)}})
    return rules + [
        {"quantizer_name": f"*{name}.input_quantizer", "enable": False} for name in settings.get("ignore", ())
    ]


def _attributes(inputs: dict[str, Any]) -> dict[str, Any]:
    """A quantizer's attributes for `input_activations` of a scheme."""
    if inputs["num_bits"] == 4:
        blocks: dict[Any, Any] = {-1: inputs["group_size"], "type": "dynamic", "scale_bits": (4, 3)}
        return {"num_bits": (2, 1), "block_sizes": blocks, "backend": BACKEND}
    if inputs["strategy"] == "group":
        return {"num_bits": _number(inputs), "block_sizes": {-1: inputs["group_size"], "type": "dynamic"}}
    return {"num_bits": _number(inputs), "type": "dynamic", "block_sizes": {-1: None}}  # a scale per token


def _number(scheme: dict[str, Any]) -> Any:
    return (4, 3) if scheme["type"] == "float" else scheme["num_bits"]


def _calibrated(model: Any, folder: Path) -> None:
    """Give quantizers the largest values that the folder's calibrated scales stand for."""
    held = tensors_of(folder)
    for name, module in model.named_modules():
        whole = held.get(f"{name}.input_global_scale")
        if whole is not None:
            module.input_quantizer.amax = _E4M3 * _E2M1 / whole.float().reshape(())
        for kind in "kv":
            scale = held.get(f"{name}.{kind}_proj.{kind}_scale", held.get(f"{name}.{kind}_scale"))
            if scale is not None and hasattr(module, f"{kind}_bmm_quantizer"):
                getattr(module, f"{kind}_bmm_quantizer").amax = _E4M3 * scale.float().reshape(())
