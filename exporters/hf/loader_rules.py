"""What vLLM would take for quantized in a written folder, by its own rules of names.

From `vllm/model_executor/layers/quantization` (`compressed_tensors/utils.py`, `utils/gptq_utils.py`,
`utils/quant_utils.py`): a linear is looked up by its name, and one that is joined of several by their names, which must
agree; AWQ's list holds parts of names, GPTQ's patterns are matched with the joined name itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from optc.compiler.bounded_regex import begins_with
from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.joined import joined_names

_KNOWN = ("compressed-tensors", "gptq", "awq", "fp8")


def check_loader_rules(settings: Mapping[str, Any], quantized: Collection[str], linears: Collection[str]) -> None:
    """Hold the `quantization_config` of a folder to its tensors.

    Args:
        quantized: linears whose tensors are codes. linears: all linears, by their names in the folder.

    Raises:
        TargetError: vLLM would look for codes where there are none, or the other way around; names the linear.
    """
    if settings["quant_method"] not in _KNOWN:
        return
    for name, parts in [*((name, (name,)) for name in linears), *joined_names(linears)]:
        taken = _taken(settings, name, parts)
        there = {part in quantized for part in parts}
        if taken not in (None, *there) or len(there) > 1:
            why = "its tensors are codes" if True in there else "its tensors are no codes"
            raise TargetError(
                f"vLLM would not load {name} of this folder",
                where=name,
                why=f"{why}, and by quantization_config it is {'' if taken else 'not '}quantized",
                remedy="use --layout compressed-tensors, or another --ignore",
            )


def _taken(settings: Mapping[str, Any], name: str, parts: Sequence[str]) -> bool | None:
    """Whether a linear is quantized by the config; None where the config does not decide."""
    method = settings["quant_method"]
    if method == "gptq":
        skipped = {any(_negative(rule, name) for rule in settings.get("dynamic", {}))}
    else:
        skipped = {_skipped(settings, method, part) for part in parts}
    if len(skipped) > 1:
        return None
    return not skipped.pop()


def _negative(rule: str, name: str) -> bool:
    return rule.startswith("-:") and begins_with(rule[2:], name)


def _skipped(settings: Mapping[str, Any], method: str, name: str) -> bool:
    if method == "awq":
        return any(part in name for part in settings.get("modules_to_not_convert") or ())
    if method == "compressed-tensors":
        ignored = any(_fits(pattern, name) for pattern in settings["ignore"])
        return ignored or not any(_fits(target, name) or target == "Linear" for target in _targets(settings))
    return name in (settings.get("modules_to_not_convert") or ())


def _fits(pattern: str, name: str) -> bool:
    return begins_with(pattern[3:], name) if pattern.startswith("re:") else pattern == name


def _targets(settings: Mapping[str, Any]) -> Iterator[str]:
    for group in settings["config_groups"].values():
        yield from group["targets"]
