"""The C++ kernels of optc.linear_nbits against the Python reference."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from torch import Tensor, nn

from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.cpu.linear_nbits import LINEAR_NBITS
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.ops.library import reference
from optc.compiler.ops.packed.inductor_cpu import KEPT, PER_TOKEN, pack_rows, pack_tiles, segment_size

pytestmark = pytest.mark.slow  # the first build takes 30 s; later ones come from the user's cache

KERNELS = kernels_for("cpu")
TOLERANCE = LINEAR_NBITS.tolerance
COLUMNS = 192
ROWS = (1, 2, 7, 64)
WEIGHT_ROWS = (48, 37)  # whole tiles, and a ragged last one


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    torch.ops.load_library(str(build_library(KERNELS)))
    return torch.ops.optc.linear_nbits.default


@dataclass
class Case:
    """A linear of random codes, scales and, perhaps, zero points and a bias."""

    bits: int = 4
    group_size: int = 32
    level: int = KEPT
    rows: int = 3
    weight_rows: int = 48
    zero: bool = False
    bias: bool = False
    table: bool = False
    dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype = torch.float32
    columns: int = COLUMNS

    def inputs(self) -> tuple[list[Tensor | None], dict[str, int]]:
        """Arguments and keywords of the op, and the knobs."""
        generator = torch.Generator().manual_seed(5)
        shape = (self.weight_rows, self.columns)
        codes = torch.randint(0, 2**self.bits, shape, generator=generator, dtype=torch.uint8)
        groups = (self.weight_rows, self.columns // (self.group_size or self.columns))
        scale = (torch.rand(groups, generator=generator) * 0.1 + 0.01).to(self.scale_dtype)
        points = torch.randint(0, 2**self.bits, groups, generator=generator, dtype=torch.uint8)
        segment = segment_size(self.columns, self.group_size, self.level)
        args = [
            torch.randn((self.rows, self.columns), generator=generator).to(self.dtype),
            pack_tiles(codes, self.bits, segment),
            pack_rows(scale),
            pack_rows(points) if self.zero else None,
            torch.randn(self.weight_rows, generator=generator).to(self.dtype) if self.bias else None,
            torch.randn(16, generator=generator) if self.table else None,
        ]
        knobs = {"bits": self.bits, "group_size": self.group_size, "activation_group": self.level}
        return args, {**knobs, "K": self.columns, "N": self.weight_rows}

    def expected(self) -> Tensor:
        """What the reference gives in float32."""
        args, knobs = self.inputs()
        return reference("linear_nbits")(args[0].float(), *args[1:], **knobs)  # type: ignore[union-attr]

    def difference(self, kernel: Callable[..., Tensor]) -> float:
        """Largest difference from the reference, as a share of the largest output."""
        args, knobs = self.inputs()
        found, expected = kernel(*args, **knobs), self.expected()
        assert found.dtype is self.dtype
        assert found.shape == expected.shape == (self.rows, self.weight_rows)
        return float((found.float() - expected).abs().max() / expected.abs().max())

    def rounding(self, *, weight: bool = False) -> float:
        """Largest change of the expected outputs by rounding them and, if so, the weight to `dtype`; as a share."""
        expected = made = self.expected()
        if weight:
            args, knobs = self.inputs()
            dense = reference("linear_nbits")(torch.eye(self.columns), *args[1:4], None, None, **knobs)
            bias = None if args[4] is None else args[4].float()
            made = nn.functional.linear(args[0].float(), dense.t().to(self.dtype).float(), bias)  # type: ignore[union-attr]
        return float((made.to(self.dtype).float() - expected).abs().max() / expected.abs().max())


LEVELS = {"kept": KEPT, "per token": PER_TOKEN, "groups of 32": 32}
SIZES = [0, 32, 64, 96]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group_size", SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernel_equals_reference(kernel: Callable[..., Tensor], bits: int, group_size: int, level: str) -> None:
    """Every size of batch, ragged tiles, zero points, bias; sums of 192 terms in another order."""
    for rows, weight_rows, extra in itertools.product(ROWS, WEIGHT_ROWS, (False, True)):
        case = Case(bits, group_size, LEVELS[level], rows, weight_rows, zero=extra, bias=extra)
        assert case.difference(kernel) <= TOLERANCE, case


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_segments_that_fill_no_block(kernel: Callable[..., Tensor], bits: int) -> None:
    """Groups of 12 and rows of 36 columns are filled up with zeros, which zero points must not see."""
    for level, group_size in itertools.product((KEPT, PER_TOKEN, 12, 4), (12, 0)):
        for rows in (1, 5, 40):
            case = Case(bits, group_size, level, rows, 20, zero=True, columns=36)
            assert case.difference(kernel) <= TOLERANCE, case


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "level", "rows"), [(0, PER_TOKEN, 130), (128, 128, 33), (32, 32, 17), (32, 16, 8), (64, 64, 129)]
)
def test_many_rows_give_the_bits_of_few(
    kernel: Callable[..., Tensor], bits: int, group_size: int, level: int, rows: int
) -> None:
    """Matrix units, where the processor has them, sum the same integers and round alike."""
    case = Case(bits, group_size, level, rows, 85, zero=bits % 2 == 0, bias=True, columns=640)
    args, knobs = case.inputs()
    x = args[0]
    assert x is not None
    few = torch.cat([kernel(part, *args[1:], **knobs) for part in x.split(4)])
    assert torch.equal(kernel(*args, **knobs), few)
    assert case.difference(kernel) <= TOLERANCE


@pytest.mark.parametrize("level", [KEPT, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_has_the_same_bits_beside_others(kernel: Callable[..., Tensor], bits: int, level: int) -> None:
    """Tokens that verify a draft are decided as those of plain decoding are: rows in any grouping, tiles in any number."""
    for rows, weight_rows in itertools.product((2, 3, 5, 6, 7, 9), (16, 85)):
        args, knobs = Case(bits, 64, level, rows, weight_rows, zero=bits % 2 == 0, bias=True).inputs()
        x = args[0]
        assert x is not None
        alone = torch.cat([kernel(part, *args[1:], **knobs) for part in x.split(1)])
        assert torch.equal(kernel(*args, **knobs), alone), (rows, weight_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [KEPT, 32])
def test_kernel_in_sixteen_bits(kernel: Callable[..., Tensor], dtype: torch.dtype, level: int) -> None:
    """One rounding of the result; with many rows of activations that are kept, of the weight as well."""
    for rows, scale_dtype in itertools.product(ROWS, (torch.float32, dtype)):
        case = Case(4, 64, level, rows, 37, bias=True, dtype=dtype, scale_dtype=scale_dtype)
        rounding = case.rounding(weight=rows == 64 and level == KEPT)
        assert case.difference(kernel) <= bounds.MARGIN * rounding, case


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook(kernel: Callable[..., Tensor], bits: int) -> None:
    for rows, group_size in itertools.product(ROWS, (0, 64)):
        assert Case(bits, group_size, KEPT, rows, 37, table=True).difference(kernel) <= 3e-6


def test_known_numbers(kernel: Callable[..., Tensor]) -> None:
    """x = (1, 2, 3, -4), codes (0, 1, 14, 15) in two groups: (1 * -8 + 2 * -7) / 2 + (3 * 6 - 4 * 7) / 4 = -13.5."""
    codes = torch.tensor([[0, 1, 14, 15]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 0.25]])
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    args = (pack_tiles(codes, 4, 2), pack_rows(scale))
    knobs = {"bits": 4, "group_size": 2, "activation_group": KEPT, "K": 4, "N": 1}
    assert kernel(x, *args, None, None, None, **knobs).tolist() == [[-13.5]]
    zero = pack_rows(torch.tensor([[0, 15]], dtype=torch.uint8))  # (0 + 2) / 2 + (3 * -1 + 0) / 4
    assert kernel(x, *args, zero, torch.tensor([1.0]), None, **knobs).tolist() == [[1.25]]


def test_integer_sums_are_exact(kernel: Callable[..., Tensor]) -> None:
    """8-bit weights, activations rounded per token: with scales of 1 the result is the integer product."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (40, 1000), generator=generator, dtype=torch.uint8)
    x = torch.randint(-127, 128, (9, 1000), generator=generator)
    x[:, 0] = 127  # the scale of every row is 1
    knobs = {"bits": 8, "group_size": 0, "activation_group": PER_TOKEN, "K": 1000, "N": 40}
    packed, ones = pack_tiles(codes, 8, 1000), pack_rows(torch.ones((40, 1)))
    found = kernel(x.float(), packed, ones, None, None, None, **knobs)
    expected = x @ (codes.long() - 128).t()
    assert int(expected.abs().max()) < 2**24
    assert torch.equal(found.long(), expected)


