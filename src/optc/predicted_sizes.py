"""The bytes that a compile will write, from a model without weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from optc.compiler.analysis.module_linears import expert_stacks, linear_shape, model_linears
from optc.compiler.analysis.name_patterns import check_patterns, fits
from optc.compiler.artifact.sizes import Sizes
from optc.compiler.capture.facts import generates_from_an_encoder, reads_pictures, text_config
from optc.compiler.formats.group_sizes import size_for
from optc.compiler.model_folder.dtypes import DTYPES
from optc.compiler.target.options import CompileOptions, Quantization
from optc.compiler.target.target import Step, StoredWeights, Target
from optc.passes.quantization.head import QuantizeHead

_OWN_BLOCK = 64
"""Columns that share a scale, about, of methods with blocks of their own."""


def quantizable(skeleton: Any, ignore: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Weight name -> (N, K) of the linears that a quantization pass takes. Stacked experts are linears `name[e]`.

    Raises:
        NoMatchError: a pattern of `ignore` matches no weight of the model.
    """
    check_patterns("ignore", ignore, [name for name, _ in skeleton.named_parameters(remove_duplicate=False)])
    found = {f"{name}.weight": linear_shape(module) for name, module in model_linears(skeleton).items()}
    for name, (experts, rows, columns) in expert_stacks(skeleton).items():
        found |= {f"{name}[{index}]": (rows, columns) for index in range(experts)}
    words = _language_model(skeleton)
    return {
        name: shape
        for name, shape in found.items()
        if name.startswith(words) and not any(fits(name.partition("[")[0], pattern) for pattern in ignore)
    }


def _language_model(skeleton: Any) -> str:
    """What the names of a multimodal model's captured part begin with; "" where all of a model is captured."""
    config = getattr(skeleton, "config", None)
    if text_config(config) is config or generates_from_an_encoder(type(skeleton)):
        return ""
    decoder = skeleton.get_decoder()
    name = next(name for name, module in skeleton.named_modules() if module is decoder)
    return f"{name}." if name else ""


def predicted_sizes(
    skeleton: Any, target: Target, options: CompileOptions, steps: Sequence[Step], source: int | None
) -> Sizes:
    """What the recipe's steps make of each parameter; a tied one counts once.

    Args:
        options: with the group size settled.
        source: bytes of the source's weight files.
    """
    width, chosen = DTYPES[options.dtype].itemsize, options.quantization
    tables, tied = _tables(skeleton)
    rewrite = next((step.rewrite for step in steps if isinstance(step.rewrite, QuantizeHead)), None)
    ignored = _ignored(skeleton, () if rewrite is None else rewrite.ignore)
    linears = {name.partition("[")[0] for name in quantizable(skeleton)}
    rounded: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, shape in quantizable(skeleton, chosen.ignore).items() if chosen is not None else ():
        rounded[name.partition("[")[0]].append(shape)
    found: Counter[str] = Counter()
    for name, parameter in skeleton.named_parameters():
        part = tables.get(id(parameter), "linears" if name in linears else "rest")
        if chosen is not None and name in rounded:
            for rows, columns in rounded[name]:
                bits = chosen.bits or chosen.average_bits or 4
                group = _group_size(chosen, columns)
                if group is None:
                    found[part] += rows * columns * width
                    continue
                form = _Form(bits, group, chosen.symmetric)
                found.update(form.sizes(part, rows, columns, target.stored, width))
        elif rewrite is not None and part in ("embedding", "head") and id(parameter) not in ignored:
            rows, columns = (int(size) for size in parameter.shape)
            group = rewrite.size_for(columns)
            if group is None:
                found[part] += parameter.numel() * width
                continue
            form = _Form(rewrite.bits, group, rewrite.symmetric)
            found.update(form.sizes(part, rows, columns, target.stored, width))
        else:
            found[part] += parameter.numel() * width
    parts: dict[str, Any] = dict(found)
    return Sizes(source=source, tied=tied, **parts)


def _group_size(chosen: Quantization, columns: int) -> int | None:
    """Of a linear of K = `columns`, 0 for a row; None where it is left as it is."""
    if isinstance(chosen.group_size, tuple):
        return size_for(columns, chosen.group_size)
    size = _OWN_BLOCK if chosen.group_size is None else chosen.group_size
    return size if columns % (size or 1) == 0 else 0


class _Form:
    """How a weight is rounded."""

    def __init__(self, bits: float, group_size: int, symmetric: bool) -> None:
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def sizes(self, part: str, rows: int, columns: int, stored: StoredWeights, width: int) -> dict[str, int]:
        """Bytes of codes [rows, columns] under the name of their part, and of their scales and zero points."""
        whole = round(self.bits)
        bits, size = stored.layout(columns, whole, self.group_size) if whole == self.bits else (self.bits, 0)
        groups = columns // (size or self.group_size or columns)
        return {
            part: int(rows * columns * bits / 8),
            "scales": rows * groups * (stored.scale_bytes or width),
            "zero_points": 0 if self.symmetric else rows * -int(-groups * (stored.zero_bits or bits) // 8),
        }


def _tables(skeleton: Any) -> tuple[dict[int, str], bool]:
    """The parts of the embedding's and the head's weights by their identity, and whether they are one."""
    if not hasattr(skeleton, "get_input_embeddings") or reads_pictures(type(skeleton)):
        return {}, False  # no table of tokens, or one of several
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    named = {
        id(module.weight): part for part, module in (("head", head), ("embedding", embedding)) if module is not None
    }
    return named, embedding is not None and head is not None and embedding.weight is head.weight


def _ignored(skeleton: Any, patterns: Sequence[str]) -> set[int]:
    """Parameters with a name, of all that they have, that a pattern matches."""
    return {
        id(parameter)
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
        if any(fits(name, pattern) for pattern in patterns)
    }
