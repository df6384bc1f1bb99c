"""The commands of docs/ that are run here, one after the other in one folder, and why the others are not.

Every command of every page stands in one of the tables: it is run here, by a test of its page, or not at all.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import optc as call
from conftest import ROOT
from once import once, short_example
from ort_driver import saturates
from pages import commands

SMALL = {  # what only makes a command short
    "compile": {"awq|gptq|smoothquant": "--calibration-samples 2 --calibration-seq-len 32"},
    "quantize": {"": "--calibration-samples 2 --calibration-seq-len 32"},
    "eval": {"": "--windows 1"},
    "compare": {"--text": "--windows 1"},
}
FILLED = {
    "MODEL": "examples/fiction-3m",
    "TARGET": "onnx-cpu",
    "METHOD": "rtn",
    "FILE.pt2": "net.pt2",
    "OUT": "out/made",
}
RUN = {
    "compile.md": [
        "compile MODEL --target TARGET --quant METHOD --dtype fp32 -o OUT",
        "compile FILE.pt2 --target onnx-cpu -o OUT",
    ],
    "deploy.md": [
        "compile examples/fiction-3m --target edge --quant rtn -o out/edge",
        "bundle out/edge -o out/bundle --with-libraries",
        "sign out/fiction-inductor --key maker.pem --new-key",
        "verify out/fiction-inductor --key maker.pem.pub",
        "compile MODEL --target vllm --quant awq --dtype bf16 --layout compressed-tensors -o OUT",
    ],
    "quantize.md": [
        "compile net.pt2 --target onnx-cpu --quant int8-static --calibration images.npz -o out/net-int8",
        "compare out/net out/net-int8 --inputs images.npz --samples 50",
        "eval OUT --text book.txt --windows 16 --top-k 10",
        "eval --compare out/rtn out/gptq out/awq --text book.txt",
        "compare out/rtn out/gptq out/awq --text book.txt -o comparison.html",
    ],
    "train.md": ["plan --train recipe.yaml --world-size 2"],
    "trtllm.md": ["compile MODEL --target trtllm --quant awq --dtype bf16 -o OUT"],
    "write-a-pass.md": [
        "compile examples/fiction-3m --target onnx-cpu --insert-pass after:fuse-norm=merge-projections -o out/fiction-own"
    ],
}
PAGES = {"embeddings.md": "export/test_embeddings.py", "speculative.md": "cli/test_speculative.py"}
"""Pages whose commands a test of their own runs."""
LIKE = {  # page -> why its other commands are only parsed; a file runs the same on models that it makes
    "cuda.md": ("they need a GPU", "gpu/test_docs_cuda.py"),
    "deploy.md": ("they need a GPU, ExecuTorch or TensorRT", "export/test_executorch.py"),
    "encoder-decoder.md": ("their models are on the hub", "export/test_encoder_decoder.py"),
    "gpu.md": ("they need a GPU, or build for one", "exporters/trt/test_builders.py"),
    "pictures.md": ("their models are on the hub", "export/test_pictures.py"),
    "quantize.md": ("minutes of calibration or of tries", "cli/test_search.py"),
    "serve.md": ("they do not end by themselves, or ask one that runs", "cli/test_serve.py"),
    "tensorrt.md": ("they need TensorRT", "cli/test_trt_commands.py"),
    "train.md": ("minutes of training", "cli/test_train.py"),
}
PAGE = {page.name: list(commands(page)) for page in sorted((ROOT / "docs").glob("*.md"))}


def test_every_command_is_run_or_said_why_not() -> None:
    readme = set(commands(ROOT / "README.md"))
    for page, found in PAGE.items():
        ran = set(RUN.get(page, ()))
        assert ran <= set(found), f"{page} has other commands: {ran - set(found)}"
        left = set(found) - ran - readme
        assert not left or page in PAGES or page in LIKE, f"{page}: nothing is said of {left}"
    for file in (*PAGES.values(), *(file for _, file in LIKE.values())):
        assert (ROOT / "tests" / file).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_test_reads_it(page: str) -> None:
    assert page in (ROOT / "tests" / PAGES[page]).read_text()


class Net(torch.nn.Module):
    """What the pages call net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def place() -> Path:
    """A folder like the repository's, with what the commands read: a shorter example, and what other commands made."""

    def make(folder: Path) -> None:
        (folder / "examples").mkdir()
        (folder / "examples" / "fiction-3m").symlink_to(short_example(1))
        text = (ROOT / "examples" / "book.txt").read_text()[:8000]
        (folder / "book.txt").write_text(text)
        torch.manual_seed(0)
        example = (torch.randn(2, 3, 8, 8),)
        batch = {0: torch.export.Dim("batch")}
        torch.export.save(torch.export.export(Net(), example, dynamic_shapes=(batch,)), folder / "net.pt2")
        np.savez(folder / "images.npz", images=torch.randn(60, 3, 8, 8).numpy())
        (folder / "recipe.yaml").write_text(
            json.dumps(
                {"recipe": "finetune", "model": str(short_example()), "data": {"text": str(folder / "book.txt")}}
            )
        )

    return once("docs-commands", make)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_commands_of_the_page_run(page: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, on a model of fewer layers, with fewer samples; an output is written over the one before."""
    for item in place.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    for command in RUN[page]:
        name, *rest = shlex.split(command)
        flags = [FILLED.get(item, item) for item in rest]
        if name == "eval" or (name, page) == ("compare", "quantize.md"):
            _made_before(flags)
        if name == "sign":
            shutil.copytree("out/edge", "out/fiction-inductor")
        short = next((text for part, text in SMALL.get(name, {}).items() if re.search(part, command)), "")
        if name == "compile" and "-o" in flags:
            flags.append("--force")
        refused = "out/net-int8" in flags and name == "compare" and saturates()  # by this processor, in integers
        assert call(name, *flags, *short.split()) == (4 if refused else 0), command


def _made_before(flags: list[str]) -> None:
    """Artifacts that a command reads and no command of its page makes."""
    for item in flags:
        path = Path(item)
        if re.fullmatch(r"out/[a-z]+", item) and not path.exists():
            if item == "out/net":
                assert call("compile", "net.pt2", "--target", "onnx-cpu", "-o", item) == 0
            elif (first := Path("out/made")).exists():
                shutil.copytree(first, path)
            else:
                assert call("compile", FILLED["MODEL"], "--target", "onnx-cpu", "--quant", "rtn", "-o", item) == 0
                if path != first:
                    shutil.copytree(path, first)
