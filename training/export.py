"""From a trained model to a Hugging Face folder that `optc compile` captures with the trained quantization."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from optc.compiler.artifact.publishing import write_folder
from optc.compiler.capture.renames import renamed_tensors, stored_tensors
from optc.compiler.diagnostics import InputError
from optc.compiler.formats.group_sizes import BITS
from optc.compiler.formats.layouts.compressed_tensors.writer import CompressedTensorsWriter
from optc.compiler.ir.saved.safetensors_file import TYPES
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder, has_weights, tied_names
from optc.compiler.model_folder.config_file import CONFIG, read_json
from optc.compiler.model_folder.dtypes import DTYPES
from optc.exporters.hf.collect import FolderPlan, Quantized
from optc.exporters.hf.export import write_model
from optc.training.config import WrittenType
from optc.training.frozen_base import FrozenBase
from optc.training.kv_rounding import MODULE, kv_roundings
from optc.training.lora import lora_config, merged_state, write_adapters
from optc.training.qat import FakeQuantizedLinear, quantized_linears

_PARTS = ("scale_log", "scale_start", "zero")
"""What QAT adds to a linear; its codes and scales are written instead."""


class SaveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the folder is written; what was applied to the model is read off the model.

    Attributes:
        force: write into a folder that exists and is empty, or replace an artifact.
        dtype: of the weights; "source" is each tensor's in the folder that training started from.
    """

    force: bool = False
    dtype: WrittenType = "source"


def save_trained(model: nn.Module, tokenizer_source: Path, folder: Path, config: SaveConfig) -> None:
    """Write a trained model as a model folder, whole or not at all.

    Linears that were trained with fake quantization are written as codes in the layout compressed-tensors; capturing
    the folder gives `optc.dequantize` of just these codes, so nothing is calibrated or rounded a second time.

    Args:
        tokenizer_source: the folder that training started from: tokenizer, generation config and the like.
        folder: a new folder, or with `config.force` an empty one.

    Raises:
        InputError: the folder exists, or the disk is not writable; a weight is not finite.
        ArtifactError: what was read back is not what was written.
        ResourceError: the disk is full.
    """
    with write_folder(folder, force=config.force) as directory:
        write_trained(model, tokenizer_source, directory, config.dtype)


def write_trained(
    model: nn.Module, source: Path, directory: Path, dtype: WrittenType = "source", strays: Sequence[str] = ()
) -> None:
    """The same into a folder that is there already, file by file; of heads on a frozen base their own folder.

    Args:
        source: the folder that training started from.
        strays: tensors of the source that are written as they are; see `stray_tensors`.
    """
    if isinstance(model, FrozenBase):
        model.write(source, directory)
        return
    adapters = lora_config(model)
    if adapters is not None and adapters.export == "adapters":
        write_adapters(model, source, directory)
        return
    plan, state = _plan(model, source, _WrittenTypes(source, dtype), tuple(strays))
    write_model(plan, state.__getitem__, CompressedTensorsWriter(bits=BITS), directory, source)


