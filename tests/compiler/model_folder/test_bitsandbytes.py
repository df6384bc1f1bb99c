"""Folders of bitsandbytes in 4 bits: values by hand, logits by transformers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_folders import write_bitsandbytes
from families import make_model
from hf_folders import logits, source, tensors
from safetensors.torch import save_file
from torch import Tensor

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.exporters.hf.collect import collect

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
MODULE = "model.layers.1.mlp.down_proj"


def _folder(out: Path, nested: bool = True) -> dict[str, Tensor]:
    return write_bitsandbytes(out, source("llama"), nested)


@pytest.mark.parametrize("nested", [True, False])
def test_the_logits_are_those_of_the_values_by_hand(tmp_path: Path, nested: bool) -> None:
    dense = _folder(tmp_path / "q", nested)
    model = make_model("llama")
    model.load_state_dict(dense, strict=False)
    program, _ = capture_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert float((logits(program, IDS) - model(IDS).logits).abs().max()) < 1e-4
    entry = program.contract.quantization[f"{MODULE}.weight_codes"]
    assert (entry.method, entry.format, entry.bits, entry.group_size) == ("bitsandbytes", "nf4", 4, 64)


def test_no_layout_holds_them(tmp_path: Path) -> None:
    _folder(tmp_path / "q")
    program, _ = capture_pretrained(tmp_path / "q")
    with pytest.raises(TargetError) as found:
        collect(program, tmp_path / "q")
    assert found.value.why == "no layout holds weights of the format nf4"


def _state(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(held: dict[str, Tensor], _: dict[str, Any]) -> None:
        name = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(held[name].tolist())), **changes}
        held[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda held, _: held.update({f"{MODULE}.weight.{name}": tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_state(shape=[64, 1 << 40]), "bytes hold"),
        (_state(blocksize=48), "cross the rows"),
        (_state(blocksize=0), "cross the rows"),
        (_state(quant_type="fp4"), "it is of type fp4, and the config says nf4"),
        (_state(nested_offset=1e999), "cannot be used"),
        (_state(nested_blocksize=-1), "no blocks"),
        (_state(shape="x"), "cannot be used"),
        (_tensor("quant_state.bitsandbytes__nf4", torch.zeros(8, dtype=torch.uint8)), "cannot be used"),
        (_tensor("quant_state.bitsandbytes__nf4", torch.zeros(5000, dtype=torch.uint8)), "at most 4096 bytes"),
        (_tensor("quant_map", torch.full((16,), float("nan"))), "it holds a value that is not finite"),
        (_tensor("quant_map", torch.zeros(15)), "found [15], expected [16]"),
        (_tensor("absmax", torch.zeros(3, dtype=torch.uint8)), "found [3], expected [128]"),
        (_tensor("absmax", torch.zeros(128)), "has the wrong type"),
        (lambda held, _: held.pop(f"{MODULE}.weight.absmax"), "missing tensor"),
        (lambda held, _: held.pop(f"{MODULE}.weight.nested_quant_map"), "missing tensor"),
        (lambda _, settings: settings.update(load_in_4bit=False), "4-bit weights alone"),
        (lambda _, settings: settings.update(bnb_4bit_quant_storage="bfloat16"), "'bnb_4bit_quant_storage'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    _folder(tmp_path / "q")
    held = tensors(tmp_path / "q")
    settings = json.loads((tmp_path / "q" / "config.json").read_text())
    change(held, settings["quantization_config"])
    save_file(held, tmp_path / "q" / "model.safetensors")
    (tmp_path / "q" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as found:
        _read_all(tmp_path / "q")
    assert message in str(found.value)


def _read_all(folder: Path) -> None:
    """Every linear, as a capture reads them, without the capture."""
    from optc.compiler.model_folder.checkpoint import check_folder
    from optc.compiler.model_folder.quantized import quantized_folder

    found = quantized_folder(check_folder(folder))
    assert found is not None
    for module in found.modules:
        found.layout.read(module)
