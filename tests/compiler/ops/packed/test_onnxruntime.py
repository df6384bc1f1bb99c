"""The references of packed operators against the kernels that they mirror, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bounds
import ort_driver
import pytest
import torch
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.ops.packed.onnxruntime import pack_nbits, unpack_nbits

_optc = torch.ops.optc
HEADS, KV_HEADS = 4, 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Shape:
    """One call: `new` tokens behind `past` ones, in caches of `capacity` (0: as long as needed)."""

    batch: int = 1
    new: int = 5
    past: int = 0
    capacity: int = 0
    lengths: list[int] = field(default_factory=list)  # of the rows of a right-padded prompt


PROMPT = Shape(2)
RAGGED = Shape(3, lengths=[5, 1, 3])
CHUNK = Shape(1, new=3, past=4)
STEP = Shape(3, new=1, past=7, lengths=[8, 2, 5])
SHARED = Shape(2, new=1, past=7, capacity=12, lengths=[8, 3])
SHAPES = [PROMPT, RAGGED, CHUNK, STEP, SHARED]
IDS = ["prompt", "ragged", "chunk", "step", "shared"]


class _Attention(torch.nn.Module):
    def __init__(self, size: int, packed: bool, rotary: int, knobs: dict[str, Any]) -> None:
        super().__init__()
        self.size, self.packed, self.knobs, self.tables = size, packed, knobs, bool(rotary)
        angle = torch.arange(16.0)[:, None] * torch.logspace(0, -2, max(rotary, 1))
        self.register_buffer("cos", torch.cos(angle))
        self.register_buffer("sin", torch.sin(angle))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, last: Tensor, mask: Tensor) -> Any:
        streams = (torch.cat([q, k, v], -1), None, None) if self.packed else (q, k, v)
        tables = (self.cos, self.sin) if self.tables else (None, None)
        knobs = {
            "local_window_size": -1,
            "softcap": 0.0,
            "rotary_interleaved": False,
            "scale": 0.3,
        } | self.knobs
        return _optc.group_query_attention(
            *streams,
            keys,
            values,
            last,
            mask.shape[1],
            *tables,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            **knobs,
        )


def attention_inputs(shape: Shape, size: int) -> list[Tensor]:
    rows, total = shape.batch, shape.past + shape.new
    q, k, v = (
        random(rows, shape.new, heads * size, seed=heads + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    keys, values = (random(rows, KV_HEADS, shape.capacity or shape.past, size, seed=9 + i) for i in (0, 1))
    lengths = torch.tensor(shape.lengths or [total] * rows, dtype=torch.int32)
    return [q, k, v, keys, values, lengths - 1, torch.ones(rows, total, dtype=torch.long)]


def attention_session(folder: Path, size: int, packed: bool, rotary: int, knobs: dict[str, Any]) -> tuple[Any, Any]:
    names = ["q", "k", "v", "keys", "values", "last", "mask"]
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} for name in names}
    for name in names[:3]:
        axes[name][1] = "seq"
    axes["mask"][1] = "total"
    axes["keys"][2] = axes["values"][2] = "past"
    module = _Attention(size, packed, rotary, knobs)
    examples = attention_inputs(Shape(2, new=3, past=4), size)
    examples[-1] = torch.ones(2, 11, dtype=torch.long)
    program = capture_module(module, examples, input_names=names, dynamic=axes)
    ort_driver.exported(program, folder)
    return module, ort_driver.open_session(folder)


def compare_attention(module: Any, session: Any, shape: Shape, size: int) -> float:
    """Largest difference of what counts: outputs of real tokens, and the caches where rows have tokens."""
    inputs = attention_inputs(shape, size)
    expected, found = module(*inputs), ort_driver.run(session, *inputs)
    assert [x.shape for x in found] == [x.shape for x in expected]
    worst = 0.0
    for row, last in enumerate(inputs[5].tolist()):
        length = last + 1
        real = min(length, shape.new)
        pairs = [(a[row, :real], b[row, :real]) for a, b in zip(expected[:1], found[:1], strict=True)]
        pairs += [(a[row, :, :length], b[row, :, :length]) for a, b in zip(expected[1:], found[1:], strict=True)]
        worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
    return worst


ATTENTION: dict[
    str, tuple[int, bool, int, dict[str, Any]]
] = {  # head size, packed q/k/v, width of cos and sin, attributes
    "plain": (8, False, 0, {}),
    "packed": (16, True, 0, {}),
    "window-1": (8, False, 0, {"local_window_size": 1}),
    "window-3": (8, False, 0, {"local_window_size": 3}),
    "softcap": (8, False, 0, {"softcap": 2.0}),
    "rotary": (16, False, 8, {}),
    "rotary-interleaved": (16, True, 8, {"rotary_interleaved": True}),
    "rotary-partial": (32, True, 8, {}),
    "everything": (32, True, 8, {"rotary_interleaved": True, "local_window_size": 4, "softcap": 2.0}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_group_query_attention_is_the_kernel(name: str, tmp_path: Path) -> None:
    size, packed, rotary, knobs = ATTENTION[name]
    module, session = attention_session(tmp_path, size, packed, rotary, knobs)
    for shape, label in zip(SHAPES, IDS, strict=True):
        assert compare_attention(module, session, shape, size) <= 2e-6, label


@pytest.mark.parametrize(
    ("size", "rotary", "text"),
    [
        (12, 0, "head_size must be a multiple of 8"),
        (24, 8, "head_size shall be a multiple of 16"),
        (32, 4, "cos_cache dimension 1 must be <= head_size / 2 and a multiple of 8"),
    ],
)
def test_what_the_kernel_refuses(size: int, rotary: int, text: str, tmp_path: Path) -> None:
    """legalize-ort rests on these limits; a later ONNX Runtime that lifts one shows here."""
    module, session = attention_session(tmp_path, size, False, rotary, {})
    with pytest.raises(Exception, match=text):
        compare_attention(module, session, PROMPT, size)


def test_the_kernel_takes_no_batch_of_chunks(tmp_path: Path) -> None:
    module, session = attention_session(tmp_path, 8, False, 0, {})
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        compare_attention(module, session, Shape(2, new=3, past=4), 8)


# -- MatMulNBits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_codes_survive_packing(bits: int, count: int) -> None:
    codes = (torch.arange(5 * count).reshape(5, count) % 2**bits).to(torch.uint8)
    packed = pack_nbits(codes, bits)
    assert packed.shape == (5, -(-count * bits // 8))
    assert torch.equal(unpack_nbits(packed, bits, count), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack_nbits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_nbits(torch.tensor([[1, 2, 3, 0, 2]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 0b10]]


def test_codes_that_begin_anywhere_in_memory_are_packed() -> None:
    codes = torch.arange(9, dtype=torch.uint8) % 4
    for start in range(4):
        part = codes[start : start + 4]
        assert torch.equal(pack_nbits(part, 4), pack_nbits(part.clone(), 4))
        assert torch.equal(pack_nbits(part, 2), pack_nbits(part.clone(), 2))


class _Linear(torch.nn.Module):
    """Random codes, scales and, if asked for, zero points and a bias: [N, K] = [25, 256]."""

    def __init__(self, bits: int, group: int, *, zeros: bool, bias: bool, level: int = 0) -> None:
        super().__init__()
        rows, columns, generator = 25, 256, torch.Generator().manual_seed(bits)
        codes = torch.randint(0, 2**bits, (rows, columns // group, group), generator=generator).to(torch.uint8)
        points = torch.randint(0, 2**bits, (rows, columns // group), generator=generator).to(torch.uint8)
        self.register_buffer("packed", pack_nbits(codes, bits))
        self.register_buffer("scales", torch.rand(rows, columns // group, generator=generator) * 0.1 / 2**bits)
        self.register_buffer("zeros", pack_nbits(points, bits) if zeros else None)
        self.register_buffer("bias", torch.randn(rows, generator=generator) if bias else None)
        self.knobs = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": level}

    def forward(self, x: Tensor) -> Tensor:
        return _optc.matmul_nbits(x, self.packed, self.scales, self.zeros, self.bias, **self.knobs)


def linear_drift(module: torch.nn.Module, folder: Path) -> float:
    """Largest difference from the kernel, as a share of the largest output, for 1 row and for 33."""
    program = capture_module(module, [random(2, 3, 256)], dynamic={"input_0": {0: "batch"}})
    ort_driver.exported(program, folder)
    session = ort_driver.open_session(folder)
    worst = 0.0
    for x in (random(1, 3, 256), random(11, 3, 256)):
        expected, (found,) = module(x), ort_driver.run(session, x)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_matmul_nbits_is_the_kernel(bits: int, group: int, zeros: bool, tmp_path: Path) -> None:
    assert linear_drift(_Linear(bits, group, zeros=zeros, bias=group == 32), tmp_path) <= 5e-6


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_accuracy_level_4_rounds_activations_in_blocks_of_the_weight(bits: int, group: int, tmp_path: Path) -> None:
    """The kernel is the reference, where it has a product of integers for the CPU; else it rounds nothing at all."""
    x = random(11, 3, 256)
    exact, rounded = (_Linear(bits, group, zeros=True, bias=True, level=level)(x) for level in (0, 4))
    rounding = float((rounded - exact).abs().max() / exact.abs().max())
    assert 1e-3 < rounding < 3e-2
    drift = linear_drift(_Linear(bits, group, zeros=True, bias=True, level=4), tmp_path)
    assert drift <= 5e-6 or rounding / bounds.MARGIN <= drift <= rounding * bounds.MARGIN