class _WrittenTypes:
    """The types that tensors are written in: that of the source's tensor of the same name, or what most of the source has.

    Args:
        dtype: "source", or one type for all. A source without weights leaves them as they are.
    """

    def __init__(self, source: Path, dtype: WrittenType) -> None:
        self.most, self.named = DTYPES.get(dtype), dict[str, torch.dtype]()
        if dtype == "source" and has_weights(source):
            info = check_folder(source)
            types = {name: TYPES[item.dtype] for name, item in info.tensors.items()}
            self.most, self.named = info.dtype, {name: kind for name, kind in types.items() if kind in DTYPES.values()}

    def written(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the folder in its type.

        Raises:
            InputError: it is not finite there.
        """
        found = self.named.get(name, self.most)
        if found is None or not tensor.is_floating_point():
            return tensor
        made = tensor.to(found)
        if made.dtype != tensor.dtype and not bool(torch.isfinite(made).all()):
            raise InputError(
                f"a trained weight does not fit {found}".replace("torch.", ""),
                where=name,
                why=f"its largest magnitude is {float(tensor.abs().max()):.4g}",
                remedy="write the folder with --set saving.dtype=fp32 or bf16",
            )
        return made


def _plan(
    model: Any, source: Path, types: _WrittenTypes, strays: tuple[str, ...]
) -> tuple[FolderPlan, dict[str, Tensor]]:
    """The folder of a model in memory, and the tensors that it names."""
    linears = dict(quantized_linears(model))
    held = merged_state(model) if lora_config(model) is not None else model.state_dict(keep_vars=True)
    owners = tied_names(held)
    coded = {f"{name}.weight" for name in linears}
    left = {f"{name}.{part}" for name in linears for part in _PARTS}
    plain: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                "a trained weight holds NaN or infinity",
                where=name,
                why="the run diverged",
                remedy="train with a smaller optimizer.lr, or continue from an earlier checkpoint",
            )
        owner = owners.get(name, name)
        # Of tied tensors the first is written, or the first that is not kept as codes.
        if name in coded or name in left or owner in plain or f".{MODULE}." in name:
            continue
        plain[name] = tensor.detach().cpu().contiguous()
    untied = any(owners.get(name, name) in plain or name in owners.values() for name in coded)
    untied = untied or _diverged(model, plain)
    quantized = tuple(
        Quantized(name, f"{name}.weight", _on_cpu(name, module, types)) for name, module in linears.items()
    )
    scheme, scales = None, {}
    plain = {name: types.written(name, tensor) for name, tensor in stored_tensors(model, plain).items()}
    state = dict(plain)
    for name, rounding in kv_roundings(model):
        scheme = rounding.scheme
        scales[name] = f"{name}.key_scale", f"{name}.value_scale"
        state |= zip(scales[name], (scale.detach().cpu() for scale in rounding.scales()), strict=True)
    info = CheckpointInfo(source, _config(model, source), check_folder(source).tensors if strays else {}, False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    plan = FolderPlan(
        info,
        {name: name for name in plain},
        quantized,
        strays,
        (*names, *_stored_linears(model, names, plain, held)),
        untied,
        key_values=scheme,
        scales=scales,
    )
    return plan, state


def _diverged(model: nn.Module, plain: Mapping[str, Tensor]) -> bool:
    """Whether tensors that the model's class ties have each a value of their own, as a head that was trained alone."""
    tied: Any = getattr(model, "_tied_weights_keys", None)
    return isinstance(tied, dict) and any(one in plain and other in plain for one, other in tied.items())


def _stored_linears(
    model: nn.Module, names: Sequence[str], plain: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> list[str]:
    """What readers of the folder know as a linear under another name than the model's: of `names`, and of experts.

    Args:
        plain: the folder's tensors.
        held: the model's.
    """
    other = {name for name in plain if name.endswith(".weight")} - set(held)
    renamed = renamed_tensors(model, other)
    experts = [name for name in plain if name in other - set(renamed.values()) and plain[name].dim() == 2]
    found = [*(renamed[f"{name}.weight"] for name in names if f"{name}.weight" in renamed), *experts]
    return [name.removesuffix(".weight") for name in found]


def _on_cpu(name: str, module: FakeQuantizedLinear, types: _WrittenTypes) -> Any:
    """The codes of a linear, its scales in the type that its weight would be written in."""
    weight = module.quantized()
    zero = None if weight.zero is None else weight.zero.cpu()
    return type(weight)(weight.scheme, weight.codes.cpu(), types.written(f"{name}.weight", weight.scale.cpu()), zero)


def _config(model: Any, source: Path) -> dict[str, Any]:
    """config.json of a model in memory. Training keeps no KV cache; whether the model does is said by its source."""
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    values["architectures"] = [type(model).__name__]
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    before = read_json(source / CONFIG) if (source / CONFIG).is_file() else {}
    values.pop("use_cache", None)
    return values | {key: before[key] for key in ("use_cache",) if key in before}
