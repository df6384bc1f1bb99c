"""The Triton kernel of `packed_embedding` against the reference: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.lookup import launch
from optc.compiler.kernels.cuda.packed_embedding import PACKED_EMBEDDING, accepts
from optc.compiler.ops.packed.cuda import pack_integer

ROWS = 7


def arguments(
    bits: int, group_size: int, asymmetric: bool, columns: int = 96, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of the op but the tokens; every code occurs."""
    generator = torch.Generator().manual_seed(columns)
    groups = columns // (group_size or columns)
    codes = torch.randint(2**bits, (ROWS, columns), generator=generator, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, 2**bits - 1], dtype=torch.uint8)
    zero = torch.randint(2**bits, (ROWS, groups), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((ROWS, groups), generator=generator) + 0.5).to(dtype)
    packed = pack_integer(codes, scale, zero if asymmetric else None, bits)
    parts = tuple(None if item is None else item.to(DEVICE) for item in packed)
    return parts, {"format": f"int{bits}", "group_size": group_size}


def check(found: Tensor, parts: tuple[Any, ...], tokens: Tensor, knobs: dict[str, Any]) -> None:
    """Equal: each number is computed in float32 and rounded once."""
    expected = PACKED_EMBEDDING.spec.reference(*parts, tokens, **knobs)
    assert found.dtype is parts[1].dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [96, 256, 1056])
@pytest.mark.parametrize(
    ("bits", "group_size", "asymmetric"),
    [(8, 0, False), (8, 0, True), (8, 32, False), (4, 0, False), (4, 32, True), (4, 32, False), (8, 32, True)],
)
def test_it_computes_what_the_reference_does(
    bits: int, group_size: int, asymmetric: bool, columns: int, dtype: torch.dtype
) -> None:
    parts, knobs = arguments(bits, group_size, asymmetric, columns, dtype)
    tokens = torch.tensor([0, 6, 3, 3, 1], device=DEVICE)
    check(launch.packed_embedding(*parts, tokens, **knobs), parts, tokens, knobs)


def test_columns_of_8_bits_need_not_be_a_multiple_of_anything() -> None:
    parts, knobs = arguments(8, 0, True, columns=37)
    tokens = torch.tensor([5, 0], device=DEVICE)
    check(launch.packed_embedding(*parts, tokens, **knobs), parts, tokens, knobs)


@pytest.mark.parametrize("shape", [(2, 3), (1, 5), (0,)])
def test_axes_of_tokens(shape: tuple[int, ...]) -> None:
    parts, knobs = arguments(4, 32, False)
    tokens = torch.randint(ROWS, shape, device=DEVICE)
    check(launch.packed_embedding(*parts, tokens, **knobs), parts, tokens, knobs)


def test_tokens_that_are_not_neighbours() -> None:
    parts, knobs = arguments(8, 0, False)
    tokens = torch.tensor([[1, 5], [2, 0], [4, 6]], device=DEVICE)[:, 1]
    check(launch.packed_embedding(*parts, tokens, **knobs), parts, tokens, knobs)


def test_tokens_outside_the_table_are_nan() -> None:
    """Never another row's numbers."""
    parts, knobs = arguments(8, 32, True)
    found = launch.packed_embedding(*parts, torch.tensor([3, ROWS, -1, 6], device=DEVICE), **knobs)
    assert torch.isfinite(found).all(1).tolist() == [True, False, False, True]


def test_says_what_it_takes() -> None:
    tokens = torch.zeros(2, dtype=torch.long)
    codes, scale = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4, 2)
    nibbles = torch.zeros(4, 32, dtype=torch.uint8)
    eight, four = {"format": "int8", "group_size": 32}, {"format": "int4", "group_size": 32}
    wide, row = torch.zeros(1, 16400, dtype=torch.int8), torch.zeros(1, 1)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str | None]] = [
        ((codes, scale, None, tokens), eight, None),
        ((nibbles, scale, codes[:, :2].contiguous(), tokens), four, None),
        (
            (codes, scale, None, tokens),
            {**eight, "format": "fp8"},
            "a table of the format 'fp8'; the kernel takes int8, int4",
        ),
        ((wide, row, None, tokens), {**eight, "group_size": 0}, "16400 columns; the kernel takes up to 16384"),
        (
            (nibbles[:, :24].contiguous(), row, None, tokens),
            {**four, "group_size": 0},
            "48 columns of 4 bits; the kernel takes multiples of 32",
        ),
        ((codes, scale, None, tokens), {**eight, "group_size": 16}, "2 scales per row of 64 columns in groups of 16"),
        ((codes[::2], scale, None, tokens), eight, "codes, scales or zero points are not contiguous"),
        ((codes, scale, None, tokens.int()), eight, "argument 3 is torch.int32; the kernel takes torch.int64"),
        (
            (nibbles, scale, None, tokens),
            {**eight, "group_size": 16},
            "argument 0 is torch.uint8; the kernel takes torch.int8",
        ),
        (
            (codes, scale.double(), None, tokens),
            eight,
            "scales of type float64; the kernel takes bfloat16, float16, float32",
        ),
    ]
    assert [accepts(args, knobs) for args, knobs, _ in cases] == [reason for *_, reason in cases]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=ON_GPU)])
def test_op_runs_the_kernel(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HAS_GPU
    called: list[str] = []
    run = launch.packed_embedding
    monkeypatch.setattr(
        launch, "packed_embedding", lambda *args, **knobs: called.append(knobs["format"]) or run(*args, **knobs)
    )
    for bits in (8, 4):
        parts, knobs = arguments(bits, 32, True, 4096, torch.bfloat16)
        tokens = torch.tensor([1, 4], device=DEVICE)
        check(torch.ops.optc.packed_embedding(*parts, tokens, **knobs), parts, tokens, knobs)
    assert called == ["int8", "int4"]
