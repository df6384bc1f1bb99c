"""The code that task files of lm-eval run: functions of Python, from files beside them or any module that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from optc.compiler.files import read_plain

_ENDINGS = (".yaml", ".yml")
_MOST_BYTES = 1 << 20


def named_code(paths: Iterable[Path]) -> list[str]:
    """'function (file)' of each function that task files name by `!function`, in them or in files that they include.

    Args:
        paths: files, and folders of them. What is no YAML names nothing: the harness says what is wrong with it.

    Raises:
        InputError: a file is large beyond measure, or no plain file.
    """
    pending = [file for path in paths for file in _files(path)]
    seen: set[Path] = set()
    found: dict[str, None] = {}
    while pending:
        file = pending.pop(0).resolve()
        if file in seen:
            continue
        seen.add(file)
        for node in _nodes(file):
            if node.tag == "!function":
                found[f"{node.value} ({file})"] = None
            elif isinstance(node, yaml.MappingNode):
                included = (item for key, value in node.value if key.value == "include" for item in _scalars(value))
                pending += [file.parent / name for name in included if (file.parent / name).exists()]
    return list(found)


def _files(path: Path) -> list[Path]:
    return [path] if not path.is_dir() else sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS)


def _nodes(file: Path) -> Iterator[yaml.Node]:
    """The nodes of a file, each once: their tags are resolved, whichever way they are written."""
    data = read_plain(file, "reading the task", most=_MOST_BYTES)
    try:
        root = yaml.compose(data, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    pending, seen = [root], set[int]()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            pending += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _scalars(node: yaml.Node) -> list[str]:
    """The texts of a scalar, or of a list of them."""
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return [part.value for part in parts if isinstance(part, yaml.ScalarNode)]
