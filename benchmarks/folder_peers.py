"""Perplexity of a quantized model folder as other libraries on a CPU read it: rows beside `vllm_folders.py`'s own.

`transformers` loads the folder by itself: compressed-tensors makes its quantized linears, which round inputs. `library`
puts compressed-tensors' own decompression of each linear into an unquantized model of transformers, whose inputs stay as
they are. Both compute in float32.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from quant_engines import perplexity
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ERRORS = (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
"""What libraries raise over a folder that they do not take."""


def by_transformers(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """As transformers loads it; where it makes no quantized linears of it, as it dequantizes while it loads.

    Rotations of inputs are left out by transformers, and a second figure is that with the library's hooks for them.
    """
    found: dict[str, Any] = {}
    for way in ("quantized linears", "dequantized"):
        try:
            model = loaded(folder, dense=way == "dequantized")
            found |= {"perplexity": perplexity_of(model, rows), "way": way}
            if _rotates(model, folder):
                found["rotated"] = perplexity_of(model, rows)
            return found
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


def by_library(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """By compressed-tensors' decompression of each linear, whose weights have the type of the folder's scales."""
    settings = settings_of(folder)
    if settings is None or settings["quant_method"] != "compressed-tensors":
        return {"not run": "the library reads its own layout alone"}
    try:
        return {"perplexity": perplexity_of(dense_model(folder, scales=None), rows)}
    except ERRORS as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def dense_model(folder: Path, *, scales: torch.dtype | None) -> Any:
    """A folder of compressed-tensors as a plain model of transformers in float32.

    Args:
        scales: the type that scales get first. The library makes weights in the type of their scales (blocks of 4-bit
            floats in bfloat16 whatever it is), so with scales of bfloat16 it rounds each weight; None leaves them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with tempfile.TemporaryDirectory() as place:
        save_file(_decompressed(folder, scales), Path(place) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(place)
        model, said = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    if wrong := [*said["unexpected_keys"], *said["missing_keys"], *said["mismatched_keys"]]:
        raise ValueError(f"{wrong[0]} is missing or has no place")
    _rotates(model, folder)
    return model.eval()


def _rotates(model: Any, folder: Path) -> bool:
    """Let the library rotate the inputs that a folder's config names; False where it names none."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    said = (settings_of(folder) or {}).get("transform_config")
    if said is not None:
        apply_transform_config(model, TransformConfig.model_validate(said))
    return said is not None


def _decompressed(folder: Path, scales: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a folder under their names, with each linear's weight as the library makes it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    schemes: Any = QuantizationConfig.model_validate(copy.deepcopy(settings_of(folder)))
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(folder).items():
        module, _, part = name.rpartition(".")
        if part not in ("k_scale", "v_scale") and not module.endswith("_input"):  # nor matrices of rotations
            modules.setdefault(module, {})[part] = tensor
    out: dict[str, Tensor] = {}
    for name, parts in modules.items():
        if parts.keys() & {"weight_scale"}:
            scheme = _scheme(schemes, name)
            if scales is not None and parts["weight_scale"].dtype in (torch.bfloat16, torch.float16):
                parts["weight_scale"] = parts["weight_scale"].to(scales)
            compressor = BaseCompressor.get_value_from_registry(scheme.format or schemes.format)
            bias = {key: parts.pop(key) for key in ("bias",) if key in parts}
            parts = {"weight": compressor.decompress(parts, scheme)["weight"].contiguous(), **bias}
        out |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return out


def table(found: dict[str, dict[str, Any]]) -> str:
    """Rows of docs/quantize.md: the folder, and its perplexity by all that read it, on a CPU first."""
    names = ("optc", "transformers", "compressed-tensors", "ModelOpt", "optc beside vLLM", "vLLM 0.24")
    rows = [f"| folder | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, figures in found.items():
        cells = [
            _cell(figures.get(kind)) for kind in ("cpu_here", "transformers", "library", "modelopt", "here", "vllm")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(figure: Any) -> str:
    if isinstance(figure, float):
        return f"{figure:.3f}"
    if figure is None:
        return "not run"
    if "perplexity" not in figure:
        return "no" if "not run" in figure else "fails"
    rotated = f" ({figure['rotated']:.3f} rotated)" if "rotated" in figure else ""
    return f"{figure['perplexity']:.3f}" + (" (dequantized)" if figure.get("way") == "dequantized" else "") + rotated


def _scheme(schemes: Any, name: str) -> Any:
    """The scheme whose targets name a linear, or its class."""
    groups = list(schemes.config_groups.values())
    return next((group for group in groups if name in group.targets), groups[0])


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
