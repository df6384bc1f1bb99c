"""Folders of bitsandbytes in 4 bits, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# fmt: off
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # Dettmers et al. 2023, appendix E
# fmt: on


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


def write_bitsandbytes(out: Path, source: Path, nested: bool = True) -> dict[str, Tensor]:
    """A Llama as transformers writes it with `BitsAndBytesConfig(load_in_4bit=True)`; returns its dense weights."""
    generator = torch.Generator().manual_seed(0)
    held, dense = load_file(source / "model.safetensors"), {}
    for name in [name for name in held if name.endswith("_proj.weight")]:
        parts, dense[name] = _stored(held.pop(name), nested, generator)
        held |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
    settings = json.loads((source / "config.json").read_text())
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
