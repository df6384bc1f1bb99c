"""Every op of the dialect in a saved program, read and run by a process that did not write it."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once
from safetensors.torch import save_file
from torch import Tensor, nn

from optc.compiler.capture import capture_module
from optc.compiler.ops import library
from optc.compiler.ops.packed.inductor_cpu import pack_rows, pack_tiles

B, H, HKV, S, T, D, K, N = 2, 4, 2, 3, 5, 8, 32, 16
KNOBS = {"scale": 0.3, "window": 0, "softcap": 0.0}
CONTRIB = {"num_heads": H, "kv_num_heads": HKV, "scale": 0.3, "local_window_size": -1, "softcap": 0.0,
           "rotary_interleaved": False}  # fmt: skip


def _f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _u(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(top), dtype=torch.uint8)


def _i8(*shape: int) -> Tensor:
    return (_u(255, *shape).int() - 127).to(torch.int8)


PAST = torch.full((B,), T)
QKV = (_f(B, H, S, D), _f(B, HKV, S, D), _f(B, HKV, S, D))
CACHES = (_f(B, HKV, T, D), _f(B, HKV, T, D))
ROOM = (_f(B, HKV, T + S, D), _f(B, HKV, T + S, D))
TURN = (_f(T + S, D // 2), _f(T + S, D // 2))
FLAT = (_f(B, S, H * D), _f(B, S, HKV * D), _f(B, S, HKV * D))
LENGTHS = torch.full((B,), T + S - 1, dtype=torch.int32)
CODES = (_i8(B, HKV, S, D), _i8(B, HKV, S, D), _i8(B, HKV, T, D), _i8(B, HKV, T, D))
SCALE = torch.rand(N, 2) + 0.1
POSITION = torch.arange(S).expand(B, S).contiguous()

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "attention": ((*QKV, torch.ones(B, S, dtype=torch.long), _f(H)), {"causal": True, **KNOBS}),
    "cached_attention": ((*QKV, *CACHES, PAST, T + S, None), KNOBS),
    "cached_attention_": ((*QKV, *ROOM, PAST, T + S, None), KNOBS),
    "cached_attention_codes": (
        (QKV[0], *CODES, PAST, T + S, torch.full((1,), 0.02), torch.full((1,), 0.02)), KNOBS,
    ),
    "paged_attention_": (
        (_f(4, H, D), _f(4, HKV, D), _f(4, HKV, D), _f(4, 4, HKV, D), _f(4, 4, HKV, D),
         torch.tensor([8, 9, 10, 4]), torch.tensor([[2], [1]], dtype=torch.int32),
         torch.tensor([3, 1], dtype=torch.int32), torch.tensor([0, 3, 4], dtype=torch.int32)), KNOBS,
    ),
    "rotary": ((QKV[0], POSITION, _f(D // 2)), {"scaling": 1.0, "interleaved": True}),
    "rotate_blocks": ((_f(2, K), _f(8, 8)), {}),
    "quantize": ((_f(2, K), torch.tensor(0.02)), {"format": "int8"}),
    "quantize_dynamic": ((_f(2, K),), {"format": "fp8"}),
    "quantize_nvfp4": ((_f(2, K), torch.tensor([0.01])), {}),
    "dequantize": ((_u(16, N, K), SCALE, _u(16, N, 2)), {"bits": 4, "group_size": 16}),
    "dequantize_float": ((_f(N, K).to(torch.float8_e4m3fn), SCALE), {"group_size": 16}),
    "dequantize_codebook": ((_u(16, N, K), SCALE, _f(16)), {"bits": 4, "group_size": 16}),
    "dequantize_nvfp4": (
        (_u(16, N, K), SCALE.to(torch.float8_e4m3fn), torch.tensor([0.1])), {"dtype": torch.float32},
    ),
    "dequantize_activation": ((_i8(2, K), SCALE[:2, :1]), {"dtype": torch.float32}),
    "linear_nbits": (
        (_f(2, K), pack_tiles(_u(16, N, K), 4, 16), pack_rows(SCALE), None, _f(N), None),
        {"bits": 4, "group_size": 16, "activation_group": 0, "K": K, "N": N},
    ),
    "group_query_attention": ((*FLAT, *CACHES, LENGTHS, T + S, *TURN), CONTRIB),
    "group_query_attention_codes": (
        (*FLAT, *CODES[2:], LENGTHS, T + S, *TURN, torch.full((1,), 0.02), torch.full((1,), 0.02)), CONTRIB,
    ),
    "matmul_nbits": (
        (_f(2, K), _u(255, N, 2, 8), SCALE, None, _f(N)),
        {"K": K, "N": N, "bits": 4, "block_size": 16, "accuracy_level": 0},
    ),
    "skip_rms_norm": ((_f(2, K), _f(2, K), _f(K)), {"eps": 1e-6}),
    "dequantize_linear": (
        (_u(255, K * N // 2), _f(2, N), None), {"K": K, "N": N, "bits": 4, "signed": True, "block_size": 16},
    ),
    "quantize_tokens": ((_f(2, K),), {}),
    "matmul_integer": ((_u(255, 2, K), _i8(K, N), SCALE[:2, :1], SCALE[:, 0], _f(N)), {}),
    "matmul_bnb4": (
        (_f(2, K), _u(255, N * K // 2), SCALE.flatten(), _f(16)), {"K": K, "N": N, "block_size": 16},
    ),
    "tensor_scatter": ((ROOM[0], QKV[1], PAST), {}),
    "masked_attention": (
        (QKV[0], *CACHES, torch.ones(B, 1, S, T, dtype=torch.bool)), {"scale": 0.3, "softcap": 0.0},
    ),
    "rotary_cached": ((QKV[0], POSITION, *TURN), {"interleaved": False}),
    "linear_dynamic": ((_f(2, K), _i8(N, K), SCALE, _f(N)), {"bits": 8, "group_size": 16}),
}  # fmt: skip


class Call(nn.Module):
    """One call of an op, up to ten tensors of which come from outside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.optc, name).default
        self.args, self.keywords = CALLS[name]

    def forward(self, a: Tensor, b: Any = None, c: Any = None, d: Any = None, e: Any = None, f: Any = None,
                g: Any = None, h: Any = None, i: Any = None, j: Any = None) -> Any:  # fmt: skip
        rest = iter((a, b, c, d, e, f, g, h, i, j))
        args = [next(rest) if isinstance(item, Tensor) else item for item in self.args]
        return self.op(*args, **self.keywords)


