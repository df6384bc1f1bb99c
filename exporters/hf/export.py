"""Write a Program back as a Hugging Face model folder, quantized linears in a standard layout, and read it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.capture.checkpoint import CheckpointInfo, check_folder
from optc.compiler.capture.quantized import quantized_folder
from optc.compiler.diagnostics import ArtifactError, OptcError, TargetError, os_errors
from optc.compiler.layouts import QuantizedWeight
from optc.compiler.layouts.config import KEY
from optc.compiler.layouts.tensors import TensorReader
from optc.compiler.program import Program
from optc.compiler.target import ExportRequest, ExportResult
from optc.exporters.companions import copy_companions
from optc.exporters.hf.collect import FolderPlan, collect
from optc.exporters.hf.layouts import LAYOUTS, LayoutWriter, layout_writer
from optc.exporters.hf.places import CacheScale
from optc.exporters.hf.shards import write_shards

CONFIG = "config.json"


def export_hf(program: Program, request: ExportRequest) -> ExportResult:
    """Write a model folder: config.json, safetensors, tokenizer and companions.

    Every tensor comes from the program, not from the source folder, but for those that the graph does not read. What
    was written is read back through `optc.compiler.layouts` and compared with the program bit by bit.

    Raises:
        TargetError: a weight has no place in a model folder, or the layout cannot hold it; names it.
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    plan = collect(program, request.source)
    writer = layout_writer(request.options.layout or LAYOUTS[0], [item.weight for item in plan.quantized])
    remedy = f"choose another of --layout {', '.join(LAYOUTS)}, or other quantization options"
    if plan.caches:
        raise TargetError(
            f"the layout '{writer.name}' cannot hold a rounded KV cache", where=plan.caches[0].name,
            remedy="leave quantize-kv-cache out, or use --target trtllm",
        )  # fmt: skip
    return write_folder(program, request, plan, writer, remedy)


def write_folder(
    program: Program, request: ExportRequest, plan: FolderPlan, writer: LayoutWriter, remedy: str,
    texts: Mapping[str, str] | None = None, caches: Mapping[str, CacheScale] | None = None,
) -> ExportResult:  # fmt: skip
    """Write what `plan` says, and read it back; see `export_hf`.

    Args:
        remedy: for a weight that the layout cannot hold.
        texts: further files by name.
        caches: scales of keys and values by tensor name.
    """
    for item in plan.quantized:
        reason = writer.obstacle(item.weight)
        if reason:
            raise TargetError(
                f"the layout '{writer.name}' cannot hold a weight", where=item.module, why=reason,
                remedy=remedy,
            )  # fmt: skip
    directory, caches = request.directory, caches or {}
    companions = copy_companions(request.source, directory)
    dtype = _compute_dtype(program, plan)
    config = _config(plan, writer, dtype)
    for name, text in {CONFIG: json.dumps(config, indent=2) + "\n", **(texts or {})}.items():
        with os_errors(f"writing {name}", str(directory)):
            (directory / name).write_text(text)
    sizes: dict[str, int] = {}
    files = write_shards(directory, _tensors(program, plan, writer, sizes, caches))
    _read_back(directory, program, plan, caches)
    return ExportResult(
        engine="huggingface",
        info={
            "layout": writer.name if KEY in config else "none",
            "quantization_config": config.get(KEY),
            "files": sorted(set(files.values())),
            "quantized_linears": len(plan.quantized),
            "copied": list(plan.copied),
            "companions": companions,
        },
        weight_bytes=sum((directory / name).stat().st_size for name in set(files.values())),
        tensor_bytes=sizes,
    )


