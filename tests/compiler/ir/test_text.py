"""Text of Programs and differences of texts.

`OPTC_UPDATE_GOLDEN=1 pytest tests/compiler/ir/test_text.py` rewrites the golden files.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from optc.compiler.capture.facts import attention_layers
from optc.compiler.capture.module import capture_module
from optc.compiler.ir.contract import Input, KVCache, Output, WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.ir.text import diff_text, format_program, summarize

GOLDEN = Path(__file__).parent / "golden"


class Layer(nn.Module):
    """Attention with rotary embedding over two heads of size 4, then a gated quantized projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.register_buffer("codes", torch.zeros(8, 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(8, 1))

    def forward(self, x: Tensor, position: Tensor, inv_freq: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 6, 4).transpose(1, 2).split(2, 1)
        q = torch.ops.optc.rotary(q, position, inv_freq, scaling=1.0, interleaved=False)
        k = torch.ops.optc.rotary(k, position, inv_freq, scaling=1.0, interleaved=False)
        knobs: dict[str, Any] = {"scale": 0.5, "causal": True, "window": 0, "softcap": 0.0}
        out = torch.ops.optc.attention(q, k, v, None, None, **knobs).transpose(1, 2).flatten(2)
        weight = torch.ops.optc.dequantize(self.codes, self.scale, None, bits=4, group_size=8)
        return x + nn.functional.silu(nn.functional.linear(out, weight))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids, self.inv_freq)
        return nn.functional.linear(x, self.embed.weight)


@pytest.fixture
def program() -> Program:
    ids = torch.zeros(2, 5, dtype=torch.long)
    names = ["input_ids", "position_ids"]
    axes = {name: {0: "batch", 1: "seq"} for name in names}
    captured = capture_module(Decoder(), [ids, ids.clone()], input_names=names, dynamic=axes)
    dims: dict[str, Any] = {"dtype": "int64", "dims": ("batch", "seq")}
    kind = WeightQuantization(method="rtn", bits=4, group_size=8, symmetric=True, source="w")
    return captured.with_contract(
        kind="decoder",
        inputs=tuple(Input(name=name, role=name, **dims) for name in names),  # type: ignore[arg-type]
        outputs=(Output(name="logits", role="logits"),),
        layers=attention_layers(captured.exported),
        position_rule=True,
        quantization={f"layers.{i}.codes": kind for i in range(2)},
        passes=("fuse-rotary", "quantize-rtn(bits=4)"),
    )


def replaced(program: Program, old: Any, new: Any) -> Program:
    """A copy of the program with one operator replaced everywhere."""
    copy = program.clone()
    for node in copy.calls(old):
        replace_call(copy, node, new, node.args, dict(node.kwargs))
    return copy.changed()


