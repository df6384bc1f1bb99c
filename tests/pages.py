"""The commands that stand in code blocks of README.md and docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(*files: Path) -> Iterator[str]:
    """What stands behind `optc` in code blocks: without comments, with what is optional, with the first of alternatives."""
    for file in files:
        for block in FENCED.findall(file.read_text()):
            for line in block.splitlines():
                line = re.sub(r"\s#.*", "", line).strip().removeprefix("$ ")
                line = re.sub(r"\[([^]|]*)\|?[^]]*\]", r"\1", line)
                line = re.sub(r"(\S+?)\|\S+", r"\1", line)
                for part in line.split(";"):
                    if found := re.match(r"(?:torchrun .* -m )?optc (.*)", part.strip()):
                        yield re.sub(r"\s+", " ", found[1])
