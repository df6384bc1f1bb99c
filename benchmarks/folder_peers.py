"""Perplexity of a quantized model folder as other libraries on a CPU read it: rows beside `vllm_folders.py`'s own.

`transformers` loads the folder by itself: compressed-tensors makes its quantized linears, which round inputs. `library`
takes compressed-tensors' own decompression of each linear into an unquantized model of transformers, whose inputs stay as
they are. Both compute in float32.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from quant_engines import perplexity
from safetensors import safe_open
from torch import Tensor, nn

ERRORS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
"""What libraries raise over a folder that they do not take."""


def by_transformers(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """As transformers loads it; where it makes no quantized linears of it, as it dequantizes while it loads."""
    found: dict[str, Any] = {}
    for way in ("quantized linears", "dequantized"):
        try:
            model = loaded(folder, dense=way == "dequantized")
            return found | {"perplexity": perplexity_of(model, rows), "way": way}
        except ERRORS as error:
            found[f"not as {way}"] = f"{type(error).__name__}: {error}"[:300]
    return found


def loaded(folder: Path, *, dense: bool) -> Any:
    """A folder as transformers loads it, in float32.

    Args:
        dense: with its weights dequantized, where transformers does that.
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    made = {"compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}
    kind = made.get((settings_of(folder) or {}).get("quant_method", "")) if dense else None
    more: dict[str, Any] = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    return model.float() if dense else model  # dequantized FP8 is bf16


def by_library(folder: Path, source: Path, rows: list[list[int]]) -> dict[str, Any]:
    """By compressed-tensors' decompression of each linear, in a model made of the source's config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    settings = settings_of(folder)
    if settings is None or settings["quant_method"] != "compressed-tensors":
        return {"not run": "the library reads its own layout alone"}
    schemes: Any = QuantizationConfig.model_validate(copy.deepcopy(settings))
    held = tensors_of(folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    try:
        for name, module in model.named_modules():
            parts = {
                key.removeprefix(f"{name}."): held.pop(key) for key in list(held) if key.rpartition(".")[0] == name
            }
            if not isinstance(module, nn.Linear) or set(parts) <= {"weight", "bias"}:
                _take(module, parts)
                continue
            scheme = _scheme(schemes, name)
            compressor = BaseCompressor.get_value_from_registry(scheme.format or schemes.format)
            bias = {key: parts.pop(key) for key in ("bias",) if key in parts}
            _take(module, {"weight": compressor.decompress(parts, scheme)["weight"], **bias})
    except ERRORS as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    left = [name for name in held if not name.endswith(("k_scale", "v_scale"))]
    return {"error": f"no place for {left[0]}"} if left else {"perplexity": perplexity_of(model, rows)}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Rows of docs/quantize.md: the folder, and its perplexity by optc, vLLM, transformers, the library and ModelOpt."""
    rows = ["| folder | optc | vLLM 0.24 | transformers | compressed-tensors | ModelOpt |", "|---|---|---|---|---|---|"]
    for name, figures in found.items():
        cells = [_cell(figures.get(kind)) for kind in ("here", "vllm", "transformers", "library", "modelopt")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(figure: Any) -> str:
    if isinstance(figure, float):
        return f"{figure:.3f}"
    if figure is None:
        return "not run"
    if "perplexity" not in figure:
        return "no" if "not run" in figure else "fails"
    return f"{figure['perplexity']:.3f}" + (" (dequantized)" if figure.get("way") == "dequantized" else "")


def _scheme(schemes: Any, name: str) -> Any:
    """The scheme whose targets name a linear, or its class."""
    groups = list(schemes.config_groups.values())
    return next((group for group in groups if name in group.targets), groups[0])


def _take(module: nn.Module, parts: dict[str, Tensor]) -> None:
    for key, tensor in parts.items():
        held = getattr(module, key, None)
        if isinstance(held, Tensor):
            with torch.no_grad():
                held.copy_(tensor)


def settings_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its quantization."""
    found: dict[str, Any] | None = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    out: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return out


def perplexity_of(model: Any, rows: list[list[int]]) -> float:
    """Of a model of transformers over windows of tokens."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = [model(torch.tensor([row[:-1]])).logits[0].float().numpy() for row in rows]
    return perplexity(logits, rows)