def _config(plan: FolderPlan, writer: LayoutWriter, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config under the written type and quantization."""
    config = {key: value for key, value in plan.info.config.items() if key not in (KEY, "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.quantized or plan.caches:
        schemes = {item.module: item.weight.scheme for item in plan.quantized}
        config[KEY] = writer.config(schemes, plan.linears)
    return config


def _compute_dtype(program: Program, plan: FolderPlan) -> torch.dtype:
    """The type that linears compute in: of the quantized ones' scales, else of the largest weight."""
    scales = [item.weight.scale for item in plan.quantized if item.weight.scheme.format != "nvfp4"]
    if scales:
        return scales[0].dtype
    weights = [program.weight(name) for name in plan.plain.values()]
    floating = [tensor for tensor in weights if tensor.is_floating_point()]
    return max(floating, key=lambda tensor: tensor.numel()).dtype


def _tensors(
    program: Program, plan: FolderPlan, writer: LayoutWriter, sizes: dict[str, int],
    caches: Mapping[str, CacheScale],
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """What is written, in the source's order as far as it goes; fills `sizes` by the program's names."""
    dtype = _compute_dtype(program, plan)
    for name, weight in plan.plain.items():
        tensor = program.weight(weight).detach()
        sizes[weight] = tensor.nbytes
        yield name, tensor
    for item in plan.quantized:
        for part, tensor in writer.tensors(item.weight).items():
            kind = "scale" if "scale" in part else "zero" if "zero" in part else "codes"
            name = f"{item.stem}_{kind}"
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
            yield f"{item.module}.{part}", tensor
    for name, cache in caches.items():
        sizes[cache.name] = cache.scale.nbytes
        yield name, cache.scale.float().reshape(())
    for name, tensor in _copied(plan, dtype):
        sizes[name] = tensor.nbytes
        yield name, tensor


def _copied(plan: FolderPlan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    reader = TensorReader(plan.info.path, plan.info.tensors)
    for name in plan.copied:
        tensor = reader.read(name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _read_back(directory: Path, program: Program, plan: FolderPlan, caches: Mapping[str, CacheScale]) -> None:
    """Compare the written folder with the program, through the code that captures such folders."""
    try:
        info = check_folder(directory)
        folder = quantized_folder(info)
        _compare_quantized(folder.layout if folder else None, plan, directory)
        _compare_plain(info, program, plan, directory)
        found = folder.cache_scales() if folder else {}
        for name in caches.keys() | found.keys():
            if name not in caches or name not in found or not _same(found[name], caches[name].scale):
                raise _differs(directory, name, "its scale differs")
    except ArtifactError:
        raise
    except OptcError as error:
        raise _differs(directory, str(error.where or ""), str(error)) from error


def _compare_quantized(layout: Any, plan: FolderPlan, directory: Path) -> None:
    found = set(layout.modules()) if layout is not None else set()
    if found != {item.module for item in plan.quantized}:
        raise _differs(directory, CONFIG, "the quantized linears are not those of the program")
    for item in plan.quantized:
        read: QuantizedWeight = layout.read(item.module)
        mine = item.weight
        same = torch.equal(_bytes(read.codes), _bytes(mine.codes)) and _same_zero(read, mine)
        pairs = (
            (read.scale, mine.scale),
            (read.global_scale, mine.global_scale),
            (read.input_scale, mine.input_scale),
        )
        same = same and all(_same(left, right) for left, right in pairs)
        same = same and _same(read.input_factor, _factor(mine.input_factor))
        alike = [
            (one.scheme.bits, one.scheme.group_size, one.scheme.activations, one.scheme.static)
            for one in (read, mine)
        ]
        if not same or alike[0] != alike[1]:
            raise _differs(directory, item.module, "its codes, scales or zero points differ")


def _same(read: Tensor | None, mine: Tensor | None) -> bool:
    """Equal in the type of `mine`; float32 holds all others."""
    if read is None or mine is None:
        return read is mine
    return torch.equal(_bytes(read.to(mine.dtype)), _bytes(mine))


def _factor(factor: Tensor | None) -> Tensor | None:
    """A factor of ones is none."""
    return None if factor is None or bool((factor == 1).all()) else factor


def _same_zero(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    """Equal zero points, where none is the middle code everywhere."""
    middle = 2 ** (left.scheme.bits - 1)
    if left.zero is not None and right.zero is not None:
        return torch.equal(left.zero, right.zero)
    given = left.zero if left.zero is not None else right.zero
    return given is None or bool((given == middle).all())


def _compare_plain(info: CheckpointInfo, program: Program, plan: FolderPlan, directory: Path) -> None:
    reader = TensorReader(info.path, info.tensors)
    for name, weight in plan.plain.items():
        mine = program.weight(weight).detach().contiguous()
        read = reader.read(name, mine.dtype)
        if read.shape != mine.shape or not torch.equal(_bytes(read), _bytes(mine)):
            raise _differs(directory, name, "its bytes differ")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differs(directory: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(
        "a weight was not written as it is", where=f"{directory}: {name}", why=why,
        remedy="check the disk and compile again",
    )  # fmt: skip
