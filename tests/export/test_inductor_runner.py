"""The runner inside artifacts: what it refuses before native code could crash on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from package_driver import Built, packaged
from safetensors.torch import load_file, save_file
from torch import Tensor

from optc.runtime.carried.pt2_runner import Decoder, Package, PackageError, check_host, main, open_folder

pytestmark = pytest.mark.slow
NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture(scope="module")
def built() -> Built:
    return packaged("gpt2-static")


@pytest.fixture(scope="module")
def package(built: Built) -> Package:
    return built.load()


def _inputs(package: Package) -> list[Tensor]:
    ids = torch.tensor([[5, 6, 7]])
    return [ids, torch.ones_like(ids), *package.caches(batch=1, capacity=8)]


def test_a_package_without_weights_is_refused(built: Built) -> None:
    """Its native code would follow null pointers."""
    empty = built.load(weights=False)
    with pytest.raises(PackageError, match="the package has no weights yet: call load_weights first"):
        empty(*_inputs(empty))


def _without(tensors: dict[str, Tensor]) -> None:
    del tensors[NAME]


def _added(tensors: dict[str, Tensor]) -> None:
    tensors["extra"] = torch.zeros(1)


def _transposed(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME].t().contiguous()


def _halved(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, rf"not this package's weights: \['{NAME}'\]"),
        (_added, r"not this package's weights: \['extra'\]"),
        (_transposed, rf"weight {NAME} is float32 \[192, 64\], the package needs float32 \[64, 192\]"),
        (_halved, rf"weight {NAME} is float16 \[64, 192\], the package needs float32 \[64, 192\]"),
    ],
)
def test_wrong_weights_are_refused(
    built: Built, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = load_file(built.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    empty = built.load(weights=False)
    with pytest.raises(PackageError, match=message):
        empty.load_weights(tmp_path / "model.safetensors")
    with pytest.raises(PackageError, match="no weights yet"):
        empty(*_inputs(empty))


def test_truncated_weights_are_refused(built: Built, tmp_path: Path) -> None:
    data = (built.folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(PackageError, match="the weights cannot be read"):
        built.load(weights=False).load_weights(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.tensor([[5, 6, 7]], dtype=torch.int32), "input input_ids is torch.int32"),
        (0, torch.tensor([5, 6, 7]), r"input input_ids is torch.int64 \[3\]"),
        (0, torch.tensor([[5, 6, 128]]), "token ids must be from 0 to 127"),
        (0, torch.tensor([[5, 6, -1]]), "token ids must be from 0 to 127"),
        (1, torch.ones((2, 3), dtype=torch.long), r"input attention_mask is torch.int64 \[2, 3\]"),
        (1, torch.ones((1, 2), dtype=torch.long), "3 new tokens of 2 do not fit caches of 8"),
        (1, torch.ones((1, 9), dtype=torch.long), "3 new tokens of 9 do not fit caches of 8"),
        (1, torch.full((1, 3), 5), "or the mask is not 0 and 1"),
        (2, torch.zeros((1, 4, 16, 8)).transpose(2, 3), "not contiguous"),
        (2, torch.zeros((1, 4, 8, 15)), r"input past_key_values.0.key is torch.float32 \[1, 4, 8, 15\]"),
        (3, torch.zeros((1, 4, 9, 16)), r"input past_key_values.0.value .*'capacity': 8"),
    ],
)
def test_inputs_that_would_crash_are_refused(package: Package, index: int, value: Tensor, message: str) -> None:
    inputs = _inputs(package)
    inputs[index] = value
    with pytest.raises(PackageError, match=message):
        package(*inputs)


def test_counts_and_lengths(package: Package) -> None:
    with pytest.raises(PackageError, match="2 inputs given, the package takes 4"):
        package(*_inputs(package)[:2])
    decoder = Decoder(package, batch=1, capacity=4)
    decoder.prefill([[5, 6, 7]])
    decoder.step([8])
    with pytest.raises(PackageError, match="5 tokens do not fit the capacity of 4"):
        decoder.step([9])
    with pytest.raises(PackageError, match="one row of at least one token is needed for each of 1"):
        decoder.prefill([[]])


def test_max_seq_len_limits_the_context(built: Built, package: Package) -> None:
    assert built.result.info["context_length"] == 200
    ids = torch.tensor([[5]])
    mask = torch.ones((1, 201), dtype=torch.long)
    with pytest.raises(PackageError, match="1 new tokens of 201 do not fit caches of 200"):
        package(ids, mask, *package.caches(batch=1, capacity=300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "1.13"}, "compiled for torch 1.13, this is"),
        ({"machine": "s390x"}, "compiled for s390x, this is"),
        ({"cpu_flags": ["fma", "warp_drive"]}, "the processor lacks warp_drive"),
    ],
)
def test_other_hosts_are_refused(built: Built, change: dict[str, Any], message: str) -> None:
    check_host(built.result.needs)
    with pytest.raises(PackageError, match=message):
        check_host({**built.result.needs, **change})


def test_changed_files_are_refused(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(built.folder, folder)
    open_folder(folder)
    data = bytearray((folder / "model.pt2").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pt2").write_bytes(bytes(data))
    with pytest.raises(PackageError, match=r"model\.pt2: the file was changed after it was written"):
        open_folder(folder)
    assert main(["--artifact", str(folder), "--prompt-tokens", "5"]) == 1
    assert "error: " in capsys.readouterr().err
    (folder / "model.pt2").unlink()
    (folder / "model.pt2").symlink_to(built.folder / "model.pt2")
    with pytest.raises(PackageError, match=r"'model\.pt2' is not a plain file of the artifact"):
        open_folder(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(PackageError, match=r"no readable manifest\.json"):
        open_folder(folder)


def test_text_without_a_tokenizer(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--artifact", str(built.folder), "--prompt", "Hello"]) == 1
    assert "the artifact has no tokenizer: give --prompt-tokens" in capsys.readouterr().err
