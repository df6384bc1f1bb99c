"""Write a Program back as a Hugging Face model folder, quantized linears in a standard layout, and read it back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optc.compiler.artifact.engines import HUGGINGFACE
from optc.compiler.artifact.manifest import OpenedRecord
from optc.compiler.diagnostics import ArtifactError, OptcError, TargetError, os_errors
from optc.compiler.files import side_by_side
from optc.compiler.formats.layouts import QuantizedWeight
from optc.compiler.formats.layouts.config import KEY
from optc.compiler.formats.layouts.registry import CHOICES, layout_writer
from optc.compiler.formats.layouts.tensors import CPU, TensorReader
from optc.compiler.formats.layouts.writing import LayoutWriter
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder
from optc.compiler.model_folder.quantized import QuantizedFolder, quantized_folder
from optc.compiler.target.target import ExportRequest, ExportResult
from optc.exporters.companions import copy_companions
from optc.exporters.hf.collect import FolderPlan, collect
from optc.exporters.hf.drafts import carry
from optc.exporters.hf.fused import check_fused
from optc.exporters.hf.loader_rules import check_loader_rules
from optc.exporters.hf.serving import FILE, vllm_options
from optc.exporters.hf.shards import write_shards
from optc.exporters.options.hf import FolderOptions

CONFIG = "config.json"


def export_hf(program: Program, request: ExportRequest) -> ExportResult:
    """Write a model folder: config.json, safetensors, tokenizer and companions.

    Every tensor comes from the program, not from the source folder, but for those that the graph does not read. What
    was written is read back through `optc.compiler.formats.layouts` and compared with the program bit by bit.

    Raises:
        TargetError: a weight has no place in a model folder, or the layout cannot hold it, or a linear is quantized unlike
            one that vLLM joins with it; names it.
        ArtifactError: what was read back is not what was written.
        ResourceError, InputError: the disk is full or not writable.
    """
    plan = collect(program, request.source, trust_remote_code=request.trust_remote_code)
    options = request.of(FolderOptions)
    layout = options.layout
    if layout is not None and not plan.quantized and not plan.key_values:
        raise TargetError(
            "--layout says how quantized weights are written",
            why="nothing is quantized",
            remedy="add --quant",
        )
    check_fused(plan.quantized)
    writer = layout_writer(layout or CHOICES[0], [item.weight for item in plan.quantized])
    told = vllm_options(options, carry(options, request.directory))
    texts = {} if told is None else {FILE: told}
    result = write_model(plan, program.weight, writer, request.directory, request.source, texts)
    return replace(result, info={**result.info, "serving_options": FILE}) if texts else result


def write_model(
    plan: FolderPlan,
    weight: Callable[[str], Tensor],
    writer: LayoutWriter,
    directory: Path,
    source: Path | None,
    texts: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write the model folder that a plan lays out, read it back, and compare it bit by bit; see `export_hf`.

    Args:
        weight: the tensor of a name that `plan.plain` or `plan.scales` maps to.
        source: where the tokenizer and other companions come from.
        texts: further files by name.
    """
    weight = plan.tensors(weight)
    for item in plan.quantized:
        reason = writer.obstacle(item.weight)
        if reason:
            raise TargetError(
                f"the layout '{writer.name}' cannot hold a weight",
                where=item.module,
                why=reason,
                remedy=writer.remedy,
            )
    dtype = _compute_dtype(weight, plan)
    config, scales = _config(plan, weight, writer, dtype)
    companions = copy_companions(source, directory, code=plan.info.trusted)
    for name, text in {CONFIG: json.dumps(config, indent=2) + "\n", **(texts or {})}.items():
        with os_errors(f"writing {name}", str(directory)):
            (directory / name).write_text(text)
    sizes = {name: weight(name).nbytes for pair in plan.scales.values() for name in pair}
    tensors = itertools.chain(_tensors(plan, weight, writer, dtype, sizes), scales.items())
    files = write_shards(directory, tensors)
    _read_back(directory, weight, plan)
    own = plan.info.trusted and "auto_map" in plan.info.config
    return ExportResult(
        engine=HUGGINGFACE,
        opened=OpenedRecord(opened=False, why="the model's class is code of the folder's own") if own else None,
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


def _config(
    plan: FolderPlan, weight: Callable[[str], Tensor], writer: LayoutWriter, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The source's config under the written type and quantization, and the scales of keys and values by name."""
    config = {key: value for key, value in plan.info.config.items() if key not in (KEY, "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if plan.untied:
        config["tie_word_embeddings"] = False
    said: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if plan.key_values is not None:
        scales = {module: (weight(keys), weight(values)) for module, (keys, values) in plan.scales.items()}
        said, tensors = writer.key_values(plan.key_values, scales)
    if plan.quantized or said:
        schemes = {item.module: item.weight.scheme for item in plan.quantized}
        config[KEY] = writer.config(schemes, plan.linears, plan.head) | said
    return config, tensors


def _compute_dtype(weight: Callable[[str], Tensor], plan: FolderPlan) -> torch.dtype:
    """The type that linears compute in: of the quantized ones' scales, else of the largest weight."""
    scales = [item.weight.scale for item in plan.quantized if item.weight.format.scale is None]
    if scales:
        return scales[0].dtype
    weights = [weight(name) for name in plan.plain.values()]
    floating = [tensor for tensor in weights if tensor.is_floating_point()]
    return max(floating, key=lambda tensor: tensor.numel()).dtype


def _tensors(
    plan: FolderPlan,
    weight: Callable[[str], Tensor],
    writer: LayoutWriter,
    dtype: torch.dtype,
    sizes: dict[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """Weights, in the source's order as far as it goes; fills `sizes` by the names that the plan gives them."""
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
    """Compare the written folder with what the plan names, through the code that captures such folders.

    What was read is unpacked and compared where the program's weights are.
    """
    try:
        info = check_folder(directory, trust_remote_code=plan.info.trusted)
        folder = quantized_folder(info, _device(weight, plan))
        _compare_quantized(folder.layout if folder else None, plan, directory)
        if folder is not None and KEY in info.config:
            check_loader_rules(info.config[KEY], folder.modules, plan.linears)
        _compare_plain(info, weight, plan, directory)
        _compare_key_values(folder, weight, plan, directory)
    except (ArtifactError, TargetError):
        raise
    except OptcError as error:
        raise _differs(directory, str(error.where or ""), str(error)) from error


def _compare_key_values(
    folder: QuantizedFolder | None, weight: Callable[[str], Tensor], plan: FolderPlan, directory: Path
) -> None:
    found = folder.key_values if folder is not None else None
    if found is None or folder is None:
        if plan.key_values is not None:
            raise _differs(directory, CONFIG, "keys and values are not rounded")
        return
    if found.scheme != plan.key_values or set(found.attentions) != set(plan.scales):
        raise _differs(directory, CONFIG, "keys and values are not rounded as those of the model")
    for module in found.attentions:
        read = found.read(folder.reader, module)
        for name, scale, mine in zip(found.names(module), read, plan.scales[module], strict=True):
            if not _same(scale, weight(mine)):
                raise _differs(directory, name, "its scale differs")


def _compare_quantized(layout: Any, plan: FolderPlan, directory: Path) -> None:
    found = set(layout.modules()) if layout is not None else set()
    if found != {item.module for item in plan.quantized}:
        raise _differs(directory, CONFIG, "the quantized linears are not those of the model")
    nbytes = sum(item.weight.codes.nbytes for item in plan.quantized)
    same = side_by_side(lambda item: _same_weight(layout.read(item.module), item.weight), plan.quantized, nbytes)
    for item, equal in zip(plan.quantized, same, strict=True):
        if not equal:
            raise _differs(directory, item.module, "its codes, scales or zero points differ")


def _same_weight(read: QuantizedWeight, mine: QuantizedWeight) -> bool:
    """Whether what a folder says of a linear is what was written."""
    pairs = (
        (read.scale, mine.scale),
        (read.global_scale, mine.global_scale),
        (read.input_scale, mine.input_scale),
        (read.input_factor, _factor(mine.input_factor)),
    )
    alike = [(of.bits, of.group_size, of.activations, of.static, of.rotation) for of in (read.scheme, mine.scheme)]
    same = alike[0] == alike[1] and torch.equal(_bytes(read.codes), _bytes(mine.codes)) and _same_zero(read, mine)
    return same and all(_same(left, right) for left, right in pairs)


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


def _compare_plain(info: CheckpointInfo, weight: Callable[[str], Tensor], plan: FolderPlan, directory: Path) -> None:
    reader = TensorReader(info.path, info.tensors, _device(weight, plan))
    for name, held in plan.plain.items():
        mine = weight(held).detach().contiguous()
        read = reader.read(name, mine.dtype)
        if read.shape != mine.shape or not torch.equal(_bytes(read), _bytes(mine)):
            raise _differs(directory, name, "its bytes differ")


def _device(weight: Callable[[str], Tensor], plan: FolderPlan) -> torch.device:
    """Where the weights of the program are."""
    return next((weight(held).device for held in plan.plain.values()), CPU)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _differs(directory: Path, name: str, why: str) -> ArtifactError:
    return ArtifactError(
        "a written weight differs from the one in memory",
        where=f"{directory}: {name}",
        why=why,
        remedy="check the disk and compile again",
    )
