"""The command line, run in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from optc.cli.main import main


def optc(*args: object) -> int:
    """The exit code of `optc ARGS`."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return int(caught.value.code or 0)


def optc_json(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    """What `optc ARGS --json` prints; it must exit with 0."""
    capsys.readouterr()
    assert optc(*args, "--json") == 0
    return json.loads(capsys.readouterr().out)