def check_golden(name: str, text: str) -> None:
    """Compares with a golden file, in which an edit of this file changes no line number."""
    path = GOLDEN / name
    text = re.sub(rf"({Path(__file__).name}):\d+", r"\1:N", text)
    if os.environ.get("OPTC_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_text_of_a_decoder(program: Program) -> None:
    check_golden("decoder.txt", format_program(program))


def test_source_lines_are_those_of_the_module(program: Program) -> None:
    lines, first = inspect.getsourcelines(Decoder.forward)
    number = first + next(i for i, line in enumerate(lines) if "self.embed(" in line)
    (shown,) = [line for line in format_program(program).splitlines() if "aten.embedding" in line]
    assert shown.endswith(f"    # embed · {Path(__file__).name}:{number}")


def test_text_of_a_cached_program() -> None:
    class Cached(nn.Module):
        def forward(self, q: Tensor, keys: Tensor, values: Tensor, past: Tensor) -> Any:
            knobs: dict[str, Any] = {"scale": 0.5, "window": 16, "softcap": 30.0}
            total = keys.shape[2] + q.shape[2]
            return torch.ops.optc.cached_attention(q, q, q, keys, values, past, total, None, **knobs)

    names = ["q", "keys", "values", "past"]
    cache = torch.zeros(2, 2, 7, 4)
    arguments = [torch.zeros(2, 2, 3, 4), cache, cache.clone(), torch.zeros(2, dtype=torch.long)]
    axes = {name: {0: "batch"} | ({} if name == "past" else {2: "past"}) for name in names}
    axes["q"][2] = "seq"
    captured = capture_module(Cached(), arguments, input_names=names, dynamic=axes)
    roles = ("input", "key_cache", "value_cache", "input")
    inputs = [
        msgspec.structs.replace(spec, role=role) for spec, role in zip(captured.contract.inputs, roles, strict=True)
    ]
    program = captured.with_contract(inputs=tuple(inputs), kv_cache=KVCache(kind="linear"))
    check_golden("cached.txt", format_program(program))


def test_the_text_depends_only_on_the_program(program: Program, tmp_path: Path) -> None:
    text = format_program(program)
    assert format_program(program.clone()) == text
    program.save(tmp_path)
    assert format_program(Program.load(tmp_path)) == text


def test_a_line_for_a_prompt(program: Program) -> None:
    start = "Program(decoder, 36 calls, 8 weights of 0.00 MB, passes: "
    assert repr(program) == f"{start}fuse-rotary, quantize-rtn(bits=4))"
    assert repr(program.with_contract(passes=())) == f"{start}none)"


def test_summary(program: Program) -> None:
    summary = summarize(program)
    assert summary["nodes"] == sum(summary["ops"].values()) == 36
    assert list(summary["ops"].items())[:3] == [("getitem", 6), ("aten.linear", 5), ("aten.transpose.int", 4)]
    assert summary["ops"]["optc.attention"] == 2
    assert summary["weights"] == 8
    assert summary["dtypes"] == {
        "f32": {"weights": 6, "bytes": 4 * (16 * 8 + 2 * 24 * 8 + 2 * 8 + 2)},
        "u8": {"weights": 2, "bytes": 2 * 8 * 8},
    }
    assert summary["weight_bytes"] == 2248


# -- differences ----------------------------------------------------------------------------


def body(text: str) -> list[str]:
    """The changed lines of a diff, without the file lines."""
    return [line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_one_operator_per_layer_changed_shows_only_these_lines(program: Program) -> None:
    after = replaced(program, torch.ops.aten.silu.default, torch.ops.aten.relu.default)
    after = after.with_contract(passes=(*after.contract.passes, "silu-to-relu"))
    text = diff_text(format_program(program), format_program(after), name_a="02", name_b="03")
    check_golden("silu-to-relu.diff", text)
    assert len(body(text)) == 5
    assert text.splitlines()[-1] == "nodes 36 -> 36: - 2 aten.silu, + 2 aten.relu"


def test_a_program_whose_values_are_only_renamed_does_not_differ(program: Program) -> None:
    renamed = program.clone()
    for i, node in enumerate(renamed.graph.nodes):
        if node.op == "call_function":
            node._rename(f"value_{i}")
    text = diff_text(format_program(program), format_program(renamed), name_a="a", name_b="b")
    assert text.splitlines() == [
        "--- a",
        "+++ b",
        "(values of b are shown under their names in a)",
        "nodes 36 -> 36: no change",
    ]


def test_keyword_arguments_stand_as_the_schema_has_them() -> None:
    """In whichever order a pass gave them: a program that is read back has another one."""

    class Rounding(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.optc.fused_norm(x, None, None, None, norm="rms", eps=0.5, factor=2.0)

    program = capture_module(Rounding(), (torch.ones(2, 4),))
    (node,) = program.calls(torch.ops.optc.fused_norm.default)
    text = format_program(program)
    assert "norm='rms', eps=0.5, factor=2.0" in text
    node.kwargs = dict(reversed(node.kwargs.items()))
    assert format_program(program) == text


def test_swapped_operands_are_a_change(program: Program) -> None:
    after = program.clone()
    for node in after.calls(torch.ops.optc.attention.default):
        query, key, *rest = node.args
        node.args = (key, query, *rest)
    text = diff_text(format_program(program), format_program(after.changed()), name_a="a", name_b="b")
    assert len(body(text)) == 4
    assert text.splitlines()[-1] == "nodes 36 -> 36: ~ 2 optc.attention"


def test_a_value_that_took_another_place_is_not_hidden(program: Program) -> None:
    """One removed value read twice may be replaced by one added value only, not by two."""
    before = "%a: f32[2] = aten.neg(%x)\n%b: f32[2] = aten.add.Tensor(%a, %a)\nreturn %b\n"
    after = "%p: f32[2] = aten.cos(%x)\n%q: f32[2] = aten.sin(%x)\n"
    after += "%b: f32[2] = aten.add.Tensor(%p, %q)\nreturn %b\n"
    text = diff_text(before, after, name_a="a", name_b="b")
    assert body(text) == [
        "-%a: f32[2] = aten.neg(%x)",
        "-%b: f32[2] = aten.add.Tensor(%a, %a)",
        "+%a: f32[2] = aten.cos(%x)",
        "+%q: f32[2] = aten.sin(%x)",
        "+%b: f32[2] = aten.add.Tensor(%a, %q)",
    ]
    assert text.splitlines()[-1] == "nodes 2 -> 3: - 1 aten.neg, + 1 aten.cos, + 1 aten.sin, ~ 1 aten.add.Tensor"


def test_inputs_keep_their_names_and_lend_them_to_nobody() -> None:
    before = "inputs      %x: f32[n]\n\n%v: f32[n] = aten.neg(%x)\n%b: f32[n] = aten.exp(%v)\n"
    after = "inputs      %x: f32[n]\n            %v: f32[n]\n\n%w: f32[n] = aten.cos(%x)\n%b: f32[n] = aten.exp(%w)\n"
    assert body(diff_text(before, after, name_a="a", name_b="b")) == [
        "+            %v: f32[n]",
        "-%v: f32[n] = aten.neg(%x)",
        "-%b: f32[n] = aten.exp(%v)",
        "+%w: f32[n] = aten.cos(%x)",
        "+%b: f32[n] = aten.exp(%w)",
    ]


def test_a_node_put_in_front_of_another_changes_what_that_reads() -> None:
    before = "inputs      %p: f32[n]\n\n%a: f32[n] = aten.neg(%p)\n"
    after = "inputs      %x: f32[n]\n\n%c: f32[n] = aten.cos(%x)\n%a: f32[n] = aten.neg(%c)\n"
    text = diff_text(before, after, name_a="a", name_b="b")
    assert body(text) == [
        "-inputs      %p: f32[n]",
        "+inputs      %x: f32[n]",
        "-%a: f32[n] = aten.neg(%p)",
        "+%c: f32[n] = aten.cos(%x)",
        "+%a: f32[n] = aten.neg(%c)",
    ]
    assert text.splitlines()[-1] == "nodes 1 -> 2: + 1 aten.cos, ~ 1 aten.neg"


def test_source_lines_are_no_change() -> None:
    line = "%a: f32[n] = aten.neg(%x)    # layers.0 · model.py:"
    text = diff_text(f"{line}10\n", f"{line}11\n", name_a="a", name_b="b")
    assert text == "--- a\n+++ b\nnodes 1 -> 1: no change\n"
