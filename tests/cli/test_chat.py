"""`optc run --chat`, as a person or a script uses it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from command_line import optc
from once import example_artifact, once
from serving_server import TEMPLATE

from optc.compiler.artifact.folder import finish, read_manifest

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def chatty() -> Path:
    """The example's artifact with a chat template."""

    def make(folder: Path) -> None:
        shutil.copytree(example_artifact("onnx-cpu"), folder / "artifact")
        path = folder / "artifact" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
        manifest = read_manifest(folder / "artifact")
        finish(folder / "artifact", msgspec.structs.replace(manifest, files=()))

    return once("chatty", make) / "artifact"


def test_a_chat(chatty: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/reset\nHello\n/what\n/exit\nnever read\n"))
    assert optc("run", chatty, "--chat", "--max-new-tokens", 8, "--threads", 1, "--system", "Be kind.") == 0
    out, err = capsys.readouterr()
    half = len(out) // 2
    assert len(out) > 10
    assert out[:half] == out[half:]
    assert "unknown command /what" in err
    assert err.count("cut after 8 tokens") == 2


def test_what_has_no_effect_is_refused(chatty: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in (("--prompt", "x"), ("--prompt-tokens", "5"), ("--json",), ("--ignore-eos",)):
        assert optc("run", chatty, "--chat", *flag) == 2
        assert f"{flag[0]} has no effect with --chat" in capsys.readouterr().err
    assert optc("run", chatty, "--prompt", "x", "--system", "y") == 2


def test_a_model_that_was_not_made_to_chat(capsys: Capture) -> None:
    assert optc("run", example_artifact("onnx-cpu"), "--chat") == 4
    assert "it has no chat template" in capsys.readouterr().err