def tensors_of(name: str) -> list[Tensor]:
    return [item.clone() for item in CALLS[name][0] if isinstance(item, Tensor)]


READ = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from optc.compiler.ir.program import Program
import torch
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = load_file(folder / "call.safetensors")
    inputs = [saved[f"in{i}"] for i in range(sum(name.startswith("in") for name in saved))]
    program = Program.load(folder)
    out = program(*inputs)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    # Sums over memory that is aligned otherwise may be rounded otherwise.
    pairs = [(saved[f"out{i}"].float(), item.float()) for i, item in enumerate(out)]
    found[folder.name] = all(torch.allclose(*pair, rtol=1e-6, atol=1e-6) for pair in pairs)
print(json.dumps(found))
"""


def _save(folder: Path) -> None:
    """Every op's program with a call's inputs and results, then what a new process makes of them."""
    for name in CALLS:
        program = capture_module(Call(name), tensors_of(name))
        program.save(folder / "programs" / name)
        inputs = tensors_of(name)
        table = {f"in{i}": item.clone() for i, item in enumerate(inputs)}
        out = program(*inputs)
        out = list(out) if isinstance(out, tuple | list) else [out]
        table |= {f"out{i}": item.clone().contiguous() for i, item in enumerate(out)}
        save_file(table, folder / "programs" / name / "call.safetensors")
    command = [sys.executable, "-c", READ, str(folder / "programs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "found.json").write_text(done.stdout.strip() or json.dumps({"error": done.stderr[-2000:]}))


@functools.cache
def read_elsewhere() -> dict[str, bool]:
    found: dict[str, bool] = json.loads((once("saved-ops", _save) / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", CALLS)
def test_saved_program_runs_in_a_fresh_process(name: str) -> None:
    found = read_elsewhere()
    assert found.get(name) is True, found


def test_every_op_has_a_call() -> None:
    assert set(CALLS) == set(library.names())


def test_library_of_another_version_is_refused() -> None:
    """A schema that a library registered first must be the dialect's: calls would be misread."""
    script = (
        "import torch\n"
        "library = torch.library.Library('optc', 'FRAGMENT')\n"
        "library.define('rotary(Tensor x, Tensor position) -> Tensor')\n"
        "from optc.compiler.diagnostics import TargetError\n"
        "try:\n"
        "    import optc.compiler.ops\n"
        "except TargetError as error:\n"
        "    print(error.what, '|', error.why)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "a C++ op library in this process defines the operator optc::rotary differently from this version of optc"
        " | it has optc::rotary(Tensor x, Tensor position) -> Tensor"
    )
