"""round-activations: packed products whose activations are rounded to int8 in groups."""

from __future__ import annotations

import bounds
import pytest
import torch
from stages import apply, captured, sequences

from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.ir.verification import verify_program
from optc.compiler.ops.packed.inductor_cpu import pack_rows, pack_tiles, unpack_tiles
from optc.compiler.ops.packed.onnxruntime import ROUNDS
from optc.compiler.ops.packed.rounded_inputs import round_activations
from optc.compiler.pipeline.gate import rounds_activations
from optc.passes.legalization.inductor import LegalizeInductor
from optc.passes.legalization.ort import LegalizeOrt
from optc.passes.legalization.round_activations import RoundActivations
from optc.passes.quantization.rtn import QuantizeRtn

LINEAR = torch.ops.optc.linear_nbits.default
MATMUL = torch.ops.optc.matmul_nbits.default


def _packed(bits: int, group_size: int, name: str = "llama") -> Program:
    program = apply(QuantizeRtn(bits=bits, group_size=group_size), captured(name)).program
    return apply(LegalizeInductor(), program).program


def _regrouped(program: Program, group: int) -> Program:
    """The program with activations rounded in other groups; 0: the whole token."""
    made = program.clone()
    for node in made.calls(LINEAR):
        node.kwargs = {**node.kwargs, "activation_group": group}
    return made.changed()


@pytest.mark.parametrize(("bits", "size", "group"), [(4, 32, 32), (4, 0, 64), (8, 0, 64), (3, 32, 32), (2, 64, 64)])
def test_groups(bits: int, size: int, group: int) -> None:
    """The largest that divides the weight's groups and lets the packed layout be; hidden 64 or 128."""
    before = _packed(bits, size)
    result = apply(RoundActivations(), before)
    verify_program(result.program, RoundActivations.name)
    assert (result.matched, result.candidates, result.misses) == (14, 14, ())
    found = {int(node.kwargs["activation_group"]) for node in result.program.calls(LINEAR)}
    assert group in found
    assert found <= {group, 128}
    rows = sequences(21, 9, 1)
    expected = run_stage(before, rows).logits
    per_token = bounds.gap(run_stage(_regrouped(result.program, 0), rows).logits, expected)
    found = bounds.check(run_stage(result.program, rows).logits, expected, per_token)
    assert found.rms > 1e-3


def test_a_second_time_matches_nothing() -> None:
    once = apply(RoundActivations(), _packed(4, 32)).program
    assert apply(RoundActivations(), once).matched == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtimes_products(bits: int) -> None:
    """In the blocks of the weight, and every product: then nothing is left to round."""
    program = apply(QuantizeRtn(bits=bits, group_size=32), captured("llama")).program
    before = apply(LegalizeOrt(), program).program
    result = apply(RoundActivations(), before)
    verify_program(result.program, RoundActivations.name)
    assert (result.matched, result.candidates) == (14, 14)
    assert {node.kwargs["accuracy_level"] for node in result.program.calls(MATMUL)} == {ROUNDS}
    assert not rounds_activations(before)
    assert rounds_activations(result.program)
    assert apply(RoundActivations(), result.program).matched == 0
    node = result.program.calls(MATMUL)[0]
    x, weight = (
        torch.randn(3, int(node.kwargs["K"])),
        result.program.weight(str(result.program.weight_of(node.args[1]))),
    )
    scales = result.program.weight(str(result.program.weight_of(node.args[2])))
    found = MATMUL(x, weight, scales, None, None, **node.kwargs)
    exact = {**node.kwargs, "accuracy_level": 0}
    torch.testing.assert_close(found, MATMUL(round_activations(x, 32), weight, scales, None, None, **exact))


def test_rounding_by_hand() -> None:
    """Scales 127 / 127 and 2.54 / 127; 0.5 steps go to the even code."""
    x = torch.tensor([[127.0, 0.5, 1.5, -126.6, 2.54, 0.011, 0.0, -0.031]])
    found = round_activations(x, 4)
    torch.testing.assert_close(
        found, torch.tensor([[127.0, 0.0, 2.0, -127.0, 2.54, 0.02, 0.0, -0.04]]), atol=1e-6, rtol=0
    )
    assert round_activations(x, 0)[0, 4:].tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "segment"), [(16, 64, 32), (37, 96, 96), (5, 36, 12), (1, 4, 4)])
def test_tiles_and_back(bits: int, rows: int, columns: int, segment: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack_tiles(codes, bits, segment)
    assert packed.shape[0] == -(-rows // 16)
    assert torch.equal(unpack_tiles(packed, bits, segment, rows, columns), codes)


def test_layout_by_hand() -> None:
    """Row 1, columns 0 to 7 of 4-bit codes: bytes 4 to 7 hold columns 0 to 3 low and 4 to 7 high."""
    codes = torch.zeros((2, 8), dtype=torch.uint8)
    codes[1] = torch.arange(1, 9)
    (tile,) = pack_tiles(codes, 4, 8)
    assert tile[4:8].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert int(tile.count_nonzero()) == 4
    assert pack_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))[:, :3].tolist() == [[1, 3, 0], [2, 4, 0]]
