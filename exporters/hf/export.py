"""Write a Program back as a Hugging Face model folder, quantized linears in a standard layout, and read it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    if request.options.layout and not plan.quantized and not plan.key_values:
        raise TargetError(
            "--layout says how quantized weights are written", why="nothing is quantized", remedy="add --quant"
        )
    writer = layout_writer(request.options.layout or LAYOUTS[0], [item.weight for item in plan.quantized])
    written = write_model(plan, program.weight, writer, request.directory, request.source)
    return ExportResult(
        engine="huggingface",
        info={
            "layout": writer.name if KEY in written.config else "none",
            "quantization_config": written.config.get(KEY),
            "files": sorted(set(written.files.values())),
            "quantized_linears": len(plan.quantized),
            "copied": list(plan.copied),
            "companions": written.companions,
        },
        weight_bytes=sum((request.directory / name).stat().st_size for name in set(written.files.values())),
        tensor_bytes=written.sizes,
    )


@dataclass(frozen=True)
class WrittenFolder:
    """What `write_model` wrote.

    Attributes:
        config: config.json.
        files: tensor -> file.
        companions: copied files.
        sizes: bytes of the tensors, by the names that the plan gives their sources.
    """

    config: dict[str, Any]
    files: dict[str, str]
    companions: list[str]
    sizes: dict[str, int]


def write_model(
    plan: FolderPlan,
    weight: Callable[[str], Tensor],
    writer: LayoutWriter,
    directory: Path,
    source: Path | None,
) -> WrittenFolder:
    """Write the model folder that a plan lays out, read it back, and compare it bit by bit.

    Args:
        weight: the tensor of a name that `plan.plain` maps to.
        source: where the tokenizer and other companions come from.

    Raises:
        TargetError: the layout cannot hold a weight; names it.
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    for item in plan.quantized:
        reason = writer.obstacle(item.weight)
        if reason:
            raise TargetError(
                f"the layout '{writer.name}' cannot hold a weight", where=item.module, why=reason,
                remedy=f"choose another of --layout {', '.join(LAYOUTS)}, or other quantization options",
            )  # fmt: skip
    companions = copy_companions(source, directory)
    dtype = _compute_dtype(weight, plan)
    config = _config(plan, writer, dtype)
    with os_errors("writing config.json", str(directory)):
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    sizes: dict[str, int] = {}
    files = write_shards(directory, _tensors(weight, plan, writer, dtype, sizes))
    _read_back(directory, weight, plan)
    return WrittenFolder(config, files, companions, sizes)


def _config(plan: FolderPlan, writer: LayoutWriter, dtype: torch.dtype) -> dict[str, Any]:
    """The source's config under the written type and quantization."""
    config = {key: value for key, value in plan.info.config.items() if key not in (KEY, "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    if plan.quantized or plan.key_values:
        schemes = {item.module: item.weight.scheme for item in plan.quantized}
        config[KEY] = writer.config(schemes, plan.linears) | writer.key_values(plan.key_values)
    return config


def _compute_dtype(weight: Callable[[str], Tensor], plan: FolderPlan) -> torch.dtype:
    """The type that linears compute in: of the quantized ones' scales, else of the largest weight."""
    if plan.quantized:
        return plan.quantized[0].weight.scale.dtype
    weights = [weight(name) for name in plan.plain.values()]
    floating = [tensor for tensor in weights if tensor.is_floating_point()]
    return max(floating, key=lambda tensor: tensor.numel()).dtype


def _tensors(
    weight: Callable[[str], Tensor],
    plan: FolderPlan,
    writer: LayoutWriter,
    dtype: torch.dtype,
    sizes: dict[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """What is written, in the source's order as far as it goes; fills `sizes` by the names of the sources."""
    for name, held in plan.plain.items():
        tensor = weight(held).detach()
        sizes[held] = tensor.nbytes
        yield name, tensor
    for item in plan.quantized:
        for part, tensor in writer.tensors(item.weight).items():
            kind = "scale" if "scale" in part else "zero" if "zero" in part else "codes"
            name = f"{item.stem}_{kind}"
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
            yield f"{item.module}.{part}", tensor
    for name, tensor in _copied(plan, dtype):
        sizes[name] = tensor.nbytes
        yield name, tensor


def _copied(plan: FolderPlan, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    reader = TensorReader(plan.info.path, plan.info.tensors)
    for name in plan.copied:
        tensor = reader.read(name)
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _read_back(directory: Path, weight: Callable[[str], Tensor], plan: FolderPlan) -> None:
    """Compare the written folder with its sources, through the code that captures such folders."""
    try:
        info = check_folder(directory)
        folder = quantized_folder(info)
        _compare_quantized(folder.layout if folder else None, plan, directory)
        _compare_plain(info, weight, plan, directory)
    except ArtifactError:
        raise
    except OptcError as error:
        raise _differs(directory, str(error.where or ""), str(error)) from error


def _compare_quantized(layout: Any, plan: FolderPlan, directory: Path) -> None:
    found = set(layout.modules()) if layout is not None else set()
    if found != {item.module for item in plan.quantized}:
        raise _differs(directory, CONFIG, "the quantized linears are not those of the model")
    for item in plan.quantized:
        read: QuantizedWeight = layout.read(item.module)
        mine = item.weight
        same = torch.equal(read.codes.view(torch.uint8), mine.codes.view(torch.uint8))
        same = same and torch.equal(read.scale.to(mine.scale.dtype), mine.scale) and _same_zero(read, mine)
        alike = [(one.scheme.bits, one.scheme.group_size, one.scheme.activations) for one in (read, mine)]
        if not same or alike[0] != alike[1]:
            raise _differs(directory, item.module, "its codes, scales or zero points differ")


def _same_zero(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    """Equal zero points, where none is the middle code everywhere."""
    middle = 2 ** (left.scheme.bits - 1)
    if left.zero is not None and right.zero is not None:
        return torch.equal(left.zero, right.zero)
    given = left.zero if left.zero is not None else right.zero
    return given is None or bool((given == middle).all())


def _compare_plain(
    info: CheckpointInfo, weight: Callable[[str], Tensor], plan: FolderPlan, directory: Path
) -> None:
    reader = TensorReader(info.path, info.tensors)
    for name, held in plan.plain.items():
        mine = weight(held).detach().contiguous()
        read = reader.read(name, mine.dtype)
        if read.shape != mine.shape or not torch.equal(_bytes(read), _bytes(mine)):
            raise _differs(directory, name, "its bytes differ")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _differs(directory: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(
        "a weight was not written as it is", where=f"{directory}: {name}", why=why,
        remedy="check the disk and compile again",
    )  # fmt: skip
