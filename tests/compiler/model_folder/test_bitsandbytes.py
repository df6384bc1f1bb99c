"""Folders of bitsandbytes in 4 bits: values by hand, logits by transformers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from hf_folders import logits, source, tensors
from safetensors.torch import save_file
from torch import Tensor

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.exporters.hf.collect import collect

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
# fmt: off
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # Dettmers et al. 2023, appendix E
# fmt: on
MODULE = "model.layers.1.mlp.down_proj"


def _stored(weight: Tensor, nested: bool, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors behind `M.`, the weight that they stand for), with random codes of the size of a weight."""
    rows, columns = weight.shape
    blocks = rows * columns // 64
    codes = torch.randint(16, (rows * columns,), generator=generator)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
    parts = {
        "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": torch.tensor(NF4),
    }
    if nested:
        levels = torch.linspace(-1, 1, 256)
        chosen = torch.randint(256, (blocks,), generator=generator)
        outer = torch.rand(-(-blocks // 256), generator=generator) * 0.1
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.3}
        parts |= {
            "weight.absmax": chosen.to(torch.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": levels,
        }
        scales = [float(levels[int(code)]) * float(outer[i // 256]) + 0.3 for i, code in enumerate(chosen)]
    else:
        parts["weight.absmax"] = torch.rand(blocks, generator=generator) * 0.5
        scales = parts["weight.absmax"].tolist()
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    values = [NF4[int(code)] * scales[i // 64] for i, code in enumerate(codes)]
    return parts, torch.tensor(values).reshape(rows, columns)


def _folder(out: Path, nested: bool = True) -> dict[str, Tensor]:
    """A Llama as transformers writes it with `BitsAndBytesConfig(load_in_4bit=True)`; returns its dense weights."""
    generator = torch.Generator().manual_seed(0)
    held, dense = tensors(source("llama")), {}
    for name in [name for name in held if name.endswith("_proj.weight")]:
        parts, dense[name] = _stored(held.pop(name), nested, generator)
        held |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    settings = json.loads((source("llama") / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }
    out.mkdir()
    save_file(held, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(settings))
    return dense


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
