"""A malformed program is named: what is wrong, and which pass left it so."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch
from stages import tiny_decoder

from optc.compiler.capture import capture_module
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight
from optc.compiler.ir.verification import VerificationError, verify_program

PROGRAM = tiny_decoder()
ENTRY = WeightQuantization(method="rtn", bits=4, group_size=32, symmetric=True, source="head.weight")


def _fault(edit: Callable[[Program], Program]) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        verify_program(edit(PROGRAM.clone()), "some-pass")
    return caught.value


def test_a_sound_program_passes() -> None:
    verify_program(PROGRAM, "some-pass")
    verify_program(PROGRAM.with_contract(quantization={"head.weight": ENTRY}), "some-pass")


def test_the_error_names_the_pass() -> None:
    error = _fault(lambda program: program.with_contract(outputs=()))
    assert str(error) == (
        "the program is malformed after 'some-pass'\n"
        "  where: 1 graph outputs, 0 in the contract\n"
        "  remedy: this is a bug of the pass; report it with --dump-ir"
    )
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("index", "change", "where"),
    [
        (0, {"dtype": "int32"}, "input input_ids is torch.int64, the contract says int32"),
        (1, {"dtype": "int32"}, "input position_ids is torch.int64, the contract says int32"),
        (0, {"dims": ("batch",)}, "input input_ids has 2 axes, the contract says 1"),
        (0, {"dims": ("batch", "seq", 3)}, "input input_ids has 2 axes, the contract says 3"),
    ],
)
def test_inputs_are_as_the_contract_says(index: int, change: dict[str, object], where: str) -> None:
    specs = list(PROGRAM.contract.inputs)
    specs[index] = msgspec.structs.replace(specs[index], **change)
    assert _fault(lambda program: program.with_contract(inputs=tuple(specs))).where == where


def test_inputs_are_counted_and_the_rest_is_still_checked() -> None:
    specs = (msgspec.structs.replace(PROGRAM.contract.inputs[0], dtype="int32"),)
    assert _fault(lambda program: program.with_contract(inputs=specs)).where == (
        "2 graph inputs, 1 in the contract; input input_ids is torch.int64, the contract says int32"
    )


def test_quantization_is_of_weights() -> None:
    table = {"head.weight": ENTRY, "gone": ENTRY}
    assert _fault(lambda program: program.with_contract(quantization=table)).where == (
        "contract.quantization names 'gone', which is not a weight"
    )


def test_every_weight_has_a_tensor() -> None:
    def drop(program: Program) -> Program:
        del program.exported.state_dict["head.bias"]
        return program

    where = str(_fault(drop).where)
    assert "placeholder p_head_bias reads 'head.bias', which has no tensor" in where


def test_a_tensor_may_be_a_constant() -> None:
    """What torch.export keeps among the constants counts as a weight."""
    program = PROGRAM.clone()
    program.exported.constants["head.bias"] = program.exported.state_dict.pop("head.bias")
    with pytest.raises(VerificationError) as caught:  # torch's own check looks for parameters elsewhere
        verify_program(program, "some-pass")
    assert "which has no tensor" not in str(caught.value)


def test_a_broken_graph_is_the_first_thing_said() -> None:
    def break_graph(program: Program) -> Program:
        node = program.calls(torch.ops.aten.linear.default)[-1]
        node.prepend(node.next)  # its reader, the output, now stands in front of it
        return program.with_contract(outputs=())

    first, second = str(_fault(break_graph).where).split("; ")
    assert "used before it has been defined" in first
    assert second == "1 graph outputs, 0 in the contract"


def test_six_problems_are_told() -> None:
    specs = tuple(msgspec.structs.replace(spec, dtype="int32", dims=()) for spec in PROGRAM.contract.inputs)
    table = dict.fromkeys("abcdef", ENTRY)
    where = str(_fault(lambda program: program.with_contract(inputs=specs, quantization=table)).where)
    assert where.count("; ") == 5
    assert where.endswith("contract.quantization names 'b', which is not a weight")


def test_no_op_writes_a_weight() -> None:
    """In place belongs to caches, which are inputs; what an op writes its schema says."""
    q = torch.randn(1, 2, 3, 8)

    class Decoder(torch.nn.Module):
        def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            past, knobs = torch.zeros(1, dtype=torch.long), {"scale": 1.0, "window": 0, "softcap": 0.0}
            out: torch.Tensor = torch.ops.optc.cached_attention_(q, q, q, keys, values, past, 3, None, **knobs)
            return out

    caches = (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8))
    program = capture_module(Decoder(), caches)
    verify_program(program, "some-pass")
    edited = program.clone()
    call = edited.calls(torch.ops.optc.cached_attention_.default)[0]
    call.update_arg(4, add_weight(edited, "held", caches[0]))
    with pytest.raises(VerificationError) as caught:
        verify_program(edited, "some-pass")
    assert caught.value.where == f"{call.name} writes its v_cache into the weight 'held'"