def test_largest_codes_do_not_saturate(kernel: Callable[..., Tensor]) -> None:
    """255 * 127 in every product: pairs of them exceed 16 bits."""
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    knobs = {"bits": 8, "group_size": 0, "activation_group": PER_TOKEN, "K": 64, "N": 16}
    zero = pack_rows(torch.zeros((16, 1), dtype=torch.uint8))
    x = torch.full((1, 64), -127.0)
    found = kernel(x, pack_tiles(codes, 8, 64), pack_rows(torch.ones((16, 1))), zero, None, None, **knobs)
    assert found.tolist() == [[-255.0 * 127 * 64] * 16]


def test_largest_packed_codes_do_not_saturate(kernel: Callable[..., Tensor]) -> None:
    """The largest code times 127 everywhere: sums of pairs pass 16 bits after a few of them, in whole blocks or not."""
    for bits, columns, rows in itertools.product((2, 3, 4), (64, 608), (1, 2, 5)):
        top = 2**bits - 1
        codes = torch.full((16, columns), top, dtype=torch.uint8)
        knobs = {"bits": bits, "group_size": 0, "activation_group": PER_TOKEN, "K": columns, "N": 16}
        zero = pack_rows(torch.zeros((16, 1), dtype=torch.uint8))
        x = torch.full((rows, columns), 127.0)
        x[0] = -127.0
        found = kernel(x, pack_tiles(codes, bits, columns), pack_rows(torch.ones((16, 1))), zero, None, None, **knobs)
        sign = torch.ones((rows, 1))
        sign[0] = -1
        assert torch.equal(found, sign * (top * 127.0 * columns) * torch.ones(16))


@pytest.mark.parametrize("level", [KEPT, PER_TOKEN, 32])
def test_not_a_number_spreads(kernel: Callable[..., Tensor], level: int) -> None:
    """A NaN or an infinity in one row makes that row NaN (or infinite), and no other."""
    for bad, rows in itertools.product((float("nan"), float("inf")), (3, 40)):
        args, knobs = Case(level=level, rows=rows).inputs()
        x = args[0]
        assert x is not None
        x[1, 70] = bad
        finite = torch.isfinite(kernel(*args, **knobs))
        assert not finite[1].any()
        assert finite[0].all()
        assert finite[2:].all()


def test_shapes(kernel: Callable[..., Tensor]) -> None:
    """Leading axes stay, none is fine, strides do not matter, and no rows give no rows."""
    args, knobs = Case(rows=6).inputs()
    x = args[0]
    assert x is not None
    expected = kernel(*args, **knobs)
    assert torch.equal(kernel(x.view(2, 3, -1), *args[1:], **knobs), expected.view(2, 3, -1))
    assert torch.equal(kernel(x[0], *args[1:], **knobs), expected[0])
    assert torch.equal(kernel(x.t().contiguous().t(), *args[1:], **knobs), expected)
    assert kernel(x[:0], *args[1:], **knobs).shape == (0, 48)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The code for lesser processors gives the same numbers (in a process of its own)."""
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]\n"
        "import test_linear_nbits as t\n"
        "torch.ops.load_library(str(t.build_library(t.KERNELS)))\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
        "op = torch.ops.optc.linear_nbits.default\n"
        "cases = [t.Case(b, g, a, r, 37, zero=True, bias=True)\n"
        "         for b in (2, 3, 4, 8) for g in (0, 64) for a in (-1, 0, 32) for r in (1, 7, 64)]\n"
        "cases += [t.Case(4, 64, -1, r, 37, table=True) for r in (1, 64)]\n"
        "print(max(case.difference(op) for case in cases))\n"
        "half = torch.float16\n"
        "short = [t.Case(4, 64, a, 7, 37, dtype=d, scale_dtype=d) for a in (-1, 32) for d in (torch.bfloat16, half)]\n"
        "print(max(case.difference(op) / case.rounding() for case in short))\n"
        "t.test_integer_sums_are_exact(op); t.test_largest_codes_do_not_saturate(op)\n"
        "t.test_largest_packed_codes_do_not_saturate(op)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(Path(bounds.__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    name, wide, short = done.stdout.split()
    assert name == capability.upper()
    assert float(wide) <= 3e-6
    assert float(short) <= bounds.MARGIN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, not 5"),
        ({"K": 384}, "packed must be uint8"),
        ({"N": 49}, "packed must be uint8"),
        ({"group_size": 50}, "groups of 50 and -1 do not divide 192"),
        ({"group_size": 96}, "scale must be floating-point \\[2, 48\\]"),
        ({"activation_group": 33}, "do not divide"),
        ({"activation_group": -2}, "negative groups"),
        ({0: torch.zeros(3, 191)}, "x must end in 192 columns"),
        ({0: torch.zeros(3, 192, dtype=torch.float64)}, "no kernel for Double"),
        ({3: torch.zeros(6, 47, dtype=torch.uint8)}, "zero must be uint8 of the shape of scale"),
        ({4: torch.zeros(47)}, "bias must be floating-point \\[48\\]"),
        ({5: torch.zeros(8)}, "table must be float32 \\[16\\]"),
        ({5: torch.zeros(16), "activation_group": 32}, "a table takes"),
    ],
)
def test_wrong_sizes_are_refused(kernel: Callable[..., Tensor], changes: dict[Any, Any], message: str) -> None:
    """They would read memory of others."""
    args, knobs = Case().inputs()
    for key, value in changes.items():
        if isinstance(key, int):
            args[key] = value
        else:
            knobs[key] = value
    with pytest.raises(RuntimeError, match=message):
        kernel(*args, **knobs)


def test_library_without_the_python_dialect() -> None:
    """In a process that has only the library, the schema is the same and the Python dialect can follow."""
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1])\n"
        "ops = [torch.ops.optc.linear_nbits.default, torch.ops.optc.paged_attention_.default]\n"
        "before = [str(op._schema) for op in ops]\n"
        "import optc.compiler.ir.program\n"
        "ops = [torch.ops.optc.linear_nbits.default, torch.ops.optc.paged_attention_.default]\n"
        "for op, text in zip(ops, before): print(text == str(op._schema), text)\n"
    )
    command = [sys.executable, "-c", script, str(build_library(KERNELS))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packed, paged = done.stdout.splitlines()
    assert packed.startswith("True optc::linear_nbits(Tensor x, Tensor packed, Tensor scale, Tensor? zero")
    assert paged.startswith("True optc::paged_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pool")
